"""The simulated user of the evaluation: where the next click goes, exactly.

Everything here is at the original resolution of the image and in pixel indices ``(x, y)``; the
half pixel that turns an index into a position is added by the prompt encoder.

Source: Kirillov et al. 2023, sections 7.1 and D.1; the order of ties, the border and the clicked
pixels follow RITM (Sofiiuk et al. 2021), whose evaluation the paper compares itself with.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import cv2
import numpy as np

from sam_jax.arrays import Bool

# Deepest inside the mask, or anywhere in it.
FirstClick: TypeAlias = Literal["center", "random"]


class Click(NamedTuple):
    """One click: column and row of a pixel, and whether it says "object" or "background"."""

    x: int
    y: int
    is_foreground: bool


def first_click(rule: FirstClick, ground_truth: Bool[np.ndarray, "oh ow"], key: str) -> Click:
    """``center_click`` or ``random_click``, as the rule says."""
    return center_click(ground_truth) if rule == "center" else random_click(ground_truth, key)


def center_click(ground_truth: Bool[np.ndarray, "oh ow"]) -> Click:
    """The pixel of the mask that lies deepest inside it, as a foreground click.

    Raises:
      ValueError: the mask is empty.
    """
    depth, x, y = _deepest_pixel(ground_truth, ())
    if depth == 0:
        raise ValueError("an empty mask has no centre to click on")
    return Click(x, y, is_foreground=True)


def random_click(ground_truth: Bool[np.ndarray, "oh ow"], key: str) -> Click:
    """A pixel of the mask, every one equally likely, as a foreground click.

    Which one follows from ``key`` alone, so it does not depend on the order, the batching or the
    host that meets the mask.

    Args:
      ground_truth: the mask.
      key: names the mask and the seed, e.g. ``"0/coco/000001.jpg/3"``.

    Raises:
      ValueError: the mask is empty.
    """
    pixels = np.flatnonzero(ground_truth)
    if pixels.size == 0:
        raise ValueError("an empty mask has no pixel to click on")
    y, x = divmod(int(pixels[keyed_number(key) % pixels.size]), ground_truth.shape[1])
    return Click(x, y, is_foreground=True)


def correction_click(
    ground_truth: Bool[np.ndarray, "oh ow"],
    prediction: Bool[np.ndarray, "oh ow"],
    previous: Sequence[Click],
) -> Click | None:
    """The pixel that lies deepest inside the larger error, or None where nothing is left to say.

    Missed and spurious pixels are two regions. The deeper one is clicked (the spurious one if both
    are equally deep), on its first deepest pixel in row-major order, leaving out pixels that were
    clicked before. None means that the prediction is perfect, or wrong only where clicks already
    are; RITM would go on clicking on the background then.

    Args:
      ground_truth: the mask that the user has in mind.
      prediction: what the model made of the clicks so far.
      previous: the clicks so far.
    """
    missed_depth, *missed = _deepest_pixel(ground_truth & ~prediction, previous)
    spurious_depth, *spurious = _deepest_pixel(prediction & ~ground_truth, previous)
    if missed_depth == spurious_depth == 0:
        return None
    is_foreground = missed_depth > spurious_depth
    x, y = missed if is_foreground else spurious
    return Click(x, y, is_foreground)


def keyed_number(key: str) -> int:
    """A number of 128 bits drawn by hashing ``key``: the same on every host and for ever."""
    # Names of files need not be UTF-8; Python keeps their bytes.
    content = key.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "big")


def _deepest_pixel(
    region: Bool[np.ndarray, "oh ow"], excluded: Sequence[Click]
) -> tuple[int, int, int]:
    """Squared distance to the region's outside, ``x`` and ``y`` of its deepest pixel; 0 if none.

    What lies beyond the image counts as outside. The distance transform runs on the region's
    bounding box and a ring around it, which holds a nearest outside pixel of every inner one.
    """
    x0, y0, width, height = cv2.boundingRect(np.ascontiguousarray(region).view(np.uint8))
    if width == 0:
        return 0, 0, 0
    inside = np.zeros((height + 2, width + 2), np.uint8)
    inside[1:-1, 1:-1] = region[y0 : y0 + height, x0 : x0 + width]
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    # The last bits of OpenCV's distances depend on where in memory the image lies (its issue
    # 24082), which would decide ties by chance. Squared they are integers, and rounding finds
    # those for distances below 1,024 pixels.
    squared = np.rint(np.square(distance))
    for click in excluded:
        x, y = click.x - x0, click.y - y0
        if 0 <= x < width and 0 <= y < height:
            squared[y, x] = 0
    y, x = divmod(int(squared.argmax()), width)
    return int(squared[y, x]), x0 + x, y0 + y
