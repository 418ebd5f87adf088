"""Edge maps of masks, and the three suppressions, on shapes whose edges are known."""

import cv2
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.extra import numpy as arrays

from sam_jax.errors import ConfigError
from sam_jax.evaluation.edges.edge_maps import (
    EdgeMapOptions,
    MaskEdges,
    combined,
    mask_edges,
    quantized,
    sobel_edges,
    strengths_of,
)
from sam_jax.evaluation.edges.suppression import NO_SUPPRESSION, SUPPRESSIONS, suppressed

BOUNDARIES, FRAMES = ("band", "outer"), ("zeros", "reflected")


def whole_map(logits, options):
    """A mask's edges in an image of its size."""
    edges = np.zeros(logits.shape, np.float32)
    found = mask_edges(logits, options)
    edges[found.window] = found.strengths
    return edges


def half_plane(frame, boundary):
    """The left half of an image of 6 x 10 pixels, without doubt."""
    logits = np.where(np.arange(10) < 5, 50, -50) * np.ones((6, 1))
    options = EdgeMapOptions(boundary=boundary, frame=frame)
    return whole_map(logits.astype(np.float32), options)


def test_a_band_covers_both_sides_of_the_outline():
    edges = half_plane("reflected", "band")
    np.testing.assert_allclose(edges[:, 4:6], 4)
    assert np.count_nonzero(edges) == 12


def test_the_outer_boundary_lies_outside():
    edges = half_plane("reflected", "outer")
    np.testing.assert_allclose(edges[:, 5], 4)
    assert np.count_nonzero(edges) == 6


def test_masks_may_end_with_the_frame():
    edges = half_plane("zeros", "band")
    # The left border, where the mask is cut; its rows at the top and the bottom, too.
    np.testing.assert_allclose(edges[1:-1, 0], 4)
    np.testing.assert_allclose(edges[0, 1:4], 4)
    np.testing.assert_allclose(edges[0, 0], np.hypot(3, 3))
    assert not edges[1:-1, 1:4].any()
    # The outer boundary is never inside of the image there.
    assert not half_plane("zeros", "outer")[:, :5].any()


def test_edges_are_as_strong_as_probabilities_are_steep():
    logits = np.where(np.arange(8) < 4, 1, -1) * np.ones((6, 1), np.float32)
    step = 1 / (1 + np.exp(-1)) - 1 / (1 + np.exp(1))
    options = EdgeMapOptions(frame="reflected")
    np.testing.assert_allclose(whole_map(logits.astype(np.float32), options)[:, 3], 4 * step)


@hypothesis.given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(3, 12), st.integers(3, 12)),
        elements=st.floats(-4, 4, width=16),
    ),
    st.sampled_from(BOUNDARIES),
    st.sampled_from(FRAMES),
)
def test_the_part_around_a_mask_is_enough(logits, boundary, frame):
    """The same by filters over the whole image."""
    border = {"zeros": cv2.BORDER_CONSTANT, "reflected": cv2.BORDER_REFLECT_101}[frame]

    def sobel(values):
        values = values.astype(np.float64)
        dx, dy = (cv2.Sobel(values, -1, *order, borderType=border) for order in ((1, 0), (0, 1)))
        return np.hypot(dx, dy)

    mask = logits > 0
    if boundary == "band":
        is_boundary = sobel(mask) > 0
    else:
        is_boundary = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > mask
    expected = np.where(is_boundary, sobel(1 / (1 + np.exp(-logits.astype(np.float64)))), 0)
    found = whole_map(logits, EdgeMapOptions(boundary=boundary, frame=frame))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_map_is_the_same_every_time():
    """To the last bit, wherever its arrays happen to lie in memory."""
    rng = np.random.default_rng(0)
    logits = cv2.GaussianBlur(rng.normal(size=(40, 57)).astype(np.float32), (0, 0), 2)
    found, others = set(), []
    for size in range(1, 60):
        found.add(mask_edges(logits, EdgeMapOptions()).strengths.tobytes())
        others.append(np.empty(37 * size, np.uint8))
    assert len(found) == 1


def part(rows, columns, strengths):
    return MaskEdges((slice(*rows), slice(*columns)), np.array(strengths, np.float32))


def test_the_strongest_edge_of_any_mask_counts():
    of_masks = [part((0, 2), (0, 2), [[1, 2], [3, 0]]), part((1, 2), (0, 3), [[1, 4, 2]])]
    edges = combined(of_masks, (3, 3), EdgeMapOptions())
    np.testing.assert_allclose(edges, np.array([[1, 2, 0], [3, 4, 2], [0, 0, 0]]) / 4)


def test_maps_go_from_zero_to_one():
    edges = combined([part((0, 2), (0, 2), [[1, 2], [3, 5]])], (2, 2), EdgeMapOptions())
    np.testing.assert_allclose(edges, [[0, 0.25], [0.5, 1]])


def test_the_frame_may_be_zeroed_before_the_strongest_is_one():
    edges = np.full((5, 5), 2)
    edges[0, 0] = 9
    options = EdgeMapOptions(zeroed_frame_px=1)
    found = combined([part((0, 5), (0, 5), edges)], (5, 5), options)
    np.testing.assert_array_equal(found, np.pad(np.ones((3, 3)), 1))


def test_without_edges_there_is_nothing():
    empty = mask_edges(np.full((4, 6), -1, np.float32), EdgeMapOptions())
    assert not combined([empty], (4, 6), EdgeMapOptions()).any()
    assert not combined([], (4, 6), EdgeMapOptions()).any()


def test_sobel_of_an_image():
    pixels = np.zeros((5, 6, 3), np.uint8)
    pixels[:, 3:] = 255
    np.testing.assert_allclose(sobel_edges(pixels)[:, 2:4], 4 / np.sqrt(32), rtol=1e-6)
    assert np.count_nonzero(sobel_edges(pixels)) == 10


def test_eight_bits_are_rounded_to_and_come_back():
    edges = np.array([[0, 0.1, 0.499, 1]], np.float32)
    assert quantized(edges).tolist() == [[0, 26, 127, 255]]
    levels = np.arange(256, dtype=np.uint8)[None]
    np.testing.assert_array_equal(quantized(strengths_of(levels).astype(np.float32)), levels)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"points_per_side": 0}, "points_per_side"),
        ({"box_nms_thresh": 1.5}, "box_nms_thresh must be in"),
        ({"boundary": "inner"}, "boundary must be 'band' or 'outer', got 'inner'"),
        ({"frame": "ones"}, "frame must be 'zeros' or 'reflected'"),
        ({"zeroed_frame_px": -1}, "must not be negative"),
    ],
)
def test_impossible_options_are_named(changes, words):
    with pytest.raises(ConfigError, match=words):
        EdgeMapOptions(**changes)


def ridge(angle, size=31):
    """A ramp up and down again across a line through the middle, whose normal has this angle."""
    ys, xs = np.mgrid[:size, :size] - size // 2
    distance = np.cos(angle) * xs + np.sin(angle) * ys
    return np.exp(-(distance**2) / 8).astype(np.float32), np.abs(distance)


@pytest.mark.parametrize("name", SUPPRESSIONS)
@pytest.mark.parametrize("degrees", [0, 30, 45, 89, 120, 135, 160])
def test_of_a_ridge_its_top_stays(name, degrees):
    edges, distance = ridge(np.deg2rad(degrees))
    kept = suppressed(edges, name)
    inner = (slice(7, -7),) * 2
    kept, distance = kept[inner], distance[inner]
    assert (kept[distance > 1.2] == 0).all()
    # Along all of the ridge: a pixel at least in each row or column that it crosses.
    assert (kept > 0.8).sum() >= kept.shape[0] - 1


def test_only_canny_suppresses_level_ridges():
    """Where the mixed derivative is 0 the published formula says that the edge is upright."""
    edges, distance = ridge(np.pi / 2)
    inner = (slice(7, -7), slice(7, -7))
    is_beside = distance[inner] > 1.2
    left = {name: suppressed(edges, name)[inner][is_beside].any() for name in SUPPRESSIONS}
    assert left == {"canny": False, "structured": True, "opencv": True}


def test_canny_leaves_what_it_keeps_as_it_is():
    edges, _ = ridge(0.0)
    kept = suppressed(edges, "canny")
    np.testing.assert_array_equal(kept[:, 15], edges[:, 15])
    assert not np.delete(kept, 15, axis=1).any()


def test_structured_fades_to_the_frame():
    edges, _ = ridge(0.0)
    kept = suppressed(edges, "structured")[:, 15]
    np.testing.assert_allclose(kept[:6], [0, 0.2, 0.4, 0.6, 0.8, 1], rtol=1e-6)
    np.testing.assert_allclose(kept[:-7:-1], [0, 0.2, 0.4, 0.6, 0.8, 1], rtol=1e-6)


def test_structured_favours_a_pixel_over_its_neighbours_and_canny_does_not():
    # Two columns side by side, one of them half a hundredth weaker.
    edges = np.zeros((15, 16), np.float32)
    edges[:, 7], edges[:, 8] = 1, 0.995
    assert suppressed(edges, "structured")[7, 8] > 0
    assert suppressed(edges, "canny")[7, 8] == 0
    edges[:, 8] = 1
    assert suppressed(edges, "canny")[7, 7:9].tolist() == [1, 1]


def test_opencv_looks_two_pixels_far():
    # Two ridges side by side: the weaker one's top lies two pixels from the stronger one's.
    edges = np.zeros((15, 17), np.float32)
    edges[:, 7], edges[:, 9] = 1, 0.8
    assert suppressed(edges, "opencv")[7, 9] == 0
    assert suppressed(edges, "structured")[7, 9] > 0


def test_none_is_none():
    edges, _ = ridge(1.0)
    assert suppressed(edges, NO_SUPPRESSION) is edges


@pytest.mark.parametrize("name", SUPPRESSIONS)
def test_nothing_comes_of_nothing(name):
    assert not suppressed(np.zeros((9, 7), np.float32), name).any()
