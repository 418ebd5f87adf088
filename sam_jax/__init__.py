"""Segment Anything in JAX: the model, its training, its evaluation."""
