"""The simulated user: every distribution is the paper's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sam_jax.prompts import PromptConfig, error_clicks, mask_round_of, masks_at, noisy_boxes

# With fixed keys, a test either always passes or always fails; a right implementation fails for
# one key in ten thousand.
ALPHA = 1e-4


@pytest.fixture
def mask():
    """50 rows by 80 columns inside an image of 120 x 200."""
    mask = np.zeros((120, 200), bool)
    mask[30:80, 60:140] = True
    return jnp.asarray(mask)


def boxes_of(mask, num_samples, config=PromptConfig(), image_hw=(120, 200)):
    masks = jnp.broadcast_to(mask, (1, num_samples, *mask.shape))
    return np.asarray(noisy_boxes(jax.random.key(0), masks, jnp.array([image_hw]), config)[0])


def test_box_noise_is_normal_with_a_tenth_of_the_side(mask):
    noise = boxes_of(mask, 4000) - [60, 30, 139, 79]
    for axis, side in zip(noise.T, (80, 50, 80, 50), strict=True):
        assert stats.kstest(axis, stats.norm(0, 0.1 * side).cdf).pvalue > ALPHA
    correlation = np.corrcoef(noise.T) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(4000)


def test_box_noise_is_clipped(mask):
    noise = boxes_of(mask, 4000, PromptConfig(box_noise_max_px=4.0)) - [60, 30, 139, 79]
    assert np.abs(noise).max() == pytest.approx(4.0, abs=1e-4)
    # A normal deviate of 8 pixels' deviation is beyond 4 pixels 61.7 % of the time.
    clipped = np.mean(np.abs(noise[:, 0]) > 4 - 1e-4)
    assert stats.binomtest(round(clipped * 4000), 4000, 2 * stats.norm.sf(0.5)).pvalue > ALPHA


def test_boxes_stay_inside_the_unpadded_image():
    mask = jnp.zeros((64, 64), bool).at[0:40, 0:50].set(True)
    boxes = boxes_of(mask, 500, image_hw=(42, 51))
    assert boxes.min() == 0
    assert boxes[:, [0, 2]].max() == 50
    assert boxes[:, [1, 3]].max() == 41


def test_clicks_are_uniform_over_the_error_region():
    masks = np.zeros((12, 16), bool)
    masks[2:8, 3:9] = True
    predicted = np.zeros((12, 16), bool)
    predicted[5:11, 6:14] = True
    errors = masks ^ predicted
    num_samples = 20_000
    repeat = (1, num_samples, 12, 16)
    coords, labels = error_clicks(
        jax.random.key(3),
        jnp.broadcast_to(predicted, repeat),
        jnp.broadcast_to(masks, repeat),
        jnp.ones((1, 12, 16), bool),
    )
    x, y = np.asarray(coords[0]).T
    counts = np.zeros((12, 16), int)
    np.add.at(counts, (y, x), 1)
    assert counts[~errors].sum() == 0
    assert stats.chisquare(counts[errors]).pvalue > ALPHA
    # A missed pixel is clicked as foreground, a wrongly included one as background.
    np.testing.assert_array_equal(labels[0], masks[y, x])


def test_clicks_never_fall_on_the_padding():
    predicted = jnp.ones((1, 300, 10, 10), bool)
    area = jnp.zeros((1, 10, 10), bool).at[:, :6, :7].set(True)
    coords, labels = error_clicks(jax.random.key(0), predicted, jnp.zeros_like(predicted), area)
    assert coords[..., 0].max() == 6
    assert coords[..., 1].max() == 5
    assert not labels.any()


def test_a_perfect_prediction_gets_a_background_click():
    masks = jnp.zeros((1, 500, 9, 11), bool).at[:, :, 2:5, 3:6].set(True)
    coords, labels = error_clicks(jax.random.key(0), masks, masks, jnp.ones((1, 9, 11), bool))
    assert not labels.any()
    assert not masks_at(masks, coords).any()
    assert len(np.unique(np.asarray(coords[0]), axis=0)) > 80


def test_a_perfect_prediction_of_everything_is_clicked_as_foreground():
    masks = jnp.ones((1, 2, 4, 4), bool)
    _, labels = error_clicks(jax.random.key(0), masks, masks, jnp.ones((1, 4, 4), bool))
    assert labels.all()


def test_the_mask_only_round_is_uniform_over_its_places():
    config = PromptConfig()
    rounds = np.asarray(mask_round_of(jax.random.key(1), (9000,), config))
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
    assert (np.asarray(mask_round_of(jax.random.key(0), (5,), config)) == -1).all()
