"""COCO run-length masks: validated, measured and rasterised from the runs.

Annotation files come from outside, and the usual C decoder trusts its input:
runs that sum to more than the image are written past the end of its buffer.
Here every run list is checked before anything is rasterised, and the
rasteriser never needs more than the part of the image the mask spans, which
for a typical SA-1B mask is a small fraction of a 1500 x 2250 canvas.

A run list alternates background and foreground, starts with background
(possibly 0 long) and walks the image column by column.
"""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped
from pycocotools import mask as coco_mask

# JPEG's own limit; anything larger is a damaged header, not a photograph.
MAX_SIDE_PX = 65_535
# Seven 5-bit groups hold any run of an image within MAX_SIDE_PX squared.
_MAX_GROUPS = 7


class BadRleError(ValueError):
    """A run-length mask that does not describe an image."""


def check_size(size: Any) -> tuple[int, int]:
    """The (h, w) of an annotation, checked.

    Args:
        size: what stood in the file; should be two positive integers.

    Raises:
        BadRleError: it is not two integers in [1, MAX_SIDE_PX].
    """
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise BadRleError(f"size must be [h, w], got {size!r:.80}")
    for side in size:
        if isinstance(side, bool) or not isinstance(side, (int, np.integer)):
            raise BadRleError(f"size must hold integers, got {size!r:.80}")
        if not 1 <= side <= MAX_SIDE_PX:
            raise BadRleError(f"size out of range: {size!r:.80}")
    return int(size[0]), int(size[1])


def run_lengths(rle: Any) -> Int64[np.ndarray, "r"]:
    """The runs of an RLE, non-negative and summing to h * w.

    Args:
        rle: {"size": [h, w], "counts": ...}; counts is COCO's compressed
            string (bytes or str) or the uncompressed list of integers.

    Raises:
        BadRleError: anything about it is not as above.
    """
    if not isinstance(rle, Mapping) or "size" not in rle or "counts" not in rle:
        raise BadRleError("not a mapping with size and counts")
    h, w = check_size(rle["size"])
    counts = rle["counts"]
    if isinstance(counts, str):
        try:
            counts = counts.encode("ascii")
        except UnicodeEncodeError:
            raise BadRleError("counts holds a character outside ASCII") from None
    if isinstance(counts, bytes):
        runs = _decompress(counts)
    elif isinstance(counts, (list, tuple)):
        runs = _from_list(counts)
    else:
        raise BadRleError(f"counts is a {type(counts).__name__}")
    if runs.size and runs.min() < 0:
        raise BadRleError("a run is negative")
    # Compared before summing, so that the sum cannot wrap around.
    if (runs.size and runs.max() > h * w) or int(runs.sum()) != h * w:
        raise BadRleError(f"runs do not sum to {h} * {w}")
    return runs


def _from_list(counts: list | tuple) -> Int64[np.ndarray, "r"]:
    try:
        runs = np.asarray(counts)
    except ValueError:
        raise BadRleError("counts is a ragged list") from None
    if runs.ndim != 1 or (runs.size and runs.dtype.kind not in "iu"):
        raise BadRleError("counts is not a flat list of integers")
    if runs.size and runs.max() > np.iinfo(np.int64).max:
        raise BadRleError("a run is out of range")
    return runs.astype(np.int64)


def _decompress(counts: bytes) -> Int64[np.ndarray, "r"]:
    """Undoes COCO's string form: 6-bit characters, 5 bits of payload each.

    From the fourth run on, a value is the difference to the run two before.
    """
    if not counts:
        return np.zeros(0, np.int64)
    chars = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if chars.min() < 0 or chars.max() > 63:
        raise BadRleError("counts holds a character outside the alphabet")
    last = np.flatnonzero((chars & 32) == 0)
    if not last.size or last[-1] != chars.size - 1:
        raise BadRleError("counts ends within a number")
    first = np.concatenate([[0], last[:-1] + 1])
    num_groups = last - first + 1
    if num_groups.max() > _MAX_GROUPS:
        raise BadRleError("a number in counts is out of range")
    shift = 5 * (np.arange(chars.size) - np.repeat(first, num_groups))
    values = np.add.reduceat((chars & 31) << shift, first)
    negative = (chars[last] & 16) != 0
    values -= np.where(negative, np.int64(1) << (5 * num_groups), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def area_px(runs: Int64[np.ndarray, "r"]) -> int:
    """The number of foreground pixels."""
    return int(runs[1::2].sum())


def decode(runs: Int64[np.ndarray, "r"], hw: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The mask.

    Args:
        runs: from `run_lengths`, for an image of `hw`.
        hw: height and width.
    """
    h, w = hw
    foreground = np.arange(runs.size) % 2 == 1
    return np.repeat(foreground, runs).reshape(w, h).T


def decode_part(
    runs: Int64[np.ndarray, "r"], hw: tuple[int, int], box: tuple[int, int, int, int]
) -> Bool[np.ndarray, "bh bw"]:
    """The part of the mask inside a box, without the memory of the whole.

    Args:
        runs: from `run_lengths`, for an image of `hw`.
        hw: height and width of the image.
        box: (x0, y0, x1, y1), edges in pixels, x1 and y1 exclusive, inside the image.
    """
    h, _ = hw
    x0, y0, x1, y1 = box
    bounds = np.clip(np.cumsum(runs), x0 * h, x1 * h) - x0 * h
    foreground = np.arange(runs.size) % 2 == 1
    columns = np.repeat(foreground, np.diff(bounds, prepend=0))
    return columns.reshape(x1 - x0, h)[:, y0:y1].T


def encode_part(
    part: Bool[np.ndarray, "bh bw"], hw: tuple[int, int], corner: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    """COCO's compressed RLE of a mask that is empty outside of a part of the image.

    Args:
        part: the mask inside the part.
        hw: height and width of the image.
        corner: (x, y) of the part's upper left pixel.

    Returns:
        {"size": [h, w], "counts": bytes}, as pycocotools has it.
    """
    h, w = hw
    part_h, part_w = part.shape
    # An empty pixel below each column ends every run within its column.
    columns = np.zeros((part_w, part_h + 1), np.uint8)
    columns[:, :part_h] = cv2.transpose(np.ascontiguousarray(part).view(np.uint8))
    bounds = np.flatnonzero(np.diff(columns.reshape(-1), prepend=np.uint8(0)))
    column, row = np.divmod(bounds, part_h + 1)
    bounds = (column + corner[0]) * h + row + corner[1]
    # Where the part is as high as the image, runs of neighbouring columns may touch.
    touching = np.flatnonzero(bounds[2::2] == bounds[1:-1:2])
    bounds = np.delete(bounds, np.concatenate([2 * touching + 1, 2 * touching + 2]))
    runs = np.diff(bounds, prepend=0, append=h * w)
    if not runs[-1] and runs.size > 1:
        runs = runs[:-1]
    return coco_mask.frPyObjects({"size": [h, w], "counts": runs.tolist()}, h, w)


def from_labels(labels: Shaped[np.ndarray, "h w"]) -> list[dict[str, Any]]:
    """One uncompressed RLE per value, in increasing order; 0 is background."""
    h, w = labels.shape
    flat = labels.T.reshape(-1)
    begins = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(begins[1:], flat.size)
    values = flat[begins]
    order = np.argsort(values, kind="stable")
    order = order[values[order] != 0]
    _, first = np.unique(values[order], return_index=True)
    rles = []
    for chosen in np.split(order, first[1:]) if order.size else []:
        bounds = np.stack([begins[chosen], ends[chosen]], axis=1).reshape(-1)
        runs = np.diff(bounds, prepend=0, append=flat.size)
        rles.append({"size": [h, w], "counts": runs.tolist()})
    return rles


def resample(
    runs: Int64[np.ndarray, "r"],
    hw: tuple[int, int],
    y_edges: Float[np.ndarray, "y"],
    x_edges: Float[np.ndarray, "x"],
) -> Bool[np.ndarray, "y-1 x-1"]:
    """The mask on another pixel grid.

    A target pixel belongs to the mask when the mask covers at least half of
    the pixel's footprint. That is the grid mask with the least area in
    disagreement with the original, at any scale; sampling the nearest source
    pixel instead keeps thin structures as random dots and shifts outlines by
    up to half a source pixel. Coverage is exact: sums come from an integral
    image interpolated at the (fractional) edges, which is exact because a
    mask is constant within each source pixel.

    Args:
        runs: from `run_lengths`, for an image of `hw`.
        hw: height and width of the source grid.
        y_edges: increasing; the target rows' edges in source pixels: 0 is
            the upper edge of the image, h its lower edge.
        x_edges: the same for the target columns.
    """
    out = np.zeros((len(y_edges) - 1, len(x_edges) - 1), bool)
    h, _ = hw
    ends = np.cumsum(runs)
    begins = (ends - runs)[1::2]
    ends = ends[1::2]
    inked = ends > begins
    begins, ends = begins[inked], ends[inked]
    if not begins.size:
        return out

    # The part of the source the mask spans.
    col0, col1 = int(begins[0] // h), int((ends[-1] - 1) // h) + 1
    if np.any(begins // h != (ends - 1) // h):
        row0, row1 = 0, h
    else:
        row0, row1 = int((begins % h).min()), int(((ends - 1) % h).max()) + 1
    bounds = np.clip(np.cumsum(runs), col0 * h, col1 * h) - col0 * h
    foreground = (np.arange(runs.size) % 2).astype(np.uint8)
    span = np.repeat(foreground, np.diff(bounds, prepend=0))
    span = np.ascontiguousarray(span.reshape(col1 - col0, h)[:, row0:row1])

    # The part of the target it can touch.
    i0, i1 = _overlap(y_edges, row0, row1)
    j0, j1 = _overlap(x_edges, col0, col1)
    if i1 <= i0 or j1 <= j0:
        return out
    y_edges, x_edges = y_edges[i0 : i1 + 1], x_edges[j0 : j1 + 1]

    sums = cv2.integral(span)
    covered = _integrate(sums, x_edges - col0)
    covered = _integrate(covered.T, y_edges - row0)
    footprint = np.diff(y_edges)[:, None] * np.diff(x_edges)
    out[i0:i1, j0:j1] = covered >= 0.5 * footprint
    return out


def _overlap(edges: Float[np.ndarray, "n"], low: int, high: int) -> tuple[int, int]:
    """The range of cells between `edges` that overlap [low, high]."""
    first = int(np.searchsorted(edges, low, side="right")) - 1
    last = int(np.searchsorted(edges, high, side="left"))
    return max(first, 0), min(last, len(edges) - 1)


def _integrate(
    sums: Shaped[np.ndarray, "s c"], edges: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "n-1 c"]:
    """Differences of a running sum along axis 0, between fractional edges."""
    edges = np.clip(edges, 0, sums.shape[0] - 1)
    below = np.minimum(edges.astype(np.int64), sums.shape[0] - 2)
    fraction = (edges - below)[:, None]
    at_edges = sums[below] * (1 - fraction) + sums[below + 1] * fraction
    return np.diff(at_edges, axis=0)
