"""Pre-training: patches that were dropped from an image are reconstructed from the others.

Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners".
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sam_jax import flop_counts
from sam_jax.arrays import Array, Float
from sam_jax.models.masked_autoencoder import MaskedAutoencoder, init_variables
from sam_jax.ops.images import normalize_whole_images
from sam_jax.parallel import BATCH, Parallel
from sam_jax.training.task import Fields, LossParts, LossSums
from sam_jax.weights.load import autoencoder_variables_for
from sam_jax.weights.runs import run_differences


@dataclasses.dataclass(frozen=True)
class ReconstructTask:
    """Trains a masked autoencoder; methods as ``training.task.Task``.

    A batch has images alone, which fill the model's input.

    Attributes:
      model: the model.
    """

    model: MaskedAutoencoder

    @property
    def unit(self) -> str:
        return "patches"

    @property
    def dtype(self) -> DTypeLike:
        return self.model.dtype

    @property
    def remat(self) -> str:
        return self.model.remat

    def init(self, key: Array) -> dict[str, Any]:
        return init_variables(self.model, key)

    def load(self, path: str, key: Array) -> dict[str, Any]:
        """Variables of a masked autoencoder whose decoder was kept: a run, or a published file."""
        del key  # nothing is left to draw
        return autoencoder_variables_for(self.model, path, inflates=True)

    def differences(self, run: Path) -> list[str]:
        return run_differences(run, self.model)

    def evaluated(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        return dict(variables)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        channels = self.model.channels
        shape = (batch_size, *self.model.image_size, channels.count)
        return {"image": jax.ShapeDtypeStruct(shape, channels.dtype)}

    def count(self, batch: Fields) -> Float[Array, ""]:
        return jnp.float32(len(batch["image"]) * self.model.num_dropped)

    def loss_sums(self, parallel: Parallel, param_specs: Any | None) -> LossSums:
        """Sums, over the dropped patches, of their mean squared errors."""
        errors = self._build_errors(parallel, param_specs)

        def loss_sums(params: Any, constants: Any, fields: Fields, key: Array):
            del constants  # there are none
            loss = jnp.sum(errors(params, fields, key))
            return loss, {"loss": loss}

        return loss_sums

    def loss_parts(self, parallel: Parallel, param_specs: Any | None) -> LossParts:
        """The errors of every dropped patch, in one round."""
        errors = self._build_errors(parallel, param_specs)

        def loss_parts(params: Any, constants: Any, fields: Fields, key: Array):
            del constants
            return {"loss": errors(params, fields, key)[None]}

        return loss_parts

    def _build_errors(
        self, parallel: Parallel, param_specs: Any | None
    ) -> Callable[[Any, Fields, Array], Float[Array, "b u"]]:
        """Errors of the dropped patches of a batch as a function of parameters, batch and key."""
        model, of_images = self.model, parallel.spec(BATCH)

        def errors(params: Any, images: Array, noise: Array) -> Float[Array, "b u"]:
            """Errors of a device's own images."""
            images = normalize_whole_images(images, model.channels)
            predictions, mask = model.reconstruct({"params": params}, images, noise)
            return model.errors(images, predictions, mask)

        on_each_device = parallel.with_weights(
            jax.named_scope("reconstruction")(errors), param_specs, [of_images] * 2, of_images
        )

        def of_batch(params: Any, fields: Fields, key: Array) -> Float[Array, "b u"]:
            images = fields["image"]
            # For the whole batch, so that how many devices share it changes nothing.
            noise = jax.random.uniform(key, (len(images), model.num_patches))
            return on_each_device(params, images, noise)

        return of_batch

    def headline(self, means: Mapping[str, float]) -> str:
        """The loss; of normalised pixels, 1 is what a patch's mean would give."""
        return f"loss {means['loss']:.4f}"

    def flops(self, batch_size: int, trained: Any) -> float:
        """Operations of a step, without what is computed twice; all counts as trained."""
        del trained  # a frozen part is no pre-training
        image = flop_counts.autoencoder_flops(
            self.model.encoder, self.model.config, self.model.channels.count
        )
        return flop_counts.TRAINING_FACTOR * batch_size * image
