"""COCO run-length masks: validated, measured and rasterised from the runs.

Annotation files come from outside, and the usual C decoder trusts its input:
runs that sum to more than the image are written past the end of its buffer.
Here every run list is checked before anything is rasterised, and the
rasteriser never needs more than the part of the image the mask spans, which
for a typical SA-1B mask is a small fraction of a 1500 x 2250 canvas.

A run list alternates background and foreground, starts with background
(possibly 0 long) and walks the image column by column.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped
from pycocotools import mask as coco_mask

from sam_jax.images import MAX_SIDE_PX

# Seven 5-bit groups hold any run of an image within MAX_SIDE_PX squared.
_MAX_GROUPS = 7
# Signs: a segment covers all below its top, minus all below its bottom.
_TOP_AND_BOTTOM = np.array([[1.0], [-1.0]])


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
      rle: {"size": [h, w], "counts": ...}; counts is COCO's compressed string (bytes or str) or the
        uncompressed list of integers.

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


def run_lengths_of_all(rles: Sequence[Any]) -> list[Int64[np.ndarray, "_"]]:
    """The runs of many RLEs, as `run_lengths` gives them one by one, several times as fast.

    Args:
      rles: as there; any number.

    Raises:
      BadRleError: one of them is bad; which one, `run_lengths` tells.
    """
    if not all(isinstance(rle, Mapping) and "size" in rle for rle in rles):
        raise BadRleError("not a mapping with size and counts")
    counts = [rle.get("counts") for rle in rles]
    if not rles or not all(isinstance(text, (bytes, str)) and text for text in counts):
        return [run_lengths(rle) for rle in rles]
    try:
        texts = [t if isinstance(t, bytes) else t.encode("ascii") for t in counts]
    except UnicodeEncodeError:
        raise BadRleError("counts holds a character outside ASCII") from None
    values, num_runs = _decompress_all(texts)
    sizes = [check_size(rle["size"]) for rle in rles]
    pixels = np.array([h * w for h, w in sizes])
    first = np.cumsum(num_runs) - num_runs
    # Compared before summing, so that no sum can wrap around.
    is_long = values > np.repeat(pixels, num_runs)
    if values.min() < 0 or is_long.any() or (np.add.reduceat(values, first) != pixels).any():
        raise BadRleError("runs do not sum to the size of their image")
    return np.split(values, first[1:])


def _decompress_all(
    texts: Sequence[bytes],
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "k"]]:
    """The values of several strings in COCO's form, none empty, and how many each has."""
    # Characters below the alphabet come out above it.
    chars = np.frombuffer(b"".join(texts), np.uint8) - np.uint8(48)
    ends = np.cumsum([len(text) for text in texts])
    if chars.max() > 63 or (chars[ends - 1] > 31).any():
        raise BadRleError("counts holds characters outside the alphabet, or ends within a number")
    last = np.flatnonzero(chars < 32)
    first = np.concatenate([[0], last[:-1] + 1])
    num_groups = last - first + 1
    if num_groups.max() > _MAX_GROUPS:
        raise BadRleError("a number in counts is out of range")
    values = (chars[first] & 31).astype(np.int64)
    for group in range(1, num_groups.max()):
        longer = np.flatnonzero(num_groups > group)
        payload = (chars[first[longer] + group] & 31).astype(np.int64)
        values[longer] += payload << (5 * group)
    negative = np.flatnonzero(chars[last] & 16)
    values[negative] -= np.int64(1) << (5 * num_groups[negative])
    num_runs = np.diff(np.searchsorted(last, ends), prepend=0)
    # Differences to the value two before, but for each string's first three: the odd and the even
    # places are two chains, which begin anew with each string. An empty place at the end of a
    # string of odd length lets all strings begin at an even one.
    num_pairs = (num_runs + 1) // 2
    begin = np.cumsum(num_pairs) - num_pairs
    place = np.arange(values.size) + np.repeat(
        2 * begin - (np.cumsum(num_runs) - num_runs), num_runs
    )
    pairs = np.zeros((num_pairs.sum(), 2), np.int64)
    pairs.reshape(-1)[place] = values
    heads = pairs[begin, 0]
    pairs[begin, 0] = 0
    sums = np.cumsum(pairs, axis=0)
    sums -= np.repeat(sums[begin] - pairs[begin], num_pairs, axis=0)
    sums[begin, 0] = heads
    return sums.reshape(-1)[place], num_runs


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
    """The mask as an array, True on the object.

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


class Grid:
    """Another pixel grid laid over an image, to which masks are resampled.

    A target pixel belongs to a mask when the mask covers at least half of the
    pixel's footprint. That is the grid mask with the least area in
    disagreement with the original, at any scale; sampling the nearest source
    pixel instead keeps thin structures as random dots and shifts outlines by
    up to half a source pixel.

    Coverage comes from the runs, cut at the ends of their columns. Below the
    top of such a segment lie a part of one target pixel and all of those
    beneath it: two differences, and two of the opposite sign for its bottom,
    of which running sums down the columns make the coverage. Sideways a source
    column has its share in one target column or several. So source pixels are
    never drawn: the work follows the outline, and the target's pixels in the
    mask's box. A target pixel is counted as h * w parts, which makes all of
    these whole numbers, and the coverage exact.

    What depends on the grid alone is worked out once for all masks of an image.
    """

    def __init__(
        self,
        hw: tuple[int, int],
        scaled_hw: tuple[int, int],
        crop_yx: tuple[int, int] = (0, 0),
        crop_hw: tuple[int, int] | None = None,
    ):
        """Finds the place of every row and column of the image.

        Args:
          hw: height and width of the source grid.
          scaled_hw: the size the whole image is scaled to.
          crop_yx: upper left corner of the target in that, in its pixels.
          crop_hw: the target's size; None is all of `scaled_hw`.
        """
        self._hw = hw
        self._shape = crop_hw or scaled_hw
        self._rows = _Rows.of(hw[0], scaled_hw[0], crop_yx[0], self._shape[0])
        self._columns = _Columns.of(hw[1], scaled_hw[1], crop_yx[1], self._shape[1])

    def resample(self, runs: Int64[np.ndarray, "r"]) -> Bool[np.ndarray, "y x"]:
        """The mask on this grid.

        Args:
          runs: from `run_lengths`, for an image of the source grid's size.
        """
        out = np.zeros(self._shape, bool)
        part, (y, x) = self.resample_part(runs)
        out[y : y + part.shape[0], x : x + part.shape[1]] = part
        return out

    def resample_part(
        self, runs: Int64[np.ndarray, "r"]
    ) -> tuple[Bool[np.ndarray, "y x"], tuple[int, int]]:
        """The mask on this grid inside of a box, and the box's corner (y, x); empty outside.

        Args:
          runs: from `run_lengths`, for an image of the source grid's size.
        """
        h, w = self._hw
        column, ends = _segments(runs, h)
        if not column.size:
            return np.zeros((0, 0), bool), (0, 0)
        y0, y1 = self._rows.reach(int(ends[0].min()), int(ends[1].max()))
        x0, x1 = self._columns.reach(int(column[0]), int(column[-1]))
        if y1 <= y0 or x1 <= x0:
            return np.zeros((0, 0), bool), (0, 0)
        # Two more rows take differences beyond the box, some more columns the shares that are 0.
        shares = self._columns.share[:, column]
        height, width = y1 - y0 + 2, x1 - x0 + len(shares)
        cells = np.empty((2, 2, *shares.shape), np.int64)  # [pixel or next, end, share, segment]
        differences = np.empty(cells.shape)
        at_ends = (self._rows.cell[ends] - y0) * width + (self._columns.first[column] - x0)
        np.add(at_ends[:, None], np.arange(len(shares))[:, None], out=cells[0])
        np.add(cells[0], width, out=cells[1])
        rest = self._rows.rest[ends] * _TOP_AND_BOTTOM
        np.multiply(rest[:, None], shares, out=differences[0])
        np.multiply((h * _TOP_AND_BOTTOM - rest)[:, None], shares, out=differences[1])
        sums = np.bincount(cells.reshape(-1), differences.reshape(-1), height * width)
        # numpy sums whole numbers of this size four times as fast.
        covered: np.ndarray = sums.reshape(height, width).astype(
            np.int32 if h * w < 2**31 else np.int64
        )
        np.cumsum(covered, axis=0, out=covered)
        return covered[:-2, : x1 - x0] >= (h * w + 1) // 2, (y0, x0)


class _Rows(NamedTuple):
    """Positions of the source rows' edges 0..h among target rows, each of which has h parts.

    Attributes:
      cell: the target row an edge lies in; their number for those at the end or beyond.
      rest: the parts of that row that are beyond the edge.
    """

    cell: Int64[np.ndarray, "h+1"]
    rest: Float64[np.ndarray, "h+1"]

    @classmethod
    def of(cls, h: int, scaled: int, start: int, count: int) -> "_Rows":
        at = np.clip(np.arange(h + 1) * scaled - start * h, 0, count * h)
        return cls(at // h, (h - at % h).astype(np.float64))

    def reach(self, top: int, bottom: int) -> tuple[int, int]:
        """The range of target rows that overlap the rows from top up to before bottom."""
        # An edge between two target rows has the whole of the next one beyond it.
        is_within = self.rest[bottom] < len(self.rest) - 1
        return int(self.cell[top]), int(self.cell[bottom]) + int(is_within)


class _Columns(NamedTuple):
    """Target columns that each source column overlaps, k at most; a target column has w parts.

    Attributes:
      first: the first of them; those that follow may lie beyond the last target column.
      stop: the number after the last.
      share: the parts of each that are this column's; 0 where it has none.
    """

    first: Int64[np.ndarray, "w"]
    stop: Int64[np.ndarray, "w"]
    share: Float64[np.ndarray, "k w"]

    @classmethod
    def of(cls, w: int, scaled: int, start: int, count: int) -> "_Columns":
        at = np.clip(np.arange(w + 1) * scaled - start * w, 0, count * w)
        first, stop = at[:-1] // w, -(-at[1:] // w)
        cell = first + np.arange(max(int((stop - first).max()), 1))[:, None]
        share = np.minimum((cell + 1) * w, at[1:]) - np.maximum(cell * w, at[:-1])
        return cls(first, stop, np.maximum(share, 0).astype(np.float64))

    def reach(self, left: int, right: int) -> tuple[int, int]:
        """The range of target columns that overlap the columns from left to right, inclusive."""
        return int(self.first[left]), int(self.stop[right])


def _segments(
    runs: Int64[np.ndarray, "r"], h: int
) -> tuple[Int64[np.ndarray, "s"], Int64[np.ndarray, "2 s"]]:
    """The mask's pieces of columns, in order: the column, its first row and the one after."""
    bounds = np.cumsum(runs)
    ends = np.stack([bounds[: runs.size // 2 * 2 : 2], bounds[1::2]])
    inked = ends[1] > ends[0]
    if not inked.all():
        ends = ends[:, inked]
    column = ends[0] // h
    num_columns = (ends[1] - 1) // h - column + 1
    if (num_columns > 1).any():
        # A run over several columns: cut below each.
        first = np.cumsum(num_columns) - num_columns
        column = np.repeat(column - first, num_columns) + np.arange(num_columns.sum())
        ends = np.repeat(ends, num_columns, axis=1)
        ends = np.clip(ends, column * h, (column + 1) * h)
    return column, ends - column * h


def resample(
    runs: Int64[np.ndarray, "r"],
    hw: tuple[int, int],
    scaled_hw: tuple[int, int],
    crop_yx: tuple[int, int] = (0, 0),
    crop_hw: tuple[int, int] | None = None,
) -> Bool[np.ndarray, "y x"]:
    """One mask on another pixel grid; several of an image share a `Grid`, which says the rest."""
    return Grid(hw, scaled_hw, crop_yx, crop_hw).resample(runs)
