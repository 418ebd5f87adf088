"""Statistics of the masks of data sets: where they are, how many, how large, how concave."""
