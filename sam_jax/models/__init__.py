"""The promptable model: image encoder, prompt encoder, mask decoder, and the whole."""
