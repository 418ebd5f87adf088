"""Sums over the pixels of masks of what enlarged logits are worth there.

The logits are enlarged first: SA-1B has masks of 100 pixels at 1500, which are one or two pixels of
the low-resolution logits.
"""

from typing import NamedTuple

import jax.numpy as jnp

from sam_jax.arrays import Array, Bool, Float, Int
from sam_jax.ops.cells import MaskGrid, to_image
from sam_jax.ops.full_precision import EXACT
from sam_jax.ops.resize import enlarge


class MaskSums(NamedTuple):
    """Of each candidate, over the pixels of the image.

    Attributes:
      focal: focal loss of each pixel (Lin et al. 2017).
      probability: sigmoid of the enlarged logits.
      hit: the same, on the pixels of the mask alone.
      errors: words of where enlarged logits are above zero and the mask is not, or the other way.
    """

    focal: Float[Array, "*batch m"]
    probability: Float[Array, "*batch m"]
    hit: Float[Array, "*batch m"]
    errors: Int[Array, "*batch m 16 cells"]


def mask_sums(
    logits: Float[Array, "b p m 16 cells"],
    masks: Int[Array, "b p 16 cells"],
    area: Int[Array, "b 16 cells"],
    mask_grid: MaskGrid,
    *,
    alpha: float,
    gamma: float,
) -> MaskSums:
    """Sums over the pixels of ``area`` of candidates for masks, from enlarged logits.

    Args:
      logits: of candidates, by cells (``ops.cells``).
      masks: words of the true masks.
      area: words of what is image and not padding.
      mask_grid: what the words mean.
      alpha, gamma: of the focal loss.
    """
    on_mask = mask_grid.to_masks(masks)[:, :, None]
    inside = mask_grid.to_masks(area)[:, None, None]
    values = enlarge(to_image(logits, mask_grid.grid), mask_grid.scale)
    # What the padding's logits are is nobody's concern, and infinite ones times zero are NaN.
    values = jnp.where(inside, values, 0.0)
    focal, probability = pixel_terms(values, on_mask, alpha=alpha, gamma=gamma)
    return MaskSums(
        focal=_sum_over(inside, focal),
        probability=_sum_over(inside, probability),
        hit=_sum_over(on_mask & inside, probability),
        errors=mask_grid.of_masks(((values > 0) ^ on_mask) & inside),
    )


def pixel_terms(
    values: Float[Array, "*#batch"], on_mask: Bool[Array, "*#batch"], *, alpha: float, gamma: float
) -> tuple[Float[Array, "*#batch"], Float[Array, "*#batch"]]:
    """Focal loss and probability of single pixels.

    The focal loss is equal to optax's, which is an order of magnitude slower here: this is the one
    place where a training step touches every pixel of every mask, and one exponential and one
    logarithm serve both the cross-entropy and the probability.
    """
    # All is said by the logit's sign and size. Everything asks the same question of the sign, so
    # that a logit of zero is on one side of it everywhere: slopes of absolute values and maxima
    # would each be a mean of both sides', and their product is not the mean of the products.
    is_positive = values >= 0
    size = jnp.where(is_positive, values, -values)
    decay = jnp.exp(-size)
    most = 1.0 / (1.0 + decay)
    least = decay * most
    is_wrong = is_positive ^ on_mask
    cross_entropy = jnp.where(is_wrong, size, 0.0) - jnp.log(most)
    missed = jnp.where(is_wrong, most, least)
    focal = jnp.where(on_mask, alpha, 1.0 - alpha) * power(missed, gamma) * cross_entropy
    return focal, jnp.where(is_positive, most, least)


def power(x: Array, exponent: float) -> Array:
    """``x ** exponent``, as products where that is a whole number."""
    return x ** (int(exponent) if exponent == int(exponent) else exponent)


def _sum_over(
    region: Bool[Array, "*#batch h w"], values: Float[Array, "*#batch h w"]
) -> Float[Array, "*#batch"]:
    """Sums over the pixels of a region, as a product, whose operands XLA computes vectorised.

    It would fuse the arithmetic into a sum and run it one pixel at a time on a CPU.
    """
    return jnp.einsum("...hw,...hw->...", values, region.astype(values.dtype), precision=EXACT)
