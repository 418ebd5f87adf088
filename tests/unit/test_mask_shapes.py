"""Areas, centres and hulls of masks from their run lengths, against masks that are drawn."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from scipy.spatial import ConvexHull, QhullError

from sam_jax import rle
from sam_jax.mask_shapes import lattice_hulls_px, mask_shapes
from tests.unit.data_fixtures import compress


def shapes_of(*masks):
    return mask_shapes([rle.run_lengths(compress(m)) for m in masks], masks[0].shape)


def drawn_hull_px(mask):
    """Pixels within the hull that Qhull finds; a line's are counted along it."""
    points = np.argwhere(mask)
    try:
        sides = ConvexHull(points).equations
    except QhullError:
        # A point or a line: pixels of the frame between its ends and on it.
        first, last = points[0], points[-1]
        step = last - first
        return int(np.gcd.reduce(step)) + 1
    everywhere = np.argwhere(np.ones_like(mask))
    inside = everywhere @ sides[:, :-1].T + sides[:, -1] <= 1e-9
    return int(inside.all(axis=1).sum())


def disk(radius, hw=(64, 80), center=(30.0, 33.0)):
    y, x = np.mgrid[: hw[0], : hw[1]]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2


def rectangle(hw, y0, y1, x0, x1):
    mask = np.zeros(hw, bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize("radius", [0, 1, 2.5, 4, 9, 20.3])
@pytest.mark.parametrize("center", [(30.0, 33.0), (30.5, 33.25)])
def test_disks_of_any_size_are_convex(radius, center):
    mask = disk(max(radius, 0.8), center=center)
    shapes = shapes_of(mask)
    assert shapes.hull_px[0] == shapes.area_px[0] == mask.sum()
    assert shapes.concavity[0] == 0


@pytest.mark.parametrize(
    "pixels",
    [
        [(0, 0)],
        [(7, 9)],
        [(3, x) for x in range(10)],
        [(y, 0) for y in range(8)],
        [(i, i) for i in range(8)],
        [(2 + i, 9 - i) for i in range(6)],
        [(i // 2, i) for i in range(10)],
    ],
    ids=["first", "last", "row", "whole column", "diagonal", "other diagonal", "staircase"],
)
def test_pixels_and_lines_one_pixel_wide_are_convex(pixels):
    mask = np.zeros((8, 10), bool)
    for y, x in pixels:
        mask[y, x] = True
    shapes = shapes_of(mask)
    assert shapes.area_px.tolist() == shapes.hull_px.tolist() == [len(pixels)]
    expected = np.mean(pixels, axis=0)[::-1] + 0.5
    np.testing.assert_allclose(shapes.center_xy, [expected], rtol=1e-14)


def test_an_l_a_ring_and_two_parts_by_hand():
    corner = rectangle((12, 12), 0, 10, 0, 2) | rectangle((12, 12), 8, 10, 0, 10)
    ring = rectangle((12, 12), 1, 10, 1, 10) & ~rectangle((12, 12), 4, 7, 4, 7)
    parts = rectangle((12, 12), 0, 1, 0, 1) | rectangle((12, 12), 0, 1, 11, 12)
    shapes = shapes_of(corner, ring, parts)
    # The L's hull is its square but for the pixels above the line from (1, 0) to (9, 8).
    assert shapes.area_px.tolist() == [36, 72, 2]
    assert shapes.hull_px.tolist() == [100 - 8 * 9 // 2, 81, 12]
    np.testing.assert_allclose(shapes.concavity, [1 - 36 / 64, 1 - 72 / 81, 1 - 2 / 12])
    np.testing.assert_allclose(shapes.center_xy[1:], [[5.5, 5.5], [6.0, 0.5]])


@hypothesis.given(
    st_np.arrays(
        bool,
        st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
        elements=st.booleans(),
    )
)
def test_any_masks_are_measured_as_they_are_drawn(masks):
    masks = masks[masks.any(axis=(1, 2))]
    hypothesis.assume(len(masks))
    shapes = shapes_of(*masks)
    for mask, area, center, hull in zip(masks, *shapes, strict=True):
        assert area == mask.sum()
        np.testing.assert_allclose(center, np.argwhere(mask).mean(axis=0)[::-1] + 0.5, rtol=1e-13)
        assert hull == drawn_hull_px(mask)


def test_runs_over_several_columns_and_of_no_length():
    runs = np.array([2, 7, 0, 3, 0, 0, 8])  # pixels 2 to 11 of columns of 4
    mask = np.zeros(20, bool)
    mask[2:12] = True
    mask = mask.reshape(5, 4).T
    shapes = mask_shapes([runs, np.array([0, 20])], (4, 5))
    assert shapes.area_px.tolist() == [10, 20]
    assert shapes.hull_px.tolist() == [drawn_hull_px(mask), 20]
    np.testing.assert_allclose(shapes.center_xy[1], [2.5, 2.0])


def test_the_largest_images_do_not_overflow():
    side = 65_535
    # The first and the last pixel of the image, and its whole.
    corners = np.array([0, 1, side * side - 2, 1])
    shapes = mask_shapes([corners, np.array([0, side * side])], (side, side))
    assert shapes.hull_px.tolist() == [side, side * side]
    np.testing.assert_allclose(shapes.center_xy, [[side / 2, side / 2]] * 2)
    triangle = np.array([[0, 0], [side - 1, 0], [0, side - 1]], np.int32)
    assert lattice_hulls_px([triangle]).tolist() == [side * (side + 1) // 2]


def test_an_empty_mask_is_refused():
    with pytest.raises(ValueError, match="no shape"):
        mask_shapes([np.array([0, 4]), np.array([4])], (2, 2))
    with pytest.raises(ValueError, match="no shape"):
        mask_shapes([np.array([4, 0])], (2, 2))
