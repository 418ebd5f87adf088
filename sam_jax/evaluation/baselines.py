"""Baselines without a model: the box, the ellipse in it, a disk around the click, and GrabCut.

They answer the same prompts for the same masks as the model does, so their IoUs say how much of a
score the prompt alone is worth.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import cv2
import numpy as np

from sam_jax.arrays import Bool, UInt8
from sam_jax.evaluation.clicks import Click, FirstClick

# Radii of disks as rates of the square root of the image's area: 1 % to 42 % in steps of 1.2.
DISK_RADIUS_RATES = tuple(0.01 * 1.2**step for step in range(21))
GRABCUT_ITERATIONS = 5
# GrabCut fits this many colours to either side of the box, and fails on fewer pixels.
_GRABCUT_COLORS = 5

Box = tuple[int, int, int, int]


def box_mask(pixels: UInt8[np.ndarray, "h w 3"], box_xyxy: Box) -> Bool[np.ndarray, "h w"]:
    """The whole box, corners included."""
    x0, y0, x1, y1 = box_xyxy
    mask = np.zeros(pixels.shape[:2], bool)
    mask[y0 : y1 + 1, x0 : x1 + 1] = True
    return mask


def ellipse_mask(pixels: UInt8[np.ndarray, "h w 3"], box_xyxy: Box) -> Bool[np.ndarray, "h w"]:
    """The pixels whose centres lie within the ellipse that touches all four sides of the box."""
    x0, y0, x1, y1 = box_xyxy
    dx = (np.arange(x0, x1 + 1) - (x0 + x1) / 2) / ((x1 - x0 + 1) / 2)
    dy = (np.arange(y0, y1 + 1) - (y0 + y1) / 2) / ((y1 - y0 + 1) / 2)
    mask = np.zeros(pixels.shape[:2], bool)
    mask[y0 : y1 + 1, x0 : x1 + 1] = dx**2 + dy[:, None] ** 2 <= 1
    return mask


def grabcut_mask(pixels: UInt8[np.ndarray, "h w 3"], box_xyxy: Box) -> Bool[np.ndarray, "h w"]:
    """GrabCut's mask of the object in the box, after five iterations.

    It sees the box and as much around it as the box is wide and high: colours far away say little
    about the background right here, and its time grows with the pixels. Where the box or what is
    around it holds too few pixels to fit colours to, the answer is the box.

    Source: Rother et al. 2004; OpenCV's implementation.
    """
    x0, y0, x1, y1 = box_xyxy
    width, height = x1 - x0 + 1, y1 - y0 + 1
    left, top = max(x0 - width, 0), max(y0 - height, 0)
    window = pixels[top : y1 + 1 + height, left : x1 + 1 + width]
    inside = width * height
    if min(inside, window.shape[0] * window.shape[1] - inside) < _GRABCUT_COLORS:
        return box_mask(pixels, box_xyxy)
    # OpenCV draws its first clusters from a generator of the calling thread.
    cv2.setRNGSeed(0)
    labels = np.zeros(window.shape[:2], np.uint8)
    cv2.grabCut(
        np.ascontiguousarray(window),
        labels,
        (x0 - left, y0 - top, width, height),
        np.zeros((1, 65)),
        np.zeros((1, 65)),
        GRABCUT_ITERATIONS,
        cv2.GC_INIT_WITH_RECT,
    )
    mask = np.zeros(pixels.shape[:2], bool)
    # Both foreground labels, certain and probable, are odd.
    mask[top : y1 + 1 + height, left : x1 + 1 + width] = labels & 1
    return mask


@dataclasses.dataclass(frozen=True)
class BoxBaseline:
    """A mask drawn from the box and the image.

    Attributes:
      mask: draws it.
      column: its name in tables.
    """

    mask: Callable[[np.ndarray, Box], np.ndarray]
    column: str


BOX_BASELINES: Mapping[str, BoxBaseline] = {
    "box_filled": BoxBaseline(box_mask, "whole box"),
    "box_ellipse": BoxBaseline(ellipse_mask, "ellipse"),
    "box_grabcut": BoxBaseline(grabcut_mask, "GrabCut"),
}
DISK_BASELINE = "disk"


def disk_ious(ground_truth: Bool[np.ndarray, "h w"], click: Click) -> dict[float, float]:
    """IoU of disks around the click, cut off at the image's edge, by ``DISK_RADIUS_RATES``."""
    height, width = ground_truth.shape
    dy2 = (np.arange(height) - click.y) ** 2
    dx2 = (np.arange(width) - click.x) ** 2
    ys, xs = np.nonzero(ground_truth)
    inside_2 = dy2[ys] + dx2[xs]
    ious = {}
    for rate in DISK_RADIUS_RATES:
        radius_2 = int(rate**2 * height * width)
        intersection = int(np.count_nonzero(inside_2 <= radius_2))
        # Columns within reach of each row, counted without drawing the disk.
        reach = np.sqrt(np.maximum(radius_2 - dy2, 0)).astype(int)
        columns = np.minimum(click.x + reach, width - 1) - np.maximum(click.x - reach, 0) + 1
        area = int(columns[dy2 <= radius_2].sum())
        ious[rate] = intersection / (area + ys.size - intersection)
    return ious


def disk_measure(rule: FirstClick, rate: float | None = None) -> str:
    """The measure of disks around a first click: of one radius, or of the best."""
    return f"{DISK_BASELINE}_{rule}" + ("" if rate is None else f"@{rate}")


def best_disk(mean_ious: Iterable[Mapping[float, float]]) -> float:
    """The one radius whose disks have the highest IoU, averaged over the datasets.

    It is chosen with the very masks that it is scored on, so no fixed disk does better: the
    baseline is flattered, never the model.

    Args:
      mean_ious: for each dataset, mean IoU by radius.
    """
    datasets = list(mean_ious)
    return max(DISK_RADIUS_RATES, key=lambda rate: sum(means[rate] for means in datasets))
