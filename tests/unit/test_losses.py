"""Losses against optax, closed forms and hand-computed values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sam_jax.configuration import from_mapping
from sam_jax.errors import ConfigError
from sam_jax.losses import (
    LossConfig,
    MaskLosses,
    mask_losses,
    round_loss,
)
from sam_jax.ops.packed_masks import MaskLayout
from sam_jax.ops.resize import resize_bilinear


@functools.partial(jax.jit, static_argnames="config")
def losses_of(logits, masks, area, config=LossConfig()):
    """Losses of logits [b, p, m, lh, lw]; masks [b, p, h, w] and area [b, h, w] are bool."""
    mask_layout = MaskLayout.of((logits.shape[-2] // 4, logits.shape[-1] // 4), masks.shape[-2:])
    packed_masks = (mask_layout.of_masks(jnp.asarray(x)) for x in (masks, area))
    return mask_losses(logits, *packed_masks, mask_layout, config)


def random_case(*batch: int, size: tuple[int, int] = (8, 12), seed: int = 0):
    """Logits and masks of one size, and an area of seven columns."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(0, 4, (*batch, *size)).astype(np.float32))
    masks = jnp.asarray(rng.random((*batch, *size)) < 0.4)
    area = jnp.broadcast_to(jnp.arange(size[1]) < 7, (batch[0], *size))
    return logits, masks, area


def test_focal_loss_is_the_mean_of_optax_over_the_area():
    logits, masks, area = random_case(2, 3)
    per_pixel = optax.losses.sigmoid_focal_loss(
        logits, masks.astype(jnp.float32), alpha=0.25, gamma=2.0
    )
    expected = jnp.mean(per_pixel[..., :7], axis=(-2, -1))
    actual = losses_of(logits[:, :, None], masks, area).focal[..., 0]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_focal_loss_and_its_gradient_survive_extreme_logits():
    logits = jnp.zeros((1, 1, 1, 4, 4)).at[0, 0, 0, :2, :2].set([[1e4, -1e4], [80.0, -80.0]])
    masks = jnp.zeros((1, 1, 4, 4), bool).at[0, 0, :2, :2].set([[False, True], [True, False]])
    area = jnp.zeros((1, 4, 4), bool).at[:, :2, :2].set(True)
    value, grad = jax.value_and_grad(lambda x: losses_of(x, masks, area).focal.sum())(logits)
    # Two pixels are as wrong as can be: 0.75 * 1e4 and 0.25 * 1e4 over four pixels.
    assert value == pytest.approx(1e4 / 4, rel=1e-5)
    assert np.isfinite(grad).all()


def test_dice_loss_by_hand():
    # Probabilities 3/4, 1/2, 9/10, of which the last is padding.
    logits = jnp.zeros((1, 1, 1, 4, 4)).at[0, 0, 0, 0, :3].set(jnp.log(jnp.array([3.0, 1.0, 9.0])))
    masks = jnp.zeros((1, 1, 4, 4), bool).at[0, 0, 0, :3].set([True, False, True])
    area = jnp.zeros((1, 4, 4), bool).at[0, 0, :2].set(True)
    expected = 1 - (2 * 0.75 + 1) / (0.75 + 0.5 + 1 + 1)
    assert losses_of(logits, masks, area).dice[0, 0, 0] == pytest.approx(expected, rel=1e-6)


def test_errors_are_the_wrong_pixels_of_the_area():
    logits, masks, area = random_case(2, 3)
    errors = losses_of(logits[:, :, None], masks, area).errors[:, :, 0]
    expected = ((logits > 0) ^ masks) & area[:, None]
    np.testing.assert_array_equal(MaskLayout((2, 3), 1).to_masks(errors), expected)


def test_a_perfect_prediction_costs_nothing():
    masks = jnp.zeros((1, 1, 16, 24), bool).at[0, 0, 3:9, 5:17].set(True)
    logits = jnp.where(masks, 50.0, -50.0)[:, :, None]
    losses = losses_of(logits, masks, jnp.ones((1, 16, 24), bool))
    np.testing.assert_allclose(losses.focal, 0, atol=1e-6)
    np.testing.assert_allclose(losses.dice, 0, atol=1e-6)
    np.testing.assert_array_equal(losses.iou, 1)


def test_padding_does_not_count():
    logits, masks, area = random_case(2, 3)
    garbage = jnp.where(area[:, None], logits, 77.0)
    kept = losses_of(logits[:, :, None], masks, area)
    with_garbage = losses_of(garbage[:, :, None], masks, area)
    for name in ("focal", "dice", "iou"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(with_garbage, name))


@pytest.mark.parametrize("prompts_per_chunk", [1, 2, 3])
def test_chunks_change_neither_values_nor_gradients(prompts_per_chunk):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(2, 6, 3, 4, 8)).astype(np.float32))
    masks = jnp.asarray(rng.random((2, 6, 16, 32)) < 0.5)
    area = jnp.ones((2, 16, 32), bool)

    def total(logits, config):
        losses = losses_of(logits, masks, area, config)
        return jnp.sum(losses.focal + 2 * losses.dice), (losses.focal, losses.dice, losses.iou)

    differentiated = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    whole = differentiated(logits, LossConfig())
    chunked = differentiated(logits, LossConfig(prompts_per_chunk=prompts_per_chunk))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), whole, chunked
    )


def test_a_chunk_size_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="prompts_per_chunk = 4 does not divide the 6"):
        losses_of(
            jnp.zeros((1, 6, 1, 4, 4)),
            jnp.zeros((1, 6, 8, 8), bool),
            jnp.ones((1, 8, 8), bool),
            LossConfig(prompts_per_chunk=4),
        )


def test_small_masks_exist_at_the_resolution_of_the_loss():
    """A mask of four pixels at full resolution is a sixteenth of one low-resolution pixel's."""
    masks = jnp.zeros((1, 1, 32, 32), bool).at[0, 0, 4:6, 4:6].set(True)
    logits = jnp.full((1, 1, 1, 8, 8), -10.0).at[0, 0, 0, 1, 1].set(10.0)
    area = jnp.ones((1, 32, 32), bool)
    predicted = resize_bilinear(logits, (32, 32)) > 0
    expected = np.sum(predicted & masks[:, :, None]) / np.sum(predicted | masks[:, :, None])
    losses = losses_of(logits, masks, area)
    assert 0 < expected < 1
    assert losses.iou[0, 0, 0] == pytest.approx(expected)


def test_losses_of_low_resolution_are_those_of_reduced_masks():
    logits, _, _ = random_case(2, 3)
    rng = np.random.default_rng(1)
    masks = jnp.asarray(rng.random((2, 3, 32, 48)) < 0.5)
    # Of the last low-resolution column half is padding, of the second row in sight a quarter.
    area = jnp.broadcast_to(
        (jnp.arange(48) < 46)[None, :] & (jnp.arange(32) < 29)[:, None], (2, 32, 48)
    )

    def halves(x):
        return x.reshape(*x.shape[:-2], 8, 4, 12, 4).sum((-3, -1)) >= 8

    low = losses_of(logits[:, :, None], masks, area, LossConfig(resolution="low_res"))
    expected = losses_of(logits[:, :, None], halves(masks & area[:, None]), halves(area))
    for name in ("focal", "dice"):
        np.testing.assert_allclose(getattr(low, name), getattr(expected, name), rtol=1e-5)
    # What is reported and clicked on is at the resolution of the image.
    full = losses_of(logits[:, :, None], masks, area)
    np.testing.assert_array_equal(low.iou, full.iou)
    np.testing.assert_array_equal(low.errors, full.errors)
    assert not np.allclose(low.focal, full.focal, rtol=1e-3)


@pytest.mark.parametrize(("name", "value"), [("resolution", "high"), ("over_rounds", "max")])
def test_unknown_switches_are_refused(name, value):
    with pytest.raises(ConfigError, match=value):
        from_mapping(LossConfig, {name: value}, "losses")


def test_only_the_candidate_with_the_lowest_mask_loss_is_charged():
    losses = MaskLosses(
        focal=jnp.array([[[0.2, 0.1, 0.3]]]),
        dice=jnp.array([[[0.5, 0.9, 0.1]]]),
        iou=jnp.array([[[0.3, 0.6, 0.9]]]),
        errors=jnp.zeros((1, 1, 3, 16, 1), jnp.int32),
    )
    # 20 * focal + dice: 4.5, 2.9, 6.1, so the second one.
    iou_predictions = jnp.array([[[0.0, 0.4, 0.0]]])
    result = round_loss(losses, iou_predictions, LossConfig())
    assert result.focal[0, 0] == pytest.approx(0.1)
    assert result.dice[0, 0] == pytest.approx(0.9)
    assert result.iou_error[0, 0] == pytest.approx(0.04)
    assert result.total[0, 0] == pytest.approx(2.9 + 0.04)
    gradient = jax.grad(lambda x: round_loss(losses, x, LossConfig()).total.sum())(iou_predictions)
    np.testing.assert_allclose(gradient, [[[0, 2 * (0.4 - 0.6), 0]]], rtol=1e-6)


def test_every_predicted_iou_is_regressed_on_request():
    losses = MaskLosses(
        focal=jnp.array([[[0.2, 0.1]]]),
        dice=jnp.array([[[0.5, 0.9]]]),
        iou=jnp.array([[[0.3, 0.6]]]),
        errors=jnp.zeros((1, 1, 2, 16, 1), jnp.int32),
    )
    config = LossConfig(all_iou_predictions=True, iou_weight=2.0)
    result = round_loss(losses, jnp.array([[[0.1, 0.5]]]), config)
    assert result.iou_error[0, 0] == pytest.approx((0.04 + 0.01) / 2)
    assert result.total[0, 0] == pytest.approx(20 * 0.1 + 0.9 + 2 * 0.025)


def test_the_true_iou_is_a_target_and_gets_no_gradient():
    logits, masks, _ = random_case(1, 2, size=(8, 8))
    area = jnp.ones((1, 8, 8), bool)

    def iou_part(logits):
        losses = losses_of(logits[:, :, None], masks, area)
        return round_loss(losses, jnp.zeros((1, 2, 1)), LossConfig()).iou_error.sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(iou_part))(logits), 0)
