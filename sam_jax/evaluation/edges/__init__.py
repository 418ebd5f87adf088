"""Edge detection on BSDS500: edge maps from masks, and the benchmark that scores them."""
