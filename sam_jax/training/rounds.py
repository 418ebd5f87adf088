"""The interactive rounds: prompt, predict, correct, and what it costs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from sam_jax.arrays import Array, Float, Int, UInt32
from sam_jax.losses import LossConfig, RoundLoss, mask_losses, round_loss
from sam_jax.models.mask_decoder import MaskPrediction
from sam_jax.models.prompt_encoder import Prompts
from sam_jax.ops.packed_masks import MaskLayout, bit_at
from sam_jax.ops.remat import WORTH_KEEPING, keeping, worth_keeping
from sam_jax.simulated_user import PromptConfig, error_click, mask_round_of, noisy_box

# (prompts, multimask_output, dropout seeds) -> masks.
Decode = Callable[[Prompts, bool, UInt32[Array, "b p"]], MaskPrediction]
# Where an object's click goes that it does not get.
_NO_SLOT = -1


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


@flax.struct.dataclass
class _Round:
    """State that one round of prompting hands to the next.

    Attributes:
      prompts: all prompts of the objects so far.
      logits: low-resolution logits of the masks that are carried on.
      errors: packed masks of where they are wrong.
      num_clicks: corrections so far.
    """

    prompts: Prompts
    logits: Float[Array, "b p lh lw"]
    errors: Int[Array, "b p 16 tokens"]
    num_clicks: Int[Array, "b p"]


def run_rounds(
    decode: Decode,
    keys: Array,
    masks: Int[Array, "b p 16 tokens"],
    image_hw: Int[Array, "b 2"],
    mask_layout: MaskLayout,
    prompt_config: PromptConfig,
    loss_config: LossConfig,
    *,
    remat: bool = True,
) -> RoundResult:
    """Every object prompted, predicted and corrected for all rounds.

    The first round gives a point or a noisy box and asks for three candidates. Every later round
    gives the logits carried on from the one before, all prompts so far and, unless it is a
    mask-only round, one new click in the error region, and asks for one candidate. Shapes are
    fixed; rounds after the first are a scan.

    The logits carried on have their gradient stopped unless ``loss_config.feedback_gradient``:
    eleven short graphs, not one of eleven times the depth. (SAM 2 lets gradients pass; the paper is
    silent.)

    Objects know nothing of each other, so each may be on any device.

    Args:
      decode: the decoder on the images' embeddings.
      keys: for the prompts and the dropout of each object [b, p].
      masks: packed masks (``ops.packed_masks``) of the ground truth; empty for absent objects,
        whose results mean nothing.
      image_hw: valid height and width of each image.
      mask_layout: of the packed masks.
      prompt_config: how the user behaves.
      loss_config: what the losses weigh.
      remat: whether each round is computed again in the backward pass; without, the memory of
        all rounds is needed at once. docs/architecture.md says what it gains where.

    Source: Kirillov et al. 2023, appendix A, "Training algorithm".
    """
    area = mask_layout.area(image_hw)

    def judge(prediction: MaskPrediction) -> tuple[RoundResult, Array, Array]:
        """The result of a round, and logits and errors of the masks that are carried on."""
        logits = prediction.low_res_logits
        losses = mask_losses(logits, masks, area, mask_layout, loss_config)
        chosen = jnp.argmax(prediction.iou_predictions, axis=-1)[..., None]

        def of_chosen(x):
            index = chosen.reshape(*chosen.shape, *(1,) * (x.ndim - chosen.ndim))
            return jnp.take_along_axis(x, index, axis=2)[:, :, 0]

        result = RoundResult(
            loss=round_loss(losses, prediction.iou_predictions, loss_config),
            iou=of_chosen(losses.iou),
            iou_prediction=of_chosen(prediction.iou_predictions),
        )
        carried_on = of_chosen(logits)
        if not loss_config.feedback_gradient:
            carried_on = jax.lax.stop_gradient(carried_on)
        return result, carried_on, of_chosen(losses.errors)

    def keys_and_seeds(round_index: Array | int) -> tuple[Array, Array]:
        """Random key for the click and dropout seed of each object in a round."""
        of_round = _of_each(lambda key: jax.random.split(jax.random.fold_in(key, round_index)))
        both = of_round(keys)
        bits = _of_each(functools.partial(jax.random.bits, dtype=jnp.uint32))
        return both[..., 0], bits(both[..., 1])

    first_keys, seeds = keys_and_seeds(0)
    round_keys = _of_each(jax.random.split)(first_keys)
    mask_round = _of_each(lambda key: mask_round_of(key, prompt_config))(round_keys[..., 1])
    prompts = first_prompts(round_keys[..., 0], masks, image_hw, mask_layout, prompt_config)

    policy = keeping(WORTH_KEEPING)
    rematted = functools.partial(jax.checkpoint, policy=policy) if remat else lambda f: f
    first, logits, errors = rematted(lambda p, s: judge(decode(p, True, s)))(prompts, seeds)

    @rematted
    def one_round(before: _Round, round_index: Array) -> tuple[_Round, RoundResult]:
        click_keys, seeds = keys_and_seeds(round_index)
        adds_click = mask_round != round_index
        if prompt_config.final_mask_round:
            adds_click &= round_index < prompt_config.num_rounds - 1
        found = _of_each(
            lambda key, errors, mask, area: error_click(key, errors, mask, area, mask_layout),
            of_image=3,
        )(click_keys, before.errors, masks, area)
        coords, labels = worth_keeping(found)
        # Slot 0 belongs to the first prompt even where that is a box.
        slot = jnp.where(adds_click, 1 + before.num_clicks, _NO_SLOT)
        prompts = _with_click(before.prompts, coords, labels, slot)
        with_mask = dataclasses.replace(
            prompts, mask_logits=before.logits, mask_valid=jnp.ones(slot.shape, bool)
        )
        result, logits, errors = judge(decode(with_mask, False, seeds))
        return _Round(prompts, logits, errors, before.num_clicks + adds_click), result

    if prompt_config.num_rounds == 1:
        # Not as a scan of no rounds, which takes as long to compile as one of ten.
        return jax.tree.map(lambda x: x[None], first)
    start = _Round(prompts, logits, errors, jnp.zeros(masks.shape[:2], jnp.int32))
    _, later = jax.lax.scan(one_round, start, jnp.arange(1, prompt_config.num_rounds))
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, later)


def _with_click(
    prompts: Any,
    coords: Int[Array, "b p 2"],
    labels: Int[Array, "b p"],
    slot: Int[Array, "b p"],
) -> Prompts:
    """Prompts with points, to which each object adds its click in a slot, or in none."""
    is_there = jnp.arange(prompts.point_valid.shape[-1]) == slot[..., None]
    return dataclasses.replace(
        prompts,
        point_coords=jnp.where(
            is_there[..., None], coords[:, :, None].astype(jnp.float32), prompts.point_coords
        ),
        point_labels=jnp.where(is_there, labels[..., None], prompts.point_labels),
        point_valid=prompts.point_valid | is_there,
    )


def first_prompts(
    keys: Array,
    masks: Int[Array, "b p 16 tokens"],
    image_hw: Int[Array, "b 2"],
    mask_layout: MaskLayout,
    config: PromptConfig,
) -> Prompts:
    """A uniform foreground point or a noisy box for each object, with room for corrections."""

    def of_object(key, mask, box, hw):
        kind_key, point_key, box_key = jax.random.split(key, 3)
        pixel, place = mask_layout.sample_pixel(point_key, mask)
        return (
            jax.random.bernoulli(kind_key, jnp.float32(config.box_rate)),
            pixel.astype(jnp.float32),
            bit_at(mask, place),
            noisy_box(box_key, box, hw, config),
        )

    box_valid, coords, labels, boxes = _of_each(of_object, of_image=3)(
        keys, masks, mask_layout.boxes(masks), image_hw
    )
    first_slot = jnp.arange(config.num_points) == 0
    return Prompts(
        point_coords=jnp.where(first_slot[:, None], coords[:, :, None], 0.0),
        point_labels=jnp.where(first_slot, labels[..., None], 0),
        point_valid=first_slot & ~box_valid[..., None],
        boxes_xyxy=boxes,
        box_valid=box_valid,
    )


def _of_each(function: Callable[..., Any], of_image: int | None = None) -> Callable[..., Any]:
    """``function`` of one object, for all; argument ``of_image`` belongs to their image."""

    def of_all(*arguments: Any) -> Any:
        axes = tuple(None if index == of_image else 0 for index in range(len(arguments)))
        return jax.vmap(jax.vmap(function, axes))(*arguments)

    return of_all
