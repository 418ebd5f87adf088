"""Pure functions on arrays: no parameters, no linen, no files."""
