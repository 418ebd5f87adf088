"""The losses of promptable segmentation, per mask candidate, in float32."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from sam_jax.arrays import Array, Bool, Float
from sam_jax.errors import ConfigError
from sam_jax.ops.masks import mask_iou
from sam_jax.ops.resize import resize_bilinear


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and shape of the losses; the defaults are the paper's where it states them.

    Attributes:
      focal_weight, dice_weight, iou_weight: factors of the three parts.
      focal_alpha, focal_gamma: the focal loss; the paper is silent, these are SAM 2's.
      all_iou_predictions: whether every candidate's predicted IoU is regressed, as in SAM 2, or
        only that of the candidate with the lowest mask loss. In a short run the others' predictions
        are otherwise noise, and the choice between candidates with them.
      prompts_per_chunk: objects whose full-resolution logits exist at once. At 1024 x 1024 one
        object's three candidates take 12 MB in float32, and several times that in the backward
        pass. None takes all at once.
    """

    focal_weight: float = 20.0
    dice_weight: float = 1.0
    iou_weight: float = 1.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    all_iou_predictions: bool = False
    prompts_per_chunk: int | None = None


@flax.struct.dataclass
class MaskLosses:
    """Loss parts and IoU of each candidate.

    Attributes:
      focal: mean focal loss over the image's pixels.
      dice: dice loss, in [0, 1].
      iou: true intersection over union of the thresholded mask, in [0, 1]; no gradient.
    """

    focal: Float[Array, "b p m"]
    dice: Float[Array, "b p m"]
    iou: Float[Array, "b p m"]


def focal_loss(
    logits: Float[Array, "*#batch h w"],
    masks: Bool[Array, "*#batch h w"],
    area: Bool[Array, "*#batch h w"],
    *,
    alpha: float,
    gamma: float,
) -> Float[Array, "*#batch"]:
    """Mean over the pixels of ``area`` of the sigmoid focal loss.

    Equal to optax's, which is an order of magnitude slower here: this is the one place where a
    training step touches every pixel of every mask, and one exponential and one logarithm serve
    both the cross-entropy and the probability.

    Source: Lin et al. 2017.
    """
    # Against a positive target the logit is negated, so one formula covers both.
    against = jnp.where(masks, -logits, logits)
    decay = jnp.exp(-jnp.abs(against))
    cross_entropy = jnp.maximum(against, 0.0) + jnp.log1p(decay)
    missed = jnp.where(against >= 0, 1.0, decay) / (1.0 + decay)
    per_pixel = jnp.where(masks, alpha, 1.0 - alpha) * missed**gamma * cross_entropy
    return sum_over_area(per_pixel, area) / jnp.maximum(_pixels(area), 1.0)


def dice_loss(
    logits: Float[Array, "*#batch h w"],
    masks: Bool[Array, "*#batch h w"],
    area: Bool[Array, "*#batch h w"],
) -> Float[Array, "*#batch"]:
    """``1 - (2 sum(p t) + 1) / (sum p + sum t + 1)`` over the pixels of ``area``.

    Source: Milletari et al. 2016, with the smoothing of MaskFormer and SAM 2.
    """
    probs = jax.nn.sigmoid(logits)
    inside = masks & area
    total = sum_over_area(probs, area) + _pixels(inside)
    return 1.0 - (2.0 * sum_over_area(probs, inside) + 1.0) / (total + 1.0)


def sum_over_area(
    values: Float[Array, "*#batch h w"], area: Bool[Array, "*#batch h w"]
) -> Float[Array, "*#batch"]:
    """Sums over the pixels of ``area``, as a product, whose operands XLA computes vectorised.

    It would fuse the arithmetic into a sum and run it one pixel at a time on a CPU.
    """
    return jnp.einsum(
        "...hw,...hw->...", values, area.astype(values.dtype), precision=jax.lax.Precision.HIGHEST
    )


def _pixels(area: Bool[Array, "*#batch h w"]) -> Float[Array, "*#batch"]:
    return jnp.sum(area, axis=(-2, -1), dtype=jnp.int32).astype(jnp.float32)


def mask_losses(
    low_res_logits: Float[Array, "b p m lh lw"],
    masks: Bool[Array, "b p h w"],
    area: Bool[Array, "b h w"],
    config: LossConfig,
) -> MaskLosses:
    """Focal loss, dice loss and IoU of every candidate at the resolution of the masks.

    The logits are enlarged first: SA-1B has masks of 100 pixels at 1500, which are one or two
    pixels of the low-resolution logits.
    """

    def of_objects(objects):
        """Objects on the first axis: logits [q, b, m, lh, lw], masks [q, b, h, w]."""
        logits, masks = objects
        logits = resize_bilinear(logits, masks.shape[-2:])
        masks, inside = masks[:, :, None], area[None, :, None]
        return (
            focal_loss(logits, masks, inside, alpha=config.focal_alpha, gamma=config.focal_gamma),
            dice_loss(logits, masks, inside),
            mask_iou((logits > 0) & inside, masks & inside),
        )

    objects = (jnp.swapaxes(low_res_logits, 0, 1), jnp.swapaxes(masks, 0, 1))
    losses = map_objects(of_objects, objects, config.prompts_per_chunk)
    return MaskLosses(*(jnp.swapaxes(x, 0, 1) for x in losses))


def map_objects(function: Callable[[Any], Any], objects: Any, prompts_per_chunk: int | None) -> Any:
    """``function`` of objects on the first axis, some at a time where a chunk size is given.

    Each chunk is computed again in the backward pass, so only low-resolution inputs are kept.
    """
    count = jax.tree.leaves(objects)[0].shape[0]
    if prompts_per_chunk is None or prompts_per_chunk >= count:
        return function(objects)
    if count % prompts_per_chunk:
        raise ConfigError(
            f"losses.prompts_per_chunk = {prompts_per_chunk} does not divide the {count} masks "
            f"per image"
        )
    chunked = jax.tree.map(lambda x: x.reshape(-1, prompts_per_chunk, *x.shape[1:]), objects)
    out = jax.lax.map(jax.checkpoint(function), chunked)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), out)


@flax.struct.dataclass
class RoundLoss:
    """What one round of prompting costs, per object, and what there is to report of it.

    Attributes:
      total: the weighted sum that is minimised.
      focal, dice, iou_error: its unweighted parts, of the candidate with the lowest mask loss (the
        mean over candidates for ``iou_error`` under ``all_iou_predictions``).
    """

    total: Float[Array, "*rounds b p"]
    focal: Float[Array, "*rounds b p"]
    dice: Float[Array, "*rounds b p"]
    iou_error: Float[Array, "*rounds b p"]


def round_loss(
    losses: MaskLosses, iou_predictions: Float[Array, "b p m"], config: LossConfig
) -> RoundLoss:
    """The loss of a round: only the candidate with the lowest mask loss is charged.

    The same candidate's predicted IoU (or every candidate's, see ``LossConfig``) is regressed on
    its true one by squared error.

    Source: Kirillov et al. 2023, appendix A, "Losses".
    """
    mask_loss = config.focal_weight * losses.focal + config.dice_weight * losses.dice
    best = jnp.argmin(jax.lax.stop_gradient(mask_loss), axis=-1, keepdims=True)

    def of_best(x):
        return jnp.take_along_axis(x, best, axis=-1)[..., 0]

    iou_errors = jnp.square(iou_predictions - jax.lax.stop_gradient(losses.iou))
    if config.all_iou_predictions:
        iou_error = jnp.mean(iou_errors, axis=-1)
    else:
        iou_error = of_best(iou_errors)
    return RoundLoss(
        total=of_best(mask_loss) + config.iou_weight * iou_error,
        focal=of_best(losses.focal),
        dice=of_best(losses.dice),
        iou_error=iou_error,
    )
