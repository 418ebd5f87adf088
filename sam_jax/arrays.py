"""Shape aliases and the glossary of dimensions that every annotation uses.

Dimensions, in the order in which they appear in a shape:

====== ==================================================================
name   meaning
====== ==================================================================
b      image of the batch
p      prompted object of an image (padded; ``_valid`` says which are real)
n      point of a prompt (padded likewise)
m      mask candidate that the decoder returns (3, or 1)
t      token of the decoder's sequence
h w    pixels of the model input (resized and padded)
lh lw  pixels of the low-resolution logits, four per patch and side
gh gw  rows and columns of the patch grid, ``h / patch_size`` by ``w / patch_size``; the image
       tokens are all of them, row by row
k v    patches of an image, all of them and those that a masked autoencoder sees
a      attention head
d c    channels
====== ==================================================================

Coordinates are ``(x, y)`` pixels of the resized, padded model input unless a name says otherwise;
sizes are ``(height, width)``.
"""

from typing import Any, TypeAlias

from jax import Array
from jaxtyping import Bool, Float, Int, Shaped, UInt8, UInt16, UInt32

__all__ = [
    "Array",
    "Bool",
    "DimSize",
    "Float",
    "GridShape",
    "Int",
    "Shaped",
    "UInt8",
    "UInt16",
    "UInt32",
]

GridShape: TypeAlias = tuple[int, int]
# A length that ``jax.export`` may leave open: an int, or one of its symbols.
DimSize: TypeAlias = Any
