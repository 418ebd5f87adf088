"""The simulated user: every distribution is the paper's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sam_jax.ops.packed_masks import MaskLayout
from sam_jax.simulated_user import PromptConfig, error_click, mask_round_of, noisy_box

# With fixed keys, a test either always passes or always fails; a right implementation fails for
# one key in ten thousand.
ALPHA = 1e-4


# 50 rows by 80 columns inside an image of 120 x 200.
BOX = (60, 30, 139, 79)


def boxes_of(box, num_samples, config=PromptConfig(), image_hw=(120, 200)):
    keys = jax.random.split(jax.random.key(0), num_samples)
    box, image_hw = jnp.array(box, jnp.float32), jnp.array(image_hw)
    boxes = jax.jit(jax.vmap(lambda key: noisy_box(key, box, image_hw, config)))
    return np.asarray(boxes(keys))


def clicks_of(predicted, masks, area, num_samples, seed=0):
    """Clicks ``[num_samples, 2]`` and labels for an object of booleans ``[h, w]``."""
    mask_layout = MaskLayout((masks.shape[0] // 4, masks.shape[1] // 4), 1)
    pack = jax.jit(mask_layout.of_masks)
    packed_masks = [pack(jnp.asarray(x)) for x in (predicted ^ masks, masks, area)]
    keys = jax.random.split(jax.random.key(seed), num_samples)
    clicks = jax.jit(jax.vmap(lambda key: error_click(key, *packed_masks, mask_layout)))
    coords, labels = clicks(keys)
    return np.asarray(coords), np.asarray(labels)


def test_box_noise_is_normal_with_a_tenth_of_the_side():
    noise = boxes_of(BOX, 4000) - BOX
    for axis, side in zip(noise.T, (80, 50, 80, 50), strict=True):
        assert stats.kstest(axis, stats.norm(0, 0.1 * side).cdf).pvalue > ALPHA
    correlation = np.corrcoef(noise.T) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(4000)


def test_box_noise_is_clipped():
    noise = boxes_of(BOX, 4000, PromptConfig(box_noise_max_px=4.0)) - BOX
    assert np.abs(noise).max() == pytest.approx(4.0, abs=1e-4)
    # A normal deviate of 8 pixels' deviation is beyond 4 pixels 61.7 % of the time.
    clipped = np.mean(np.abs(noise[:, 0]) > 4 - 1e-4)
    assert stats.binomtest(round(clipped * 4000), 4000, 2 * stats.norm.sf(0.5)).pvalue > ALPHA


def test_boxes_stay_inside_the_unpadded_image():
    boxes = boxes_of((0, 0, 49, 39), 500, image_hw=(42, 51))
    assert boxes.min() == 0
    assert boxes[:, [0, 2]].max() == 50
    assert boxes[:, [1, 3]].max() == 41


@pytest.mark.parametrize(
    "box",
    [(60, 30, 60, 79), (60, 30, 139, 30), (60, 30, 60, 30), (60, 30, 61, 31), (0, 0, 0, 39)],
    ids=["column", "row", "pixel", "two-pixels", "edge"],
)
def test_noise_never_swaps_the_corners_of_narrow_boxes(box):
    """A column of pixels has a side of one, so its edges move by a tenth of a pixel each."""
    boxes = boxes_of(box, 2000)
    assert (boxes[:, :2] <= boxes[:, 2:]).all()
    # The corners in order: of two deviates the smaller lies 0.56 deviations below their mean.
    sides = np.array(box[2:]) - box[:2] + 1
    inside = np.array(box[:2]) > 0
    means = np.where(sides == 1, 0.1 * sides / np.sqrt(np.pi), 0)
    offsets = np.abs((boxes[:, :2] - box[:2]).mean(0) + means)
    assert (offsets[inside & (sides != 2)] < 0.2 * sides[inside & (sides != 2)] / 40).all()


def test_clicks_are_uniform_over_the_error_region():
    masks = np.zeros((12, 16), bool)
    masks[2:8, 3:9] = True
    predicted = np.zeros((12, 16), bool)
    predicted[5:11, 6:14] = True
    errors = masks ^ predicted
    coords, labels = clicks_of(predicted, masks, np.ones((12, 16), bool), 20_000, seed=3)
    x, y = coords.T
    counts = np.zeros((12, 16), int)
    np.add.at(counts, (y, x), 1)
    assert counts[~errors].sum() == 0
    assert stats.chisquare(counts[errors]).pvalue > ALPHA
    # A missed pixel is clicked as foreground, a wrongly included one as background.
    np.testing.assert_array_equal(labels, masks[y, x])


def test_clicks_never_fall_on_the_padding():
    predicted, nothing, area = (np.zeros((12, 12), bool) for _ in range(3))
    predicted[:], area[:6, :7] = True, True
    coords, labels = clicks_of(predicted, nothing, area, 300)
    np.testing.assert_array_equal(coords.max(0), [6, 5])
    assert not labels.any()


def test_a_perfect_prediction_gets_a_background_click():
    masks = np.zeros((8, 12), bool)
    masks[2:5, 3:6] = True
    area = np.ones((8, 12), bool)
    area[:, 11] = False
    coords, labels = clicks_of(masks, masks, area, 500)
    assert not labels.any()
    assert not masks[coords[:, 1], coords[:, 0]].any()
    assert coords[:, 0].max() == 10
    assert len(np.unique(coords, axis=0)) > 70


def test_a_perfect_prediction_of_everything_is_clicked_in_the_corner():
    everything = np.ones((4, 4), bool)
    coords, labels = clicks_of(everything, everything, everything, 2)
    assert labels.all()
    assert not coords.any()


def test_the_mask_only_round_is_uniform_over_its_places():
    config = PromptConfig()
    rounds = np.asarray(
        jax.vmap(lambda key: mask_round_of(key, config))(jax.random.split(jax.random.key(1), 9000))
    )
    # Round 0 is the first prompt and round 10 the last mask-only one.
    values, counts = np.unique(rounds, return_counts=True)
    np.testing.assert_array_equal(values, np.arange(1, 10))
    assert stats.chisquare(counts).pvalue > ALPHA


def test_the_paper_has_eleven_rounds_and_nine_points():
    assert PromptConfig().num_rounds == 11
    assert PromptConfig().num_points == 9


def test_no_mask_only_round():
    config = PromptConfig(random_mask_round=False, final_mask_round=False)
    assert config.num_rounds == 9
    assert mask_round_of(jax.random.key(0), config) == -1
