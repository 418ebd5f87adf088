"""Statistics of mask candidates over the pixels of the true mask, from which the losses follow.

Logits are enlarged to the resolution of the masks first: SA-1B has masks of 100 pixels at 1500,
which are one or two pixels of the low-resolution logits.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sam_jax.arrays import Array, Bool, Float, Int
from sam_jax.errors import ConfigError
from sam_jax.ops import dispatch
from sam_jax.ops.full_precision import EXACT
from sam_jax.ops.packed_masks import MaskLayout, to_subpixels
from sam_jax.ops.resize import enlarge
from sam_jax.ops.tpu import mask_statistics as kernel


class MaskStatistics(NamedTuple):
    """Sums over the pixels of the image, for each candidate mask.

    Attributes:
      focal_sum: focal losses of the pixels (Lin et al. 2017).
      soft_area: probabilities of the pixels.
      soft_intersection: the same, on the pixels of the true mask alone.
      errors: packed mask of the pixels where the thresholded candidate is wrong.
    """

    focal_sum: Float[Array, "b p m"]
    soft_area: Float[Array, "b p m"]
    soft_intersection: Float[Array, "b p m"]
    errors: Int[Array, "b p m 16 tokens"]


def mask_statistics(
    low_res_logits: Float[Array, "b p m lh lw"],
    packed_masks: Int[Array, "b p 16 tokens"],
    area: Int[Array, "b 16 tokens"],
    mask_layout: MaskLayout,
    *,
    alpha: float,
    gamma: float,
    prompts_per_chunk: int | None = None,
    implementation: str = dispatch.AUTO,
) -> MaskStatistics:
    """Statistics over the pixels of ``area`` of candidates for masks, from enlarged logits.

    Args:
      low_res_logits: of candidates.
      packed_masks: the true masks (``ops.packed_masks``).
      area: packed masks of what is image and not padding.
      mask_layout: of the packed masks.
      alpha, gamma: of the focal loss.
      prompts_per_chunk: objects whose enlarged logits exist at once; None for all. A TPU's kernel
        has no such logits and does not ask.
      implementation: which form computes it.

    Raises:
      ConfigError: if chunks do not divide the objects.
    """
    return MASK_STATISTICS(
        low_res_logits,
        packed_masks,
        area,
        mask_layout=mask_layout,
        alpha=alpha,
        # Powers with a whole exponent are computed as products.
        gamma=int(gamma) if gamma == int(gamma) else gamma,
        prompts_per_chunk=prompts_per_chunk,
        implementation=implementation,
    )


def _reference(
    low_res_logits, packed_masks, area, *, mask_layout, alpha, gamma, prompts_per_chunk=None
):
    def of_objects(low_res_logits, packed_masks):
        """Objects on the first axis, images on the second."""
        on_mask = mask_layout.to_masks(packed_masks)[:, :, None]
        inside = mask_layout.to_masks(area)[:, None]
        # Logits of the padding may be anything, and infinity times zero would be NaN.
        values = jnp.where(inside, enlarge(low_res_logits, mask_layout.scale), 0.0)
        focal, probability = pixel_terms(values, on_mask, alpha=alpha, gamma=gamma)
        return MaskStatistics(
            focal_sum=_sum_over(inside, focal),
            soft_area=_sum_over(inside, probability),
            soft_intersection=_sum_over(on_mask & inside, probability),
            errors=mask_layout.of_masks(((values > 0) ^ on_mask) & inside),
        )

    objects = (jnp.swapaxes(low_res_logits, 0, 1), jnp.swapaxes(packed_masks, 0, 1))
    found = _in_chunks(of_objects, objects, prompts_per_chunk)
    return MaskStatistics(*(jnp.swapaxes(x, 0, 1) for x in found))


def _in_chunks(function: Any, objects: Any, size: int | None) -> Any:
    """``function`` of objects on the first axis, some at a time where a chunk size is given.

    Each chunk is computed again in the backward pass, so only low-resolution inputs are kept.
    """
    count = objects[0].shape[0]
    if size is None or size >= count:
        return function(*objects)
    if count % size:
        raise ConfigError(
            f"losses.prompts_per_chunk = {size} does not divide the {count} masks "
            "of an image on each device"
        )
    chunks = [rearrange(x, "(n c) ... -> n c ...", c=size) for x in objects]
    out = jax.lax.map(jax.checkpoint(lambda chunk: function(*chunk)), chunks)
    return jax.tree.map(lambda x: rearrange(x, "n c ... -> (n c) ..."), out)


def pixel_terms(
    values: Float[Array, "*#batch"], on_mask: Bool[Array, "*#batch"], *, alpha: float, gamma: float
) -> tuple[Float[Array, "*#batch"], Float[Array, "*#batch"]]:
    """Focal loss and probability of single pixels.

    The focal loss is equal to optax's, which is an order of magnitude slower here: this is the one
    place where a training step touches every pixel of every mask, and one exponential and one
    logarithm serve both the cross-entropy and the probability.
    """
    # All terms follow from the logit's sign and magnitude, by one and the same comparison, so that
    # they agree on the side of a zero logit: derivatives of ``abs`` and ``maximum`` would each be
    # the mean of both sides, and the product of means is not the mean of the products.
    is_positive = values >= 0
    size = jnp.where(is_positive, values, -values)
    decay = jnp.exp(-size)
    most = 1.0 / (1.0 + decay)
    least = decay * most
    is_wrong = is_positive ^ on_mask
    cross_entropy = jnp.where(is_wrong, size, 0.0) - jnp.log(most)
    missed = jnp.where(is_wrong, most, least)
    focal = jnp.where(on_mask, alpha, 1.0 - alpha) * missed**gamma * cross_entropy
    return focal, jnp.where(is_positive, most, least)


def _sum_over(
    region: Bool[Array, "*#batch h w"], values: Float[Array, "*#batch h w"]
) -> Float[Array, "*#batch"]:
    """Sums over the pixels of a region, as a product, whose operands XLA computes vectorised.

    It would fuse the arithmetic into a sum and run it one pixel at a time on a CPU.
    """
    return jnp.einsum("...hw,...hw->...", values, region.astype(values.dtype), precision=EXACT)


def _on_tpu(
    low_res_logits, packed_masks, area, *, mask_layout, alpha, gamma, interpret,
    prompts_per_chunk=None,
):  # fmt: skip
    del prompts_per_chunk
    return MaskStatistics(
        *kernel.mask_statistics(
            to_subpixels(low_res_logits),
            packed_masks,
            area,
            mask_layout,
            alpha=alpha,
            gamma=gamma,
            interpret=interpret,
        )
    )


def _examples(dtype: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Logits are float32 whatever the model's type is."""
    del dtype
    rng = np.random.default_rng(0)
    layout = MaskLayout((8, 16), 4)
    logits = jnp.asarray(3 * rng.standard_normal((2, 2, 3, 32, 64)), jnp.float32)
    masks = layout.of_masks(jnp.asarray(rng.random((2, 2, *layout.image_size)) < 0.3))
    area = layout.area(jnp.array([layout.image_size, (100, 200)]))
    return [((logits, masks, area), {"mask_layout": layout, "alpha": 0.25, "gamma": 2})]


MASK_STATISTICS = dispatch.Operation(
    "mask_statistics",
    [
        dispatch.Form(
            "kernel",
            _on_tpu,
            supports=lambda *_, mask_layout, **__: kernel.supports(mask_layout),
            is_kernel=True,
        ),
        dispatch.Form("reference", _reference),
    ],
    examples=_examples,
)
