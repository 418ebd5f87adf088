import cv2
import hypothesis
import hypothesis.extra.numpy as st_numpy
import hypothesis.strategies as st
import numpy as np
import pytest
from scipy import ndimage

from sam_jax.evaluation.clicks import Click, center_click, correction_click, random_click

masks = st_numpy.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))


def squared_depths(region):
    """Squared distance of each pixel to the nearest one outside the region or the image."""
    h, w = region.shape
    padded = np.pad(region, 1)
    outside = np.argwhere(~padded)
    depths = np.zeros((h, w), int)
    for y, x in np.argwhere(region):
        depths[y, x] = ((outside - (y + 1, x + 1)) ** 2).sum(axis=1).min()
    return depths


def first_deepest(depths):
    h, w = depths.shape
    best = max((depths[y, x], -y, -x) for y in range(h) for x in range(w))
    return best[0], -best[2], -best[1]


@hypothesis.given(masks)
def test_center_click_is_the_first_deepest_pixel(mask):
    depth, x, y = first_deepest(squared_depths(mask))
    if depth == 0:
        with pytest.raises(ValueError, match="empty"):
            center_click(mask)
    else:
        assert center_click(mask) == Click(x, y, is_foreground=True)


@hypothesis.given(st.data())
def test_correction_click_follows_the_protocol(data):
    truth = data.draw(masks)
    prediction = data.draw(st_numpy.arrays(bool, truth.shape))
    h, w = truth.shape
    pixels = st.tuples(st.integers(0, w - 1), st.integers(0, h - 1))
    previous = [Click(x, y, bool(truth[y, x])) for x, y in data.draw(st.lists(pixels, max_size=4))]

    missed, spurious = squared_depths(truth & ~prediction), squared_depths(prediction & ~truth)
    for click in previous:
        missed[click.y, click.x] = spurious[click.y, click.x] = 0
    (missed_depth, *of_missed), (spurious_depth, *of_spurious) = map(
        first_deepest, (missed, spurious)
    )
    if missed_depth == spurious_depth == 0:
        expected = None
    elif missed_depth > spurious_depth:
        expected = Click(of_missed[0], of_missed[1], is_foreground=True)
    else:
        expected = Click(of_spurious[0], of_spurious[1], is_foreground=False)
    assert correction_click(truth, prediction, previous) == expected


def test_click_coordinates_are_column_then_row():
    mask = np.zeros((20, 40), bool)
    mask[3:8, 21:32] = True
    # Depth 3 along the middle row, from column 23 on; the first of them counts.
    assert center_click(mask) == Click(x=23, y=5, is_foreground=True)


def test_the_image_border_is_a_boundary():
    # Without it, the deepest pixel of a full image would be undefined.
    assert center_click(np.ones((5, 9), bool)) == Click(2, 2, is_foreground=True)


def test_equally_deep_errors_give_a_background_click():
    truth, prediction = np.zeros((2, 9, 9), bool)
    truth[1:4, 1:4] = prediction[5:8, 5:8] = True
    assert correction_click(truth, prediction, []) == Click(6, 6, is_foreground=False)


def test_clicked_pixels_are_not_clicked_again():
    truth, prediction = np.zeros((2, 9, 9), bool)
    truth[2:7, 2:7] = True
    click = correction_click(truth, prediction, [Click(4, 4, is_foreground=True)])
    # The centre was clicked; the first of the eight pixels around it is next.
    assert click == Click(3, 3, is_foreground=True)


def test_nothing_is_left_to_say_about_a_perfect_prediction():
    truth = np.eye(6, dtype=bool)
    assert correction_click(truth, truth.copy(), []) is None


def test_nothing_is_left_to_say_where_every_error_was_clicked():
    truth, prediction = np.zeros((2, 4, 4), bool)
    truth[1, 2] = True
    assert correction_click(truth, prediction, [Click(2, 1, is_foreground=True)]) is None


def test_ties_do_not_depend_on_the_last_bits_of_distances(monkeypatch):
    # A square frame has many equally deep pixels; OpenCV's rounding differs with the alignment.
    mask = np.zeros((150, 150), bool)
    mask[10:140, 10:140] = True
    mask[52:98, 52:98] = False
    expected = center_click(mask)
    transform = cv2.distanceTransform
    for seed in range(5):
        rng = np.random.default_rng(seed)

        def imprecise(*args, rng=rng):
            exact = transform(*args)
            return exact * (1 + rng.uniform(-2e-7, 2e-7, exact.shape)).astype(np.float32)

        monkeypatch.setattr(cv2, "distanceTransform", imprecise)
        assert center_click(mask) == expected


def test_center_click_on_a_large_mask():
    ys, xs = np.ogrid[:900, :1400]
    mask = (np.abs(xs - 800) / 500 + np.abs(ys - 420) / 400 <= 1) & (ys > 100)
    depths = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    assert center_click(mask)[:2] == first_deepest_of_image(depths)


def first_deepest_of_image(depths):
    y, x = divmod(int(np.rint(depths**2).argmax()), depths.shape[1])
    return x, y


@hypothesis.given(masks, st.text(max_size=8))
def test_random_click_lies_on_the_mask_and_follows_from_its_key(mask, key):
    if not mask.any():
        with pytest.raises(ValueError, match="empty"):
            random_click(mask, key)
        return
    click = random_click(mask, key)
    assert mask[click.y, click.x]
    assert click.is_foreground
    assert random_click(mask.copy(), key) == click


def test_random_clicks_are_uniform_over_the_mask():
    mask = np.zeros((7, 5), bool)
    places = [(0, 0), (3, 1), (4, 6), (2, 2)]
    for x, y in places:
        mask[y, x] = True
    clicks = [random_click(mask, f"0/shapes/{index}/0")[:2] for index in range(2000)]
    # Five standard deviations of a binomial count with a rate of a quarter; the draw is fixed.
    for place in places:
        assert abs(clicks.count(place) - 500) < 97
