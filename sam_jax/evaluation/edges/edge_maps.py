"""Edge maps: from the logits of an image's masks, and from its pixels alone."""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import cv2
import numpy as np

from sam_jax.arrays import Float, UInt8
from sam_jax.errors import ConfigError

_BOUNDARIES = ("band", "outer")
# What lies beyond the image for the Sobel filter.
_BORDER_TYPES = {
    "zeros": cv2.BORDER_CONSTANT,
    "reflected": cv2.BORDER_REFLECT_101,
}
# A filter of 3 x 3 pixels gives at most this, where a mask's probability goes from 0 to 1.
_STEEPEST = math.sqrt(32)
# So far beyond its box a mask has edges, and so far the filter looks from these.
_MARGIN_PX = 2
_SQUARE = np.ones((3, 3), np.uint8)
_LEVELS = 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeMapOptions:
    """Options of edge maps.

    Attributes:
      points_per_side: points along each side of the grid; each gives three masks.
      points_per_batch: points that are prompted at once.
      box_nms_thresh: of two masks whose boxes have a higher IoU, the one with the lower predicted
        IoU goes.
      boundary: where a mask may have edges. "band": within a pixel of its outline, on both sides.
        "outer": on the pixels around it, outside.
      frame: "zeros": masks end with the image, so that those which its frame cuts have edges there.
        "reflected": they go on.
      zeroed_frame_px: this many of the outermost pixels have no edges.
    """

    points_per_side: int = 16
    points_per_batch: int = 64
    box_nms_thresh: float = 0.7
    boundary: str = "band"
    frame: str = "zeros"
    zeroed_frame_px: int = 0

    def __post_init__(self) -> None:
        if self.points_per_side < 1 or self.points_per_batch < 1:
            raise ConfigError("points_per_side and points_per_batch must be at least 1")
        if not 0 <= self.box_nms_thresh <= 1:
            raise ConfigError(f"box_nms_thresh must be in [0, 1], got {self.box_nms_thresh}")
        for name, known in (("boundary", _BOUNDARIES), ("frame", tuple(_BORDER_TYPES))):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} must be {' or '.join(map(repr, known))}, got {getattr(self, name)!r}"
                )
        if self.zeroed_frame_px < 0:
            raise ConfigError(f"zeroed_frame_px must not be negative, got {self.zeroed_frame_px}")


class MaskEdges(NamedTuple):
    """The edges of one mask, where it has any.

    Attributes:
      window: rows and columns of the image.
      strengths: what the filter gives there, 0 outside of the mask's boundary.
    """

    window: tuple[slice, slice]
    strengths: Float[np.ndarray, "_ _"]


def mask_edges(logits: Float[np.ndarray, "h w"], options: EdgeMapOptions) -> MaskEdges:
    """Sobel's magnitude of a mask's probability along the mask's boundary.

    It is computed in the mask's box and around it, which gives what all of the image would.

    Args:
      logits: at the image's size; above 0 is the mask.
      options: what its boundary is.

    Source: Kirillov et al. 2023, section D.2; the authors' answer in issue 226 of segment-anything.
    """
    # Training knows edge evaluation, too, and starts sooner without SciPy.
    from scipy.special import expit

    mask = (logits > 0).view(np.uint8)
    x, y, width, height = cv2.boundingRect(mask)
    if not width:
        return MaskEdges((slice(0, 0), slice(0, 0)), np.zeros((0, 0), np.float32))
    window = (
        slice(max(y - _MARGIN_PX, 0), y + height + _MARGIN_PX),
        slice(max(x - _MARGIN_PX, 0), x + width + _MARGIN_PX),
    )
    border = _BORDER_TYPES[options.frame]
    strengths = _sobel(expit(logits[window]), border)
    part = np.ascontiguousarray(mask[window])
    if options.boundary == "band":
        is_boundary = _sobel(part, border) > 0
    else:
        is_boundary = cv2.dilate(part, _SQUARE) > part
    return MaskEdges(window, np.where(is_boundary, strengths, np.float32(0)))


def combined(
    of_masks: Iterable[MaskEdges], size_hw: tuple[int, int], options: EdgeMapOptions
) -> Float[np.ndarray, "h w"]:
    """The edge map of an image: the strongest edge of any mask at each pixel, from 0 to 1.

    It is 0 everywhere if no mask has an edge.

    Args:
      of_masks: edges of masks of the image.
      size_hw: its height and width.
      options: what the frame is.
    """
    strongest = np.zeros(size_hw, np.float32)
    for window, strengths in of_masks:
        part = strongest[window]
        np.maximum(part, strengths, out=part)
    if depth := options.zeroed_frame_px:
        inner = (slice(depth, -depth),) * 2
        within = np.zeros_like(strongest)
        within[inner] = strongest[inner]
        strongest = within
    least, most = strongest.min(), strongest.max()
    return (strongest - least) / (most - least) if most > least else np.zeros_like(strongest)


def sobel_edges(pixels: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w"]:
    """The baseline without a model: Sobel's magnitude of the luma, over the highest possible."""
    luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32) / _LEVELS
    return _sobel(luma, cv2.BORDER_REFLECT_101) / np.float32(_STEEPEST)


def quantized(edges: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """A map from 0 to 1 as the benchmark's files hold it, in 8 bits."""
    return np.rint(edges * _LEVELS).astype(np.uint8)


def strengths_of(levels: UInt8[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """A map from 0 to 1 from its 8 bits."""
    return levels / _LEVELS


def _sobel(values: np.ndarray, border: int) -> np.ndarray:
    dx, dy = (
        cv2.Sobel(values, cv2.CV_32F, *order, borderType=border) for order in ((1, 0), (0, 1))
    )
    # Not cv2.magnitude, whose last bit depends on where arrays lie in memory: suppression decides
    # by it between pixels that are equally strong.
    return np.sqrt(dx * dx + dy * dy)
