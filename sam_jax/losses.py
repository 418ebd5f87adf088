"""The losses of promptable segmentation, per mask candidate, in float32."""

import dataclasses
from typing import Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp

from sam_jax.arrays import Array, Float, Int
from sam_jax.ops.mask_statistics import mask_statistics
from sam_jax.ops.packed_masks import MaskLayout, num_pixels
from sam_jax.ops.remat import worth_keeping

Resolution = Literal["image", "low_res"]
RoundReduction = Literal["sum", "mean"]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and shape of the losses; the defaults are the paper's where it states them.

    Where it is silent there is a switch: ``resolution``, ``feedback_gradient``, ``over_rounds``,
    ``all_iou_predictions``.

    Attributes:
      focal_weight, dice_weight, iou_weight: factors of the three parts.
      focal_alpha, focal_gamma: the focal loss; the paper is silent, these are SAM 2's.
      all_iou_predictions: whether every candidate's predicted IoU is regressed, as in SAM 2, or
        only that of the candidate with the lowest mask loss. In a short run the others' predictions
        are otherwise noise, and the choice between candidates with them.
      resolution: of the focal and the dice loss: "image", the model input's, to which logits are
        enlarged (as in SAM 2), or "low_res", that of the logits, a sixteenth of the pixels, where
        masks that fill no half of a logit's 4 x 4 pixels do not exist. SA-1B has many of those. IoU
        and clicks are at the image's in any case.
      feedback_gradient: whether gradients pass through the logits that a round feeds back to the
        next, as in SAM 2. Without, eleven shallow graphs are differentiated and not one deep one.
      over_rounds: "sum" of the rounds' losses, as in SAM 2, or their "mean". The optimizer does not
        care for the factor, but ``optimizer.clip_norm`` does.
      prompts_per_chunk: objects of a device whose full-resolution logits exist at once. At
        1024 x 1024 one object's three candidates take 12 MB in float32, and several times that in
        the backward pass. None takes all at once. ``ops.mask_statistics`` says where there are no
        such logits.
    """

    focal_weight: float = 20.0
    dice_weight: float = 1.0
    iou_weight: float = 1.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    all_iou_predictions: bool = False
    resolution: Resolution = "image"
    feedback_gradient: bool = False
    over_rounds: RoundReduction = "sum"
    prompts_per_chunk: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("resolution", Resolution), ("over_rounds", RoundReduction)):
            if (found := getattr(self, name)) not in get_args(known):
                raise ValueError(f"{name} must be one of {get_args(known)}, got {found!r}")


@flax.struct.dataclass
class MaskLosses:
    """Loss parts and IoU of each candidate.

    Attributes:
      focal: mean focal loss over the image's pixels.
      dice: dice loss, in [0, 1].
      iou: true intersection over union of the thresholded mask, in [0, 1]; no gradient.
      errors: packed mask of the pixels where the thresholded mask is wrong.
    """

    focal: Float[Array, "b p m"]
    dice: Float[Array, "b p m"]
    iou: Float[Array, "b p m"]
    errors: Int[Array, "b p m 16 tokens"]


def mask_losses(
    low_res_logits: Float[Array, "b p m lh lw"],
    packed_masks: Int[Array, "b p 16 tokens"],
    area: Int[Array, "b 16 tokens"],
    mask_layout: MaskLayout,
    config: LossConfig,
) -> MaskLosses:
    """Focal loss, dice loss and IoU of every candidate, at the resolution of the masks.

    The focal loss is a mean over the pixels of ``area``. Dice is
    ``1 - (2 sum(p t) + 1) / (sum p + sum t + 1)`` over them, with the smoothing of MaskFormer and
    SAM 2.

    Args:
      low_res_logits: of candidates.
      packed_masks: the true masks (``ops.packed_masks``).
      area: packed masks of what is image and not padding.
      mask_layout: of the packed masks.
      config: see there.

    Source: Lin et al. 2017; Milletari et al. 2016.
    """

    def statistics(logits, masks, area, mask_layout):
        return mask_statistics(
            logits,
            masks,
            area,
            mask_layout,
            alpha=config.focal_alpha,
            gamma=config.focal_gamma,
            prompts_per_chunk=config.prompts_per_chunk,
        )

    focal_sum, soft_area, soft_intersection, errors = statistics(
        low_res_logits, packed_masks, area, mask_layout
    )
    truth = packed_masks[:, :, None] & area[:, None, None]
    true_area = num_pixels(truth)
    iou = (true_area - num_pixels(truth & errors)) / jnp.maximum(num_pixels(truth | errors), 1.0)
    if config.resolution == "low_res":
        area, low_res_masks = (mask_layout.reduced(x) for x in (area, packed_masks & area[:, None]))
        true_area = num_pixels(low_res_masks & area[:, None])[:, :, None]
        focal_sum, soft_area, soft_intersection, _ = statistics(
            low_res_logits, low_res_masks, area, MaskLayout(mask_layout.grid, 1)
        )
    # A few numbers per mask are kept, so that the backward pass recomputes no sums or counts.
    focal_sum, soft_area, soft_intersection, true_area, iou = worth_keeping(
        (focal_sum, soft_area, soft_intersection, true_area, iou)
    )
    return MaskLosses(
        focal=focal_sum / jnp.maximum(num_pixels(area)[:, None, None], 1.0),
        dice=1.0 - (2.0 * soft_intersection + 1.0) / (soft_area + true_area + 1.0),
        iou=iou,
        errors=errors,
    )


@flax.struct.dataclass
class RoundLoss:
    """Losses of one round of prompting, per object, and their parts for reports.

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
