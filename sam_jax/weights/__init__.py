"""Weights in and out: files, names and layouts of this and other frameworks."""
