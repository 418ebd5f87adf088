"""The losses of promptable segmentation, per mask candidate, in float32."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sam_jax.arrays import Array, Float, Int
from sam_jax.errors import ConfigError
from sam_jax.ops import mask_sums_kernel
from sam_jax.ops.cells import MaskGrid, num_pixels
from sam_jax.ops.mask_sums import MaskSums, mask_sums
from sam_jax.ops.placement import Kernels
from sam_jax.ops.tpu_kernel import WORTH_KEEPING


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and shape of the losses; the defaults are the paper's where it states them.

    Attributes:
      focal_weight, dice_weight, iou_weight: factors of the three parts.
      focal_alpha, focal_gamma: the focal loss; the paper is silent, these are SAM 2's.
      all_iou_predictions: whether every candidate's predicted IoU is regressed, as in SAM 2, or
        only that of the candidate with the lowest mask loss. In a short run the others' predictions
        are otherwise noise, and the choice between candidates with them.
      prompts_per_chunk: objects of a device whose full-resolution logits exist at once. At
        1024 x 1024 one object's three candidates take 12 MB in float32, and several times that in
        the backward pass. None takes all at once. Kernels for TPUs have no such logits and do not
        ask.
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
      errors: words of the pixels where the thresholded mask is wrong.
    """

    focal: Float[Array, "b p m"]
    dice: Float[Array, "b p m"]
    iou: Float[Array, "b p m"]
    errors: Int[Array, "b p m 16 cells"]


def mask_losses(
    logits: Float[Array, "b p m 16 cells"],
    masks: Int[Array, "b p 16 cells"],
    area: Int[Array, "b 16 cells"],
    mask_grid: MaskGrid,
    config: LossConfig,
    kernels: Kernels = "none",
) -> MaskLosses:
    """Focal loss, dice loss and IoU of every candidate at the resolution of the masks.

    The focal loss is a mean over the pixels of ``area``. Dice is
    ``1 - (2 sum(p t) + 1) / (sum p + sum t + 1)`` over them, with the smoothing of MaskFormer and
    SAM 2.

    Args:
      logits: of candidates, by cells (``ops.cells``).
      masks: words of the true masks.
      area: words of what is image and not padding.
      mask_grid: what the words mean.
      config: see there.
      kernels: see ``Placement.kernels``.

    Source: Lin et al. 2017; Milletari et al. 2016.
    """
    options = {"alpha": config.focal_alpha, "gamma": config.focal_gamma}

    def some_objects(objects):
        """Objects on the first axis, images on the second."""
        logits, masks = (jnp.swapaxes(x, 0, 1) for x in objects)
        sums = mask_sums(logits, masks, area, mask_grid, **options)
        return MaskSums(*(jnp.swapaxes(x, 0, 1) for x in sums))

    if kernels != "none" and mask_sums_kernel.supports(mask_grid):
        sums = mask_sums_kernel.mask_sums(
            logits, masks, area, mask_grid, **options, interpret=kernels == "interpreted"
        )
    else:
        objects = (jnp.swapaxes(logits, 0, 1), jnp.swapaxes(masks, 0, 1))
        found = _map_objects(some_objects, objects, config.prompts_per_chunk)
        sums = MaskSums(*(jnp.swapaxes(x, 0, 1) for x in found))
    focal, probability, hit, errors = sums
    masks = masks[:, :, None] & area[:, None, None]
    inside = num_pixels(masks)
    iou = (inside - num_pixels(masks & errors)) / jnp.maximum(num_pixels(masks | errors), 1.0)
    # A few numbers of each mask, so that gradients need neither sums nor counts again.
    focal, probability, hit, inside, iou = checkpoint_name(
        (focal, probability, hit, inside, iou), WORTH_KEEPING
    )
    return MaskLosses(
        focal=focal / jnp.maximum(num_pixels(area)[:, None, None], 1.0),
        dice=1.0 - (2.0 * hit + 1.0) / (probability + inside + 1.0),
        iou=iou,
        errors=errors,
    )


def _map_objects(
    function: Callable[[Any], Any], objects: Any, prompts_per_chunk: int | None
) -> Any:
    """``function`` of objects on the first axis, some at a time where a chunk size is given.

    Each chunk is computed again in the backward pass, so only low-resolution inputs are kept.
    """
    count = jax.tree.leaves(objects)[0].shape[0]
    if prompts_per_chunk is None or prompts_per_chunk >= count:
        return function(objects)
    if count % prompts_per_chunk:
        raise ConfigError(
            f"losses.prompts_per_chunk = {prompts_per_chunk} does not divide the {count} masks "
            "of an image on each device"
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
