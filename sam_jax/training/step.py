"""One training step: encode, prompt and correct, backpropagate, update."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import PartitionSpec

from sam_jax.arrays import Array, Bool, Float, Int, UInt8
from sam_jax.errors import ConfigError
from sam_jax.losses import LossConfig
from sam_jax.models.image_encoder import drop_path_scales
from sam_jax.models.sam import PROMPTED_PARTS, Sam
from sam_jax.ops.images import normalize_images
from sam_jax.ops.packed_masks import MaskLayout
from sam_jax.parallel import BATCH, TENSOR, Parallel
from sam_jax.prompts import PromptConfig
from sam_jax.training.rounds import RoundResult, run_rounds
from sam_jax.training.state import TrainState


@flax.struct.dataclass
class Batch:
    """Training images with their masks, as the input pipeline yields them.

    Attributes:
      image: RGB, resized, padded at the bottom and right.
      image_hw: height and width of each image without its padding.
      masks_packed: ``numpy.packbits`` of the masks along their rows.
      mask_valid: which of an image's masks exist.
    """

    image: UInt8[Array, "b h w 3"]
    image_hw: Int[Array, "b 2"]
    masks_packed: UInt8[Array, "b p h w8"]
    mask_valid: Bool[Array, "b p"]


_ENCODER = "image_encoder"
StepMetrics = dict[str, Float[Array, "..."]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
Rounds = Callable[..., RoundResult]


def build_rounds(
    model: Sam,
    prompt_config: PromptConfig,
    loss_config: LossConfig,
    *,
    parallel: Parallel = Parallel(),  # noqa: B008 - frozen
    remat: bool = True,
) -> Rounds:
    """All rounds of a batch, in which each device works on its own images and objects.

    Args:
      model: the model.
      prompt_config: how the simulated user behaves.
      loss_config: what the losses weigh.
      parallel: the devices.
      remat: see ``rounds.run_rounds``.

    Returns:
      a function of the parameters of ``PROMPTED_PARTS``, the model's constants, embeddings, a key
      for each object, packed masks, and sizes of the images.
    """
    images, objects = parallel.spec(BATCH), parallel.spec(BATCH, TENSOR)

    @jax.named_scope("rounds")
    def rounds_of_device(params, constants, embeddings, keys, masks_packed, image_hw):
        """All rounds of a device's own images and objects."""
        mask_layout = MaskLayout.of(embeddings.shape[1:3], model.image_size)

        def decode(prompts, multimask_output, seeds):
            return model.apply(
                {"params": params, "constants": constants},
                embeddings,
                prompts,
                multimask_output=multimask_output,
                dropout_seeds=seeds,
                method=Sam.decode,
            )

        return run_rounds(
            decode,
            keys,
            mask_layout.pack(masks_packed),
            image_hw,
            mask_layout,
            prompt_config,
            loss_config,
            remat=remat,
        )

    on_each_device = parallel.on_each_device(
        rounds_of_device,
        [PartitionSpec(), PartitionSpec(), images, objects, objects, images],
        parallel.spec(None, BATCH, TENSOR),
    )

    def rounds(params, constants, embeddings, keys, masks_packed, image_hw):
        if keys.shape[1] % parallel.num_tensor:
            raise ConfigError(
                f"data.max_masks = {keys.shape[1]} does not divide by the {parallel.num_tensor} "
                "devices of sharding.tensor, which share the masks of an image"
            )
        return on_each_device(params, constants, embeddings, keys, masks_packed, image_hw)

    return rounds


def build_train_step(
    model: Sam,
    optimizer: optax.GradientTransformation,
    prompt_config: PromptConfig,
    loss_config: LossConfig,
    *,
    seed: int,
    parallel: Parallel = Parallel(),  # noqa: B008 - frozen
    param_specs: Any | None = None,
    accumulate_steps: int = 1,
    remat_rounds: bool = True,
    ema_decay: float = 0.0,
) -> TrainStep:
    """The step as a pure function, to be jitted with shardings by the caller.

    Every random choice follows from ``seed`` and the state's step, so a step computed again gives
    the same result.

    Args:
      model: the model.
      optimizer: made for its parameters.
      prompt_config: how the simulated user behaves.
      loss_config: what the losses weigh.
      seed: of prompts, dropout and dropped paths.
      parallel: the devices.
      param_specs: how they store the parameters; None for whole ones.
      accumulate_steps: parts into which the batch is cut; must divide every device's share.
      remat_rounds: see ``rounds.run_rounds``.
      ema_decay: see ``recipe.TrainConfig``; the state must keep an average if it is not 0.
    """
    encode = parallel.encode(
        model, None if param_specs is None else {_ENCODER: param_specs[_ENCODER]}
    )
    rounds = build_rounds(model, prompt_config, loss_config, parallel=parallel, remat=remat_rounds)

    def loss_sums(params, constants, batch: Batch, key):
        """Sum over all objects of the loss, and sums of what is reported."""
        encode_key, rounds_key = jax.random.split(key)
        embeddings = encode(
            {_ENCODER: params[_ENCODER]},
            normalize_images(batch.image, batch.image_hw),
            drop_path_scales(encode_key, model.config.image_encoder, batch.image.shape[0]),
        )
        results = rounds(
            {part: params[part] for part in PROMPTED_PARTS},
            constants,
            # In each round they are rounded again, so that their gradient is summed in float32.
            embeddings.astype(jnp.float32),
            jax.random.split(rounds_key, batch.mask_valid.shape),
            batch.masks_packed,
            batch.image_hw,
        )
        return _report(results, batch.mask_valid)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        # Means are taken over the objects of the whole batch, not of a device or a part.
        num_masks = jnp.maximum(jnp.sum(batch.mask_valid), 1).astype(jnp.float32)

        def part_gradients(part: Batch, key):
            def mean_loss(params):
                loss, sums = loss_sums(params, state.constants, part, key)
                return loss / num_masks, sums

            return jax.grad(mean_loss, has_aux=True)(state.params)

        if accumulate_steps == 1:
            grads, sums = part_gradients(batch, key)
        else:
            grads, sums = _accumulate(part_gradients, batch, key, accumulate_steps)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_decay:
            ema_params = optax.incremental_update(params, ema_params, 1.0 - ema_decay)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema_params=ema_params,
        )
        metrics = {name: total / num_masks for name, total in sums.items()}
        metrics["num_masks"] = num_masks
        metrics["gradient_norm"] = optax.tree.norm(grads)
        metrics["update_norm"] = optax.tree.norm(updates)
        return new_state, metrics

    return train_step


def _report(results: RoundResult, mask_valid: Bool[Array, "b p"]):
    """The loss, summed over rounds and objects, and what is reported, summed over objects."""

    def over_objects(x):
        return jnp.sum(x, axis=(-2, -1), where=mask_valid)

    loss = jnp.sum(over_objects(results.loss.total))
    iou = over_objects(results.iou)
    sums = {
        "loss": loss,
        "focal": jnp.sum(over_objects(results.loss.focal)),
        "dice": jnp.sum(over_objects(results.loss.dice)),
        "iou_mse": jnp.sum(over_objects(results.loss.iou_error)),
        "iou_prediction_error": jnp.mean(
            over_objects(jnp.abs(results.iou_prediction - results.iou))
        ),
    }
    sums |= {f"iou_round_{index + 1:02d}": iou[index] for index in range(iou.shape[0])}
    return loss, sums


def _accumulate(part_gradients, batch: Batch, key, num_parts: int):
    """Gradients and sums of a batch, computed in parts one after the other.

    Part i holds every ``num_parts``-th image from i on, so that with the batch sharded in blocks
    each device cuts its own block and nothing moves between devices.
    """
    parts = jax.tree.map(
        lambda x: rearrange(x, "(n parts) ... -> parts n ...", parts=num_parts), batch
    )

    def add_part(total, indexed_part):
        index, part = indexed_part
        return jax.tree.map(
            jnp.add, total, part_gradients(part, jax.random.fold_in(key, index))
        ), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(part_gradients, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add_part, zeros, (jnp.arange(num_parts), parts))[0]
