"""Size, centre and convexity of masks, from their run lengths: no pixel is ever drawn."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from sam_jax.arrays import Float, Int


class MaskShapes(NamedTuple):
    """Measures of masks of one image, none of which is empty.

    Attributes:
      area_px: their pixels.
      center_xy: their centroids, ``(x, y)`` in pixels from the image's corner: the middle of the
        first pixel is (0.5, 0.5).
      hull_px: pixels whose middles lie in the convex hull of the middles of a mask's own, edges
        included.
    """

    area_px: Int[np.ndarray, "k"]
    center_xy: Float[np.ndarray, "k 2"]
    hull_px: Int[np.ndarray, "k"]

    @property
    def concavity(self) -> Float[np.ndarray, "k"]:
        """1 - area / hull, in [0, 1): 0 for whatever a convex shape becomes on a grid of pixels.

        That is why the hull is counted in pixels. The polygon around the corners of pixels has a
        larger area than the staircase of any slanted edge, which would call small disks and thin
        diagonals concave.

        Source: Kirillov et al. 2023, section 5, which does not say how a hull's area is measured.
        """
        return 1 - self.area_px / self.hull_px


def mask_shapes(runs: Sequence[Int[np.ndarray, "_"]], hw: tuple[int, int]) -> MaskShapes:
    """The measures of some masks; centroids are rounded once, all else is exact.

    Args:
      runs: at least one mask's, from ``rle.run_lengths``, for an image of ``hw``.
      hw: height and width of the image.

    Raises:
      ValueError: a mask is empty.
    """
    mask, x, top, end = _column_runs(runs, hw)
    is_first = np.diff(mask, prepend=-1) > 0
    first = np.flatnonzero(is_first)
    if first.size < len(runs):
        raise ValueError("an empty mask has no shape")
    length = end - top
    area = np.add.reduceat(length, first)
    # Twice the sums of pixels' middles, which are whole numbers.
    twice_sums = np.stack([length * (2 * x + 1), length * (top + end)], axis=1)
    center = np.add.reduceat(twice_sums, first, axis=0) / (2 * area[:, None])
    # Of each column the first and the last pixel: all others lie between those.
    is_top = is_first | (np.diff(x, prepend=-1) != 0)
    is_bottom = np.append(is_top[1:], True)
    points = np.empty((np.count_nonzero(is_top), 2, 2), np.int32)
    points[:, :, 0] = x[is_top, None]
    points[:, 0, 1] = top[is_top]
    points[:, 1, 1] = end[is_bottom] - 1
    first_column = np.flatnonzero(is_first[is_top])
    of_masks = np.split(points.reshape(-1, 2), 2 * first_column[1:])
    return MaskShapes(area, center, lattice_hulls_px(of_masks))


def lattice_hulls_px(points: Sequence[Int[np.ndarray, "_ 2"]]) -> Int[np.ndarray, "k"]:
    """The numbers of points with whole coordinates in the convex hulls of some, edges included.

    By Pick's theorem that is the hull's area, half the points on its edges, and 1: also where the
    hull is a line or a point.

    Args:
      points: of at least one hull; int32, as OpenCV takes them.
    """
    hulls = [cv2.convexHull(of_one)[:, 0] for of_one in points]
    vertices = np.concatenate(hulls).astype(np.int64)
    sizes = np.array([len(hull) for hull in hulls])
    last = np.cumsum(sizes) - 1
    first = last - sizes + 1
    following = np.roll(vertices, -1, axis=0)
    following[last] = vertices[first]
    step = np.abs(following - vertices)
    on_edges = np.gcd(step[:, 0], step[:, 1])
    cross = vertices[:, 0] * following[:, 1] - vertices[:, 1] * following[:, 0]
    twice_area = np.abs(np.add.reduceat(cross, first))
    return (twice_area + np.add.reduceat(on_edges, first)) // 2 + 1


def _column_runs(
    runs: Sequence[Int[np.ndarray, "_"]], hw: tuple[int, int]
) -> tuple[Int[np.ndarray, "n"], ...]:
    """The foreground in runs within one column each: mask, column, first row, row after the last.

    They come mask by mask and column by column.
    """
    height, width = hw
    num_runs = [len(of_one) for of_one in runs]
    # The masks lie side by side in one image; the runs of each fill its part of it.
    bounds = np.cumsum(np.concatenate(runs))
    ends_of_all = np.cumsum(num_runs)
    place = np.arange(bounds.size) - np.repeat(ends_of_all - num_runs, num_runs)
    is_object = (place % 2 == 1) & (np.diff(bounds, prepend=0) > 0)
    ends = bounds[is_object]
    begins = bounds[np.flatnonzero(is_object) - 1]
    column, top = np.divmod(begins, height)
    is_long = ends - column * height > height
    if not is_long.any():
        mask, x = np.divmod(column, width)
        return mask, x, top, ends - column * height
    num_columns = np.where(is_long, (ends - 1) // height - column + 1, 1)
    run = np.repeat(np.arange(begins.size), num_columns)
    step = np.arange(run.size) - np.repeat(np.cumsum(num_columns) - num_columns, num_columns)
    column = column[run] + step
    top = np.where(step == 0, top[run], 0)
    end = np.minimum(ends[run] - column * height, height)
    mask, x = np.divmod(column, width)
    return mask, x, top, end
