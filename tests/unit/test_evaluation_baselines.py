from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.extra.numpy as st_numpy
import hypothesis.strategies as st
import numpy as np
import pytest

from sam_jax.evaluation.baselines import (
    BOX_BASELINES,
    DISK_RADIUS_RATES,
    best_disk,
    box_mask,
    disk_ious,
    ellipse_mask,
    grabcut_mask,
)
from sam_jax.evaluation.clicks import Click
from sam_jax.evaluation.metrics import mask_iou


def test_box_mask_holds_both_corners():
    expected = np.zeros((5, 8), bool)
    expected[1:4, 2:7] = True
    found = box_mask(np.zeros((5, 8, 3), np.uint8), (2, 1, 6, 3))
    np.testing.assert_array_equal(found, expected)


def test_ellipse_mask_by_hand():
    found = ellipse_mask(np.zeros((5, 8, 3), np.uint8), (1, 0, 6, 3))
    # Half-axes 3 and 2 around (3.5, 1.5): the corners are at (2.5 / 3)^2 + (1.5 / 2)^2 > 1.
    expected = np.zeros((5, 8), bool)
    expected[[0, 3], 2:6] = True
    expected[1:3, 1:7] = True
    np.testing.assert_array_equal(found, expected)


def test_ellipse_fills_pi_quarters_of_its_box():
    found = ellipse_mask(np.zeros((300, 500, 3), np.uint8), (40, 30, 439, 229))
    assert found.sum() / (400 * 200) == pytest.approx(np.pi / 4, abs=1e-3)
    assert ellipse_mask(np.zeros((3, 3, 3), np.uint8), (1, 1, 1, 1)).sum() == 1


@hypothesis.given(st.data())
def test_disk_ious_equal_those_of_drawn_disks(data):
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    truth = data.draw(st_numpy.arrays(bool, shape))
    hypothesis.assume(truth.any())
    x, y = (data.draw(st.integers(0, side - 1)) for side in shape[::-1])
    ys, xs = np.ogrid[: shape[0], : shape[1]]
    squared = (xs - x) ** 2 + (ys - y) ** 2
    ious = disk_ious(truth, Click(x, y, is_foreground=True))
    assert list(ious) == list(DISK_RADIUS_RATES)
    for rate, iou in ious.items():
        assert iou == mask_iou(squared <= rate**2 * shape[0] * shape[1], truth)


def test_best_disk_is_best_on_average_over_datasets():
    low, high = DISK_RADIUS_RATES[3], DISK_RADIUS_RATES[9]
    small = dict.fromkeys(DISK_RADIUS_RATES, 0.0) | {low: 0.9, high: 0.5}
    large = dict.fromkeys(DISK_RADIUS_RATES, 0.0) | {low: 0.1, high: 0.6}
    assert best_disk([small]) == low
    assert best_disk([small, large]) == high


def two_colors(seed=0):
    """A noisy red ellipse on a noisy green ground."""
    rng = np.random.default_rng(seed)
    ys, xs = np.ogrid[:60, :80]
    truth = ((xs - 42) / 16) ** 2 + ((ys - 28) / 11) ** 2 <= 1
    pixels = np.where(truth[..., None], (200, 60, 50), (60, 150, 70))
    noisy = np.clip(pixels + rng.normal(0, 12, (60, 80, 3)), 0, 255)
    return noisy.astype(np.uint8), truth


def test_grabcut_finds_what_differs_in_color():
    pixels, truth = two_colors()
    box = (26, 17, 58, 39)
    iou = mask_iou(grabcut_mask(pixels, box), truth)
    assert iou > 0.97
    assert iou > mask_iou(box_mask(pixels, box), truth) + 0.15


def test_grabcut_is_the_same_in_every_thread():
    pixels, _ = two_colors()
    expected = grabcut_mask(pixels, (20, 10, 64, 46))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: grabcut_mask(pixels, (20, 10, 64, 46)), range(8)):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("box", [(0, 0, 79, 59), (5, 5, 6, 6)])
def test_grabcut_without_enough_pixels_is_the_box(box):
    pixels, _ = two_colors()
    np.testing.assert_array_equal(grabcut_mask(pixels, box), box_mask(pixels, box))


def test_grabcut_survives_an_image_of_one_color():
    found = grabcut_mask(np.full((60, 80, 3), 90, np.uint8), (10, 10, 30, 20))
    assert not (found & ~box_mask(np.zeros((60, 80, 3), np.uint8), (10, 10, 30, 20))).any()


@pytest.mark.parametrize("name", BOX_BASELINES)
def test_no_baseline_leaves_the_box(name):
    pixels, _ = two_colors(seed=1)
    box = (24, 15, 60, 41)
    found = BOX_BASELINES[name].mask(pixels, box)
    assert found.any()
    assert not (found & ~box_mask(pixels, box)).any()
