"""A masked autoencoder at work: images whose dropped patches are predicted from the others."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sam_jax.arrays import Array, Float, Shaped, UInt8
from sam_jax.inference.predictor import fingerprint_of
from sam_jax.models.masked_autoencoder import MaskedAutoencoder, blanked
from sam_jax.ops.dispatch import Kernels
from sam_jax.ops.images import ImageChannels, as_pixels, normalize_whole_images
from sam_jax.parallel import BATCH, Parallel, gather_to_all_devices


class Reconstructions:
    """Answers for some images; pictures stay on the device until they are asked for.

    Pixels are 8-bit RGB, or of other channels in the units of their files.

    Attributes:
      losses: mean squared error over the dropped patches of each image.
    """

    def __init__(
        self,
        losses: Float[np.ndarray, " n"],
        seen: Float[Array, "..."],
        whole: Float[Array, "..."],
        channels: ImageChannels,
    ):
        self.losses = losses
        self._seen, self._whole, self._channels = seen, whole, channels

    def seen(self, image: int) -> Shaped[np.ndarray, "h w c"]:
        """The part of an image that the encoder saw, dropped patches grey."""
        return as_pixels(np.asarray(self._seen[image]), self._channels)

    def whole(self, image: int) -> Shaped[np.ndarray, "h w c"]:
        """The image with dropped patches as predicted; see ``MaskedAutoencoder.reconstruction``."""
        return as_pixels(np.asarray(self._whole[image]), self._channels)


class Reconstructor:
    """A masked autoencoder ready to reconstruct.

    Args:
      model: the model.
      variables: its variables; every device gets a copy, once.
      images_per_device: size of a call.
      devices: on which images are spread; by default one.
      kernels: see ``ops.dispatch.Target``.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        variables: Mapping[str, Any],
        *,
        images_per_device: int = 1,
        devices: Sequence[jax.Device] | None = None,
        kernels: Kernels = "auto",
    ):
        mesh = Mesh(np.array(devices or jax.local_devices()[:1]), ("image",))
        self._by_image = NamedSharding(mesh, PartitionSpec("image"))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._model = model
        self._variables = gather_to_all_devices(dict(variables), self._everywhere)
        self._images_per_call = images_per_device * mesh.size
        parallel = Parallel(mesh, ("image",), kernels=kernels)
        by_image = parallel.spec(BATCH)
        self._reconstruct = jax.jit(
            parallel.on_each_device(
                self._reconstruct_on_device, [PartitionSpec(), by_image, by_image], by_image
            )
        )

    def with_variables(self, variables: Mapping[str, Any]) -> "Reconstructor":
        """The reconstructor with other variables; both share what was compiled."""
        other = copy.copy(self)
        other._variables = gather_to_all_devices(dict(variables), self._everywhere)
        return other

    @property
    def model_hw(self) -> tuple[int, int]:
        """Height and width of the model's input, pixels."""
        return self._model.image_size

    @property
    def num_patches(self) -> int:
        """Patches of an image, a random number each."""
        return self._model.num_patches

    @property
    def images_per_call(self) -> int:
        """Images that are answered at once, at most."""
        return self._images_per_call

    def fingerprint(self) -> str:
        """A short name of weights and channels, the same wherever they are kept."""
        return fingerprint_of(self._variables, self._model.channels)

    def reconstruct(
        self,
        images: UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"],
        noise: Float[np.ndarray, "n k"],
    ) -> Reconstructions:
        """Losses and pictures of up to ``images_per_call`` images of the model's size.

        Args:
          images: RGB, or other channels of the model.
          noise: see ``random_masking``.
        """
        missing = self._images_per_call - len(images)
        padded = [
            np.pad(array, ((0, missing),) + ((0, 0),) * (array.ndim - 1))
            for array in (images, noise)
        ]
        placed = jax.device_put(padded, self._by_image)
        losses, seen, whole = self._reconstruct(self._variables, *placed)
        channels = self._model.channels
        return Reconstructions(np.asarray(losses)[: len(images)], seen, whole, channels)

    def _reconstruct_on_device(
        self,
        variables: Any,
        images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
        noise: Float[Array, "b k"],
    ) -> tuple[Array, Array, Array]:
        model = self._model
        pixels = normalize_whole_images(images, model.channels)
        predictions, mask = model.reconstruct(variables, pixels, noise)
        losses = model.errors(pixels, predictions, mask).mean(axis=1)
        seen = blanked(pixels, mask, model.encoder)
        return losses, seen, model.reconstruction(pixels, predictions, mask)
