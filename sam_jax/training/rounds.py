"""The interactive rounds: prompt, predict, correct, and what it costs."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from sam_jax.arrays import Array, Bool, Float, Int
from sam_jax.losses import LossConfig, RoundLoss, map_objects, mask_losses, round_loss
from sam_jax.models.mask_decoder import MaskPrediction
from sam_jax.models.prompt_encoder import Prompts
from sam_jax.ops.images import valid_area
from sam_jax.ops.masks import sample_pixel
from sam_jax.ops.placement import BATCH, TENSOR, Placement
from sam_jax.ops.resize import resize_bilinear
from sam_jax.prompts import (
    PromptConfig,
    error_clicks,
    mask_round_of,
    masks_at,
    noisy_boxes,
)

# Prompts and the number of candidates wanted (three or one) and a key for dropout in, masks out.
Decode = Callable[[Prompts, bool, Array], MaskPrediction]


@flax.struct.dataclass
class RoundResult:
    """A round as it is reported, per object; the leading axis of the whole run is the round.

    Attributes:
      loss: see ``losses.RoundLoss``.
      iou: true IoU of the mask that is carried on, the one with the highest predicted IoU.
      iou_prediction: its predicted IoU.
    """

    loss: RoundLoss
    iou: Float[Array, "*rounds b p"]
    iou_prediction: Float[Array, "*rounds b p"]


def run_rounds(
    decode: Decode,
    key: Array,
    masks: Bool[Array, "b p h w"],
    image_hw: Int[Array, "b 2"],
    prompt_config: PromptConfig,
    loss_config: LossConfig,
    *,
    remat: bool = True,
    placement: Placement = Placement(),  # noqa: B008 - frozen
) -> RoundResult:
    """Every object prompted, predicted and corrected for all rounds.

    The first round gives a point or a noisy box and asks for three candidates. Every later round
    gives the logits carried on from the one before, all prompts so far and, unless it is a
    mask-only round, one new click in the error region, and asks for one candidate. Shapes are
    fixed; rounds after the first are a scan.

    The logits carried on have their gradient stopped: eleven short graphs, not one of eleven
    times the depth. (SAM 2 lets gradients pass; the paper is silent.)

    Args:
      decode: the decoder on the images' embeddings.
      key: for prompts and dropout.
      masks: ground truth at the resolution of the model input; empty for absent objects, whose
        results mean nothing.
      image_hw: valid height and width of each image.
      prompt_config: how the user behaves.
      loss_config: what the losses weigh.
      remat: whether each round is computed again in the backward pass: without, the memory of
        all rounds is needed at once, and the step is about a fifth faster.
      placement: the devices; each works on its own images and objects.

    Source: Kirillov et al. 2023, appendix A, "Training algorithm".
    """
    masks = placement.constrain(masks, BATCH, TENSOR)
    area = valid_area(image_hw, masks.shape[-2:])
    objects = placement.spec(BATCH, TENSOR)
    losses_of = placement.on_each_device(
        lambda logits, masks, area: mask_losses(logits, masks, area, loss_config),
        [objects, objects, placement.spec(BATCH)],
        objects,
    )

    def judge(prediction: MaskPrediction) -> tuple[RoundResult, Float[Array, "b p lh lw"]]:
        losses = losses_of(prediction.low_res_logits, masks, area)
        chosen = jnp.argmax(prediction.iou_predictions, axis=-1)[..., None]
        logits = jnp.take_along_axis(prediction.low_res_logits, chosen[..., None, None], axis=2)[
            :, :, 0
        ]
        result = RoundResult(
            loss=round_loss(losses, prediction.iou_predictions, loss_config),
            iou=jnp.take_along_axis(losses.iou, chosen, axis=-1)[..., 0],
            iou_prediction=jnp.take_along_axis(prediction.iou_predictions, chosen, axis=-1)[..., 0],
        )
        return result, jax.lax.stop_gradient(logits)

    def correct(keys, logits, masks, area):
        """A click for each object where its enlarged prediction is wrong; its own key for each."""

        def of_objects(objects):
            keys, logits, masks = objects
            predicted = resize_bilinear(logits, masks.shape[-2:]) > 0
            one_image = jax.vmap(
                lambda key, predicted, mask, area: error_clicks(
                    key, predicted[None, None], mask[None, None], area[None]
                )
            )
            coords, labels = jax.vmap(one_image, in_axes=(0, 0, 0, None))(
                keys, predicted, masks, area
            )
            return coords[:, :, 0, 0], labels[:, :, 0, 0]

        first = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (keys, logits, masks))
        found = map_objects(of_objects, first, loss_config.prompts_per_chunk)
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), found)

    clicks_of = placement.on_each_device(
        correct,
        [objects, objects, objects, placement.spec(BATCH)],
        objects,
    )

    start_key, mask_round_key, dropout_key, rounds_key = jax.random.split(key, 4)
    prompts = first_prompts(start_key, masks, image_hw, prompt_config)
    prompts = jax.tree.map(lambda x: placement.constrain(x, BATCH, TENSOR), prompts)
    mask_round = mask_round_of(mask_round_key, masks.shape[:2], prompt_config)

    rematted = jax.checkpoint if remat else lambda function: function
    first, logits = rematted(lambda p, k: judge(decode(p, True, k)))(prompts, dropout_key)

    @rematted
    def one_round(carry, round_index):
        prompts, logits, clicks = carry
        click_key, dropout_key = jax.random.split(jax.random.fold_in(rounds_key, round_index))
        adds_click = mask_round != round_index
        if prompt_config.final_mask_round:
            adds_click &= round_index < prompt_config.num_rounds - 1
        coords, labels = clicks_of(
            jax.random.split(click_key, masks.shape[:2]), logits, masks, area
        )
        # Slot 0 belongs to the first prompt even where that is a box.
        slot = jnp.arange(prompt_config.num_points) == 1 + clicks[..., None]
        slot &= adds_click[..., None]
        prompts = prompts.replace(
            point_coords=jnp.where(
                slot[..., None], coords[:, :, None].astype(jnp.float32), prompts.point_coords
            ),
            point_labels=jnp.where(slot, labels[..., None], prompts.point_labels),
            point_valid=prompts.point_valid | slot,
        )
        with_mask = prompts.replace(mask_logits=logits, mask_valid=jnp.ones(logits.shape[:2], bool))
        result, logits = judge(decode(with_mask, False, dropout_key))
        return (prompts, logits, clicks + adds_click), result

    clicks = jnp.zeros(masks.shape[:2], jnp.int32)
    _, later = jax.lax.scan(
        one_round, (prompts, logits, clicks), jnp.arange(1, prompt_config.num_rounds)
    )
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, later)


def first_prompts(
    key: Array,
    masks: Bool[Array, "b p h w"],
    image_hw: Int[Array, "b 2"],
    config: PromptConfig,
) -> Prompts:
    """A uniform foreground point or a noisy box for each object, with room for corrections."""
    kind_key, point_key, box_key = jax.random.split(key, 3)
    shape = masks.shape[:2]
    box_valid = jax.random.bernoulli(kind_key, config.box_rate, shape)
    coords = sample_pixel(point_key, masks)
    points = (*shape, config.num_points)
    first_slot = jnp.arange(config.num_points) == 0
    return Prompts(
        point_coords=jnp.where(first_slot[:, None], coords[:, :, None], 0).astype(jnp.float32),
        point_labels=jnp.where(first_slot, masks_at(masks, coords)[..., None], 0),
        point_valid=jnp.broadcast_to(first_slot, points) & ~box_valid[..., None],
        boxes_xyxy=noisy_boxes(box_key, masks, image_hw, config),
        box_valid=box_valid,
    )
