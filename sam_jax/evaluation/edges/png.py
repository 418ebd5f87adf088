"""Edge maps as pictures in files."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from sam_jax.arrays import Float, UInt8
from sam_jax.images import DECODE_ERRORS, ImageError

# By Pillow's modes: what the highest value stands for an edge of strength 1.
_HIGHEST = {"1": 1, "L": 255, "P": 255, "I;16": 65_535, "I;16B": 65_535}


def encode(levels: UInt8[np.ndarray, "h w"]) -> bytes:
    """A PNG of a map in 8 bits."""
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format="PNG")
    return buffer.getvalue()


def decode(content: bytes) -> UInt8[np.ndarray, "h w"]:
    """A map that ``encode`` was given."""
    return np.asarray(Image.open(io.BytesIO(content)))


def read_edge_map(path: Path) -> Float[np.ndarray, "h w"]:
    """Strengths from 0, black, to 1, white, of a grey picture of 1, 8 or 16 bits.

    Numbers are taken as they are stored: 16 bits are not stretched to what occurs in them, as
    photographs are.

    Raises:
      ImageError: it cannot be read, or is a colour picture.
    """
    try:
        with Image.open(path) as opened:
            mode = opened.mode
            pixels = np.asarray(opened.convert("RGB") if mode in ("P", "RGB", "RGBA") else opened)
    except DECODE_ERRORS as error:
        raise ImageError(f"{path} cannot be read as an edge map: {error}") from None
    if pixels.ndim == 3:
        if (pixels[..., :1] != pixels[..., :3]).any():
            raise ImageError(f"{path} has colours: expected a grey picture, white where edges are")
        return pixels[..., 0] / 255
    if mode not in _HIGHEST:
        raise ImageError(
            f"{path} is of Pillow's mode {mode}: expected a grey picture of 1, 8 or 16 bits"
        )
    return pixels / _HIGHEST[mode]
