"""Promptable segmentation: encode, prompt and correct in eleven rounds, focal, dice and IoU losses.

Source: Kirillov et al. 2023, appendix A.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from sam_jax import flop_counts
from sam_jax.arrays import Array, Bool, Float, Int, UInt8
from sam_jax.errors import ConfigError
from sam_jax.losses import LossConfig
from sam_jax.models.lora import LoraConfig, merged, merged_variables, with_adapters
from sam_jax.models.sam import PROMPTED_PARTS, Sam, init_variables
from sam_jax.ops.images import normalize_images
from sam_jax.ops.packed_masks import MaskLayout
from sam_jax.parallel import BATCH, TENSOR, Parallel
from sam_jax.simulated_user import PromptConfig
from sam_jax.training.rounds import RoundResult, run_rounds
from sam_jax.training.task import Fields, LossParts, LossSums, Sums, task_shapes
from sam_jax.weights.adapters import adapted, merged_with, read_adapters
from sam_jax.weights.load import variables_for
from sam_jax.weights.runs import run_differences, run_lora

_ENCODER = "image_encoder"


@flax.struct.dataclass
class Batch:
    """Training images with their masks, as the input pipeline yields them.

    Attributes:
      image_hw: height and width of each image without its padding.
      masks_packed: ``numpy.packbits`` of the masks along their rows.
      mask_valid: which of an image's masks exist.
      image: RGB or other channels, resized, padded at the bottom and right.
      image_embeddings: of the images, in their place, see ``SegmentTask.takes_embeddings``.
    """

    image_hw: Int[Array, "b 2"]
    masks_packed: UInt8[Array, "b p h w8"]
    mask_valid: Bool[Array, "b p"]
    image: UInt8[Array, "b h w c"] | Float[Array, "b h w c"] | None = None
    image_embeddings: Float[Array, "b gh gw d"] | None = None


@dataclasses.dataclass(frozen=True)
class SegmentTask:
    """Trains a model to segment what a simulated user points at; methods as ``training.task.Task``.

    Attributes:
      model: the model.
      prompts: how the simulated user behaves.
      losses: what the losses weigh.
      max_masks: masks of each image of a batch.
      remat_rounds: see ``rounds.run_rounds``.
      takes_embeddings: whether batches hold embeddings of a frozen encoder, float16, in place of
        images (``embedding_cache.EmbeddingStage``).
      lora: adapters, which are merged into the model's parameters in every step.
      adapters_from: file of adapters that a run starts from, on top of its weights; None for fresh
        ones.
    """

    model: Sam
    prompts: PromptConfig
    losses: LossConfig
    max_masks: int
    remat_rounds: bool = True
    takes_embeddings: bool = False
    lora: LoraConfig = LoraConfig()
    adapters_from: str | None = None

    @property
    def unit(self) -> str:
        return "masks"

    @property
    def dtype(self) -> DTypeLike:
        return self.model.dtype

    @property
    def remat(self) -> str:
        return self.model.remat

    def init(self, key: Array) -> dict[str, Any]:
        return self._with_adapters(init_variables(self.model, key), key)

    def load(self, path: str, key: Array) -> dict[str, Any]:
        """Variables of any form that ``sam_jax.load`` reads, and of a masked autoencoder."""
        variables = variables_for(self.model, path, key=key)
        if self.adapters_from is None:
            return self._with_adapters(variables, key)
        adapters = read_adapters(self.adapters_from)
        channels = self.model.config.channels
        if adapters.channels not in (None, channels):
            raise ConfigError(
                f"{self.adapters_from} was trained on images of other channels "
                f"({adapters.channels}) than the config's section model says ({channels})"
            )
        if not self.lora.rank:
            return merged_with(variables, adapters)
        if adapters.config != self.lora:
            raise ConfigError(
                f"{self.adapters_from} holds adapters of {adapters.config}, and the config's "
                f"section lora is {self.lora}: take the same, or lora.rank=0 to merge them"
            )
        return {**variables, "params": adapted(variables["params"], adapters)}

    def _with_adapters(self, variables: dict[str, Any], key: Array) -> dict[str, Any]:
        # Apart from the key of the model's own parameters.
        key = jax.random.fold_in(key, 1)
        return {**variables, "params": with_adapters(variables["params"], self.lora, key)}

    def differences(self, run: Path) -> list[str]:
        found = run_differences(run, self.model)
        if (lora := run_lora(run)) != self.lora:
            found.append(f"lora: {lora} there, {self.lora} here")
        return found

    def evaluated(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Variables with adapters merged."""
        return merged_variables(variables, self.lora)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        height, width = self.model.image_size
        encoder, channels = self.model.config.image_encoder, self.model.config.channels
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            **(
                {"image_embeddings": ((*encoder.grid, encoder.output_dim), np.float16)}
                if self.takes_embeddings
                else {"image": ((height, width, channels.count), channels.dtype)}
            ),
            "image_hw": ((2,), np.int32),
            "masks_packed": ((self.max_masks, height, -(-width // 8)), np.uint8),
            "mask_valid": ((self.max_masks,), np.bool_),
        }
        return {
            name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
            for name, (shape, dtype) in shapes.items()
        }

    def count(self, batch: Fields) -> Float[Array, ""]:
        return jnp.maximum(jnp.sum(batch["mask_valid"]), 1).astype(jnp.float32)

    def loss_sums(self, parallel: Parallel, param_specs: Any | None) -> LossSums:
        """Sums over all objects of the loss of all rounds, and of what is reported."""
        results = self._build_results(parallel, param_specs)

        def loss_sums(params: Any, constants: Any, fields: Fields, key: Array):
            return _sums(results(params, constants, fields, key), fields["mask_valid"], self.losses)

        return loss_sums

    def loss_parts(self, parallel: Parallel, param_specs: Any | None) -> LossParts:
        """The losses of every round and object."""
        results = self._build_results(parallel, param_specs)

        def loss_parts(params: Any, constants: Any, fields: Fields, key: Array):
            loss = results(params, constants, fields, key).loss
            parts = {"focal": loss.focal, "dice": loss.dice, "iou_mse": loss.iou_error}
            return {
                name: jnp.where(fields["mask_valid"], part, 0.0) for name, part in parts.items()
            }

        return loss_parts

    def _build_results(
        self, parallel: Parallel, param_specs: Any | None
    ) -> Callable[[Any, Any, Fields, Array], RoundResult]:
        """All rounds of a batch as a function of parameters, constants, batch and key."""
        encoder_specs = None if param_specs is None else {_ENCODER: param_specs[_ENCODER]}
        encode = parallel.encode(self.model, encoder_specs)
        rounds = build_rounds(
            self.model, self.prompts, self.losses, parallel=parallel, remat=self.remat_rounds
        )

        def results(params: Any, constants: Any, fields: Fields, key: Array) -> RoundResult:
            batch = Batch(**fields)
            params = merged(params, self.lora)
            encode_key, rounds_key = jax.random.split(key)
            embeddings = batch.image_embeddings
            if batch.image is not None:
                embeddings = encode(
                    {_ENCODER: params[_ENCODER]},
                    normalize_images(batch.image, batch.image_hw, self.model.config.channels),
                    self.model.draw_path_scales(encode_key, len(batch.image)),
                )
            assert embeddings is not None, "a batch has neither images nor embeddings"
            return rounds(
                {part: params[part] for part in PROMPTED_PARTS},
                constants,
                # Float32, so that gradients of the rounds are summed in it; each rounds it again.
                embeddings.astype(jnp.float32),
                jax.random.split(rounds_key, batch.mask_valid.shape),
                batch.masks_packed,
                batch.image_hw,
            )

        return results

    def headline(self, means: Mapping[str, float]) -> str:
        """Loss, and IoU in the first and the last round."""
        ious = [value for name, value in means.items() if name.startswith("iou_round_")]
        return f"loss {means['loss']:.2f}  IoU {ious[0]:.3f} first, {ious[-1]:.3f} last round"

    def flops(self, batch_size: int, trained: Any) -> float:
        """Operations of a step, without padding and what is computed twice."""
        whole = task_shapes(self)["params"]
        encoder_rate = _size(trained, (_ENCODER,)) / _size(whole, (_ENCODER,))
        reaches_encoder = bool(encoder_rate or "lora" in trained)
        return flop_counts.step_flops(
            self.model.config,
            self.prompts,
            batch_size,
            self.max_masks,
            useful=True,
            encoder_factor=0
            if self.takes_embeddings
            else flop_counts.training_factor(encoder_rate, passes_gradients=reaches_encoder),
            decoder_factor=flop_counts.training_factor(
                _size(trained, PROMPTED_PARTS) / _size(whole, PROMPTED_PARTS),
                passes_gradients=True,
            ),
        )


def _size(params: Mapping[str, Any], parts: Iterable[str]) -> int:
    """Number of parameters in some parts of a model."""
    return sum(leaf.size for part in parts for leaf in jax.tree.leaves(params.get(part, {})))


def build_rounds(
    model: Sam,
    prompt_config: PromptConfig,
    loss_config: LossConfig,
    *,
    parallel: Parallel = Parallel(),  # noqa: B008 - frozen
    remat: bool = True,
) -> Callable[..., RoundResult]:
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


def _sums(
    results: RoundResult, mask_valid: Bool[Array, "b p"], config: LossConfig
) -> tuple[Float[Array, ""], Sums]:
    """The loss and what is reported, summed over objects; losses over rounds as the config says."""
    over_rounds = {"sum": jnp.sum, "mean": jnp.mean}[config.over_rounds]

    def over_objects(x):
        return jnp.sum(x, axis=(-2, -1), where=mask_valid)

    loss = over_rounds(over_objects(results.loss.total))
    iou = over_objects(results.iou)
    sums = {
        "loss": loss,
        "focal": over_rounds(over_objects(results.loss.focal)),
        "dice": over_rounds(over_objects(results.loss.dice)),
        "iou_mse": over_rounds(over_objects(results.loss.iou_error)),
        "iou_prediction_error": jnp.mean(
            over_objects(jnp.abs(results.iou_prediction - results.iou))
        ),
    }
    sums |= {f"iou_round_{index + 1:02d}": iou[index] for index in range(iou.shape[0])}
    return loss, sums
