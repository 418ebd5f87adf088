"""Image embeddings that are computed once and kept on disk, for training what comes after them.

A frozen encoder gives the same embeddings of an image in every epoch. An entry is found by what it
follows from: the image's content and what is shown of it, the encoder's shape and weights, what
pixels are normalised by, and the type that it computes in. So nothing stale is ever found, whatever
the order of the images, their files' names or the data sets that they are in, and runs and hosts
share a folder without a word to each other. No image is decoded that has an entry.
"""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from sam_jax import places
from sam_jax.arrays import Array, Float, Int, UInt8
from sam_jax.data.transforms import LAZY_IMAGES
from sam_jax.data.windows import LazyImage
from sam_jax.models.sam import Sam
from sam_jax.ops.dispatch import Kernels
from sam_jax.ops.images import RGB, normalize_images
from sam_jax.parallel import Parallel, gather_to_all_devices
from sam_jax.weights.files import failing_as_os_error, written_whole

FIELD = "image_embeddings"
_CHECKSUM = "blake2b"
_ENCODER = "image_encoder"

_log = logging.getLogger(__name__)

Fields = Mapping[str, np.ndarray]


class EmbeddingCache:
    """Image embeddings of one encoder in a folder, a file each, float16.

    A file is written whole or not at all, and holds a checksum: one that is damaged all the same is
    not used, and said. Nothing is kept in memory.

    Args:
      folder: of all encoders.
      encoder: name of this one, see ``encoder_name``.
      shape: of the embeddings of an image.

    Raises:
      PlaceError: if the folder cannot be written to.
    """

    def __init__(self, folder: Path, encoder: str, shape: tuple[int, int, int]):
        places.check_folder(folder)
        self._folder = folder / encoder
        self._shape = shape

    @property
    def folder(self) -> Path:
        """Folder of this encoder's embeddings."""
        return self._folder

    def __len__(self) -> int:
        return sum(1 for _ in self._folder.glob("??/*.safetensors"))

    def read(self, key: str) -> Float[np.ndarray, "gh gw d"] | None:
        """The embeddings of an image, None if they are not there or damaged."""
        path = _entry(self._folder, key)
        try:
            with safe_open(path, framework="numpy") as file:
                found, said = file.get_tensor(FIELD), (file.metadata() or {}).get(_CHECKSUM)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            _say_damaged(path, str(error))
            return None
        if found.shape != self._shape or found.dtype != np.float16:
            _say_damaged(path, f"it holds {found.dtype} {found.shape}")
            return None
        if said != _digest(found):
            _say_damaged(path, "its checksum is another")
            return None
        return found

    def write(self, key: str, embeddings: Float[np.ndarray, "gh gw d"]) -> None:
        """Keeps the embeddings of an image.

        Raises:
          WeightsError: if the disk is full, or was taken away.
        """
        kept = np.ascontiguousarray(embeddings, np.float16)
        with (
            written_whole(_entry(self._folder, key)) as unfinished,
            failing_as_os_error(SafetensorError),
        ):
            safetensors.numpy.save_file({FIELD: kept}, unfinished, {_CHECKSUM: _digest(kept)})


@dataclasses.dataclass(frozen=True)
class KnownImages:
    """Digests of the images that have embeddings of any encoder, of which each was decoded once.

    Attributes:
      folder: of all encoders.
    """

    folder: Path

    def __contains__(self, digest: object) -> bool:
        try:
            encoders = [entry.path for entry in os.scandir(self.folder) if entry.is_dir()]
        except FileNotFoundError:
            return False
        return any(_entry(Path(encoder), str(digest)).is_file() for encoder in encoders)


def _entry(folder: Path, digest: str) -> Path:
    """The file of an image, in an encoder's folder."""
    return folder / digest[:2] / f"{digest}.safetensors"


def _say_damaged(path: Path, reason: str) -> None:
    _log.warning("%s is damaged, and computed again: %s", path, reason)


def encoder_name(model: Sam, encoder_params: Any) -> str:
    """A name that no other encoder has: of shape, channels, weights and the type it computes in."""
    hashed = hashlib.blake2b(digest_size=16)
    config = model.config
    # Those of published weights were not named at first, and embeddings of them are kept.
    channels = "" if config.channels == RGB else f" {config.channels!r}"
    hashed.update(f"{config.image_encoder!r} {np.dtype(model.dtype).name}{channels}".encode())
    flat = flax.traverse_util.flatten_dict(encoder_params, sep="/")
    for path in sorted(flat):
        hashed.update(path.encode())
        hashed.update(np.ascontiguousarray(flat[path]).data)
    return hashed.hexdigest()


def _digest(array: np.ndarray) -> str:
    return hashlib.blake2b(array.data, digest_size=16).hexdigest()


class EmbeddingStage:
    """A stage between input pipeline and step, in which images become image embeddings.

    Each process embeds its own images on its own devices, one on each at a time. The position of
    the data is that of the pipeline: nothing is read ahead.

    Args:
      model: whose encoder it is.
      folder: of the cache.
      kernels: see ``ops.dispatch.Target``.
    """

    def __init__(self, model: Sam, folder: str | Path, kernels: Kernels = "auto"):
        self._model = model
        self._root = Path(folder).expanduser()
        mesh = Mesh(np.array(jax.local_devices()), ("image",))
        self._by_image = NamedSharding(mesh, PartitionSpec("image"))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        encode = Parallel(mesh, ("image",), kernels=kernels).encode(model)

        def embed(
            params: Any,
            images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
            image_hw: Int[Array, "b 2"],
        ) -> Float[Array, "b gh gw d"]:
            normalized = normalize_images(images, image_hw, model.config.channels)
            return encode(params, normalized, None).astype(np.float16)

        self._embed = jax.jit(embed)

    def __call__(
        self,
        batches: Iterator[Fields],
        variables: Mapping[str, Any],
        say: Callable[[str], None] = lambda text: None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches with the field ``image_embeddings`` in place of ``lazy_images``.

        Args:
          batches: of the input pipeline.
          variables: of the model, whose encoder does not change; with several processes all must
            call together.
          say: told where embeddings are kept, and how many there are.

        Raises:
          PlaceError, WeightsError: if they cannot be kept.
        """
        params = jax.device_get(
            gather_to_all_devices({_ENCODER: variables["params"][_ENCODER]}, self._everywhere)
        )
        encoder = self._model.config.image_encoder
        cache = EmbeddingCache(
            self._root,
            encoder_name(self._model, params[_ENCODER]),
            (*encoder.grid, encoder.output_dim),
        )
        say(f"image embeddings are kept in {cache.folder}; {len(cache)} are there")
        return self._embedded(batches, params, cache)

    def _embedded(
        self, batches: Iterator[Fields], params: Any, cache: EmbeddingCache
    ) -> Iterator[dict[str, np.ndarray]]:
        # On the devices only while there is something to embed.
        placed: Any = None
        for batch in batches:
            images = {image.digest: image for image in batch[LAZY_IMAGES]}
            read = {digest: cache.read(digest) for digest in images}
            found = {digest: array for digest, array in read.items() if array is not None}
            missing = [image for digest, image in images.items() if digest not in found]
            if missing:
                placed = placed or jax.device_put(params, self._everywhere)
                for image, embeddings in zip(missing, self._computed(placed, missing), strict=True):
                    cache.write(image.digest, embeddings)
                    found[image.digest] = embeddings
            else:
                placed = None
            others = {name: array for name, array in batch.items() if name != LAZY_IMAGES}
            yield {FIELD: np.stack([found[image.digest] for image in batch[LAZY_IMAGES]]), **others}

    def _computed(
        self, params: Any, images: Sequence[LazyImage]
    ) -> Iterator[Float[np.ndarray, "gh gw d"]]:
        """Embeddings of each image, in calls of one size."""
        size, channels = self._by_image.mesh.size, self._model.config.channels
        for start in range(0, len(images), size):
            part = images[start : start + size]
            inputs = np.zeros((size, *self._model.image_size, channels.count), channels.dtype)
            sizes = np.zeros((size, 2), np.int32)
            for image, input_, input_hw in zip(part, inputs, sizes, strict=False):
                pixels = image.pixels()
                input_hw[:] = pixels.shape[:2]
                input_[: pixels.shape[0], : pixels.shape[1]] = pixels
            placed = jax.device_put((inputs, sizes), self._by_image)
            yield from np.asarray(self._embed(params, *placed))[: len(part)]
