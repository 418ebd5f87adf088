"""Label maps that hold more than the label of an object, in the forms of certain data sets."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Shaped, UInt16

from sam_jax.data.label_maps import LabelMap, LabelMapError
from sam_jax.images import Orientation, UnreadableImageError, decode_in_own_mode

Encoding = Literal["ade20k", "cityscapes"]

GROUP = "group of objects left out"
NOT_EVALUATED = "region of a class that is not evaluated left out"

# Cityscapes numbers the instances of a class from 1000 times the class on.
_PER_CLASS = 1000
# Its classes that come in instances, and with them those that its evaluations use.
_THINGS = (24, 25, 26, 27, 28, 31, 32, 33)
_STUFF = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23)
# More pieces than this are no objects.
_MAX_PIECES = 10_000


def read_encoded_labels(path: Path, encoding: Encoding, orientation: Orientation) -> LabelMap:
    """The objects of a file in the form of a data set.

    Args:
      path: a picture of one page.
      encoding: ``ade20k``: ``*_seg.png`` and ``*_parts_N.png``, 8-bit RGB whose blue is the number
        of the object, 0 for none; red and green hold its class. ``cityscapes``:
        ``*_instanceIds.png``, 16-bit grey: 1000 times the class plus a number for an object, and
        the class alone for stuff and for groups of things that were not told apart. Groups are
        left out, and regions of classes that Cityscapes does not evaluate on.
      orientation: whether it is turned as its EXIF says.

    Raises:
      LabelMapError: the file is damaged, or not of that form.
      OSError: it cannot be read.
    """
    try:
        image = decode_in_own_mode(path.read_bytes(), str(path), orientation)
    except UnreadableImageError as error:
        raise LabelMapError(error.detail) from error
    return _READERS[encoding](np.asarray(image), image.mode)


def _ade20k(pixels: Shaped[np.ndarray, "h w *c"], mode: str) -> LabelMap:
    if mode != "RGB":
        raise LabelMapError(f"its mode is {mode}; expected ADE20K's 8-bit RGB")
    # Red counts in steps of 10, which tells these files from ordinary pictures.
    if (pixels[..., 0] % 10).any():
        raise LabelMapError("its red is no multiple of 10 everywhere, as ADE20K's is")
    return LabelMap(numbered(pixels[..., 2]))


def _cityscapes(pixels: Shaped[np.ndarray, "h w *c"], mode: str) -> LabelMap:
    if not mode.startswith("I"):
        raise LabelMapError(f"its mode is {mode}; expected Cityscapes' 16-bit grey")
    values = np.unique(pixels)
    classes = np.where(values >= _PER_CLASS, values // _PER_CLASS, values)
    is_evaluated = np.isin(classes, _THINGS + _STUFF)
    is_group = np.isin(classes, _THINGS) & (values < _PER_CLASS)
    remarks = []
    if (~is_evaluated).any():
        remarks.append(NOT_EVALUATED)
    if is_group.any():
        remarks.append(GROUP)
    kept = np.isin(pixels, values[is_evaluated & ~is_group])
    return LabelMap(numbered(np.where(kept, pixels, 0)), tuple(remarks))


_READERS: dict[str, Callable[[Shaped[np.ndarray, "h w *c"], str], LabelMap]] = {
    "ade20k": _ade20k,
    "cityscapes": _cityscapes,
}


def numbered(labels: Shaped[np.ndarray, "h w"]) -> UInt16[np.ndarray, "h w"]:
    """Labels 1, 2, ... in the order of those that there are; 0 stays."""
    values, ranks = np.unique(labels, return_inverse=True)
    if values[0] != 0:
        ranks = ranks + 1
    return ranks.reshape(labels.shape).astype(np.uint16)


def components(labels: Shaped[np.ndarray, "h w"]) -> UInt16[np.ndarray, "h w"]:
    """A label for each connected piece of each label; pixels that share a corner are connected.

    Raises:
      LabelMapError: there are too many pieces for objects.
    """
    found = np.zeros(labels.shape, np.int64)
    for label in np.unique(labels[labels != 0]):
        count, pieces = cv2.connectedComponents((labels == label).astype(np.uint8))
        last = int(found.max())
        found = np.where(pieces > 0, pieces + last, found)
        if last + count > _MAX_PIECES:
            raise LabelMapError(f"it is in more than {_MAX_PIECES:,} pieces; is it a photograph?")
    return found.astype(np.uint16)
