"""Statistics of masks under the losses: padding, extremes and slopes, in every form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.ops.dispatch import Target, tracing_for
from sam_jax.ops.mask_statistics import MASK_STATISTICS, mask_statistics, pixel_terms
from sam_jax.ops.packed_masks import MaskLayout
from sam_jax.ops.tpu import mask_statistics as kernel

OPTIONS: Any = {"alpha": 0.25, "gamma": 2.0}


def test_the_kernel_takes_grids_that_fill_its_registers() -> None:
    assert kernel.supports(MaskLayout((64, 64), 4))
    assert not kernel.supports(MaskLayout((7, 9), 4))


# A grid whose padding has both rows and columns, and is wider than what an enlarged pixel reads.
PADDED = MaskLayout((8, 16), 4)
HEIGHT, WIDTH = PADDED.image_size
AREA = PADDED.area(jnp.array([[HEIGHT - 12, WIDTH - 20]]))
forms = pytest.mark.parametrize("form", MASK_STATISTICS.forms)


def sums_and_gradient(form: str, logits: jax.Array, masks: jax.Array) -> Any:
    """All statistics of low-resolution logits ``[lh, lw]``, and the gradient of a mix of them."""

    def total(logits: jax.Array) -> Any:
        with tracing_for(Target("cpu", kernels="interpret")):
            found = mask_statistics(
                logits[None, None, None], masks, AREA, PADDED, **OPTIONS, implementation=form
            )
        mix = found.focal_sum + 2 * found.soft_area - 3 * found.soft_intersection
        return jnp.sum(mix), found

    (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
    return *found, gradient


def random_case() -> tuple[np.ndarray, jax.Array]:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 4, (HEIGHT // 4, WIDTH // 4)).astype(np.float32)
    return logits, PADDED.of_masks(jnp.asarray(rng.random((1, 1, HEIGHT, WIDTH)) < 0.4))


@forms
def test_nothing_comes_of_logits_on_the_padding(form: str) -> None:
    logits, masks = random_case()
    expected = sums_and_gradient(form, jnp.asarray(logits), masks)
    # Pixels at the image's end read one number beyond it.
    rows, columns = (HEIGHT - 12) // 4 + 1, (WIDTH - 20) // 4 + 1
    logits[rows:], logits[:, columns:] = np.inf, np.nan
    logits[rows:, columns:] = -np.inf
    found = sums_and_gradient(form, jnp.asarray(logits), masks)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@forms
def test_infinite_logits_that_are_right_cost_nothing(form: str) -> None:
    """Background everywhere, and a block of it, padding among it, beyond any doubt."""
    logits = -np.ones((HEIGHT // 4, WIDTH // 4), np.float32)
    nothing = PADDED.of_masks(jnp.zeros((1, 1, HEIGHT, WIDTH), bool))
    logits[10:, 20:] = -200.0
    expected = sums_and_gradient(form, jnp.asarray(logits), nothing)
    logits[12:, 22:] = -np.inf
    found = sums_and_gradient(form, jnp.asarray(logits), nothing)
    assert all(np.isfinite(x).all() for x in found)
    # Only what lies between the two blocks' values can tell infinity from 200.
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)


EXTREMES = [0.0, -0.0, 1e-30, 1e-8, 0.3, 1.0, 17.0, 88.0, 104.0, 1e4, 1e30]
LOGITS = np.array(EXTREMES + [-x for x in EXTREMES])


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("on_mask", [True, False])
def test_single_pixels_are_the_closed_form(on_mask: bool, gamma: float) -> None:
    """Values and slopes; at 0, both sides of every kink agree, so there is a slope."""
    alpha = 0.25
    weight = alpha if on_mask else 1 - alpha
    sign = -1 if on_mask else 1
    against = sign * LOGITS
    with np.errstate(over="ignore"):
        missed, kept = 1 / (1 + np.exp(-against)), 1 / (1 + np.exp(against))
    cross_entropy = np.logaddexp(0, against)
    with np.errstate(invalid="ignore", over="ignore"):
        slope = weight * missed**gamma * (gamma * kept * cross_entropy + missed) * sign

    def focal(value: Any) -> Any:
        return pixel_terms(value, jnp.array(on_mask), alpha=alpha, gamma=gamma)[0]

    def probability(value: Any) -> Any:
        return pixel_terms(value, jnp.array(on_mask), alpha=alpha, gamma=gamma)[1]

    values = jnp.asarray(LOGITS, jnp.float32)
    close = {"rtol": 2e-6, "atol": 1e-12}
    np.testing.assert_allclose(
        jax.vmap(focal)(values), weight * missed**gamma * cross_entropy, **close
    )
    np.testing.assert_allclose(jax.vmap(jax.grad(focal))(values), slope, rtol=1e-5, atol=1e-12)
    sigmoid = kept if on_mask else missed
    np.testing.assert_allclose(jax.vmap(probability)(values), sigmoid, **close)
    slopes = jax.vmap(jax.grad(probability))(values)
    np.testing.assert_allclose(slopes, missed * kept, rtol=1e-5, atol=1e-12)


def test_slopes_at_zero_are_the_kernels() -> None:
    _, masks = random_case()
    zeros = jnp.zeros((HEIGHT // 4, WIDTH // 4))
    found, expected = (sums_and_gradient(form, zeros, masks) for form in MASK_STATISTICS.forms)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    # All off the mask: sixteen pixels of a slope of 0.2237 each, and twice the sigmoid's, 1 / 4.
    nothing = jnp.zeros_like(masks)
    gradient = sums_and_gradient("reference", zeros, nothing)[-1]
    assert gradient[3, 5] == pytest.approx(16 * (0.2237 + 2 / 4), rel=1e-3)
