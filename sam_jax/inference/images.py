"""Images as the model takes them, and their embeddings as values that can be kept."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sam_jax.arrays import Array, Float, Int, UInt8
from sam_jax.resizing import fit_longest_side, resize_image
from sam_jax.weights.files import WeightsError, read_tensors, write_safetensors


def model_input(
    image: UInt8[np.ndarray, "oh ow 3"] | Float[np.ndarray, "oh ow c"], size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w c"], tuple[int, int]]:
    """An image resized to fit and padded at the bottom and right, and its size without padding."""
    resized_hw = fit_longest_side(image.shape[:2], size)
    padded = np.zeros((*size, image.shape[2]), image.dtype)
    padded[: resized_hw[0], : resized_hw[1]] = resize_image(image, resized_hw)
    return padded, resized_hw


@dataclasses.dataclass(frozen=True, eq=False)
class ImageEmbeddings:
    """Embeddings and sizes of images: all that prompting them needs.

    Attributes:
      features: the encoder's output.
      original_hw: sizes of the images as they came, pixels.
      resized_hw: their sizes within the model's input.
      model_hw: size of the model's input.
    """

    features: Float[Array, "b gh gw d"]
    original_hw: Int[np.ndarray, "b 2"]
    resized_hw: Int[np.ndarray, "b 2"]
    model_hw: tuple[int, int]

    def __len__(self) -> int:
        return len(self.original_hw)

    def __getitem__(self, images: Any) -> "ImageEmbeddings":
        """Embeddings of some of the images: of one by its number, of several by a slice or a list.

        Raises:
          IndexError: if there is no such image.
          TypeError: if it is none of these.
        """
        # A list of no numbers is one of floats to numpy.
        chosen = np.zeros(0, int) if isinstance(images, list) and not images else images
        rows = np.atleast_1d(np.arange(len(self))[chosen])
        if rows.ndim != 1 or images is None or isinstance(images, bool):
            raise TypeError(
                "image embeddings are taken by a number, a slice or a list of numbers, not by "
                f"{images!r}"
            )
        return dataclasses.replace(
            self,
            features=self.features[rows],
            original_hw=self.original_hw[rows],
            resized_hw=self.resized_hw[rows],
        )

    def save(self, path: str | Path) -> None:
        """Writes a ``.safetensors`` file, whole or not at all."""
        write_safetensors(
            Path(path),
            {
                "features": np.asarray(self.features, np.float32),
                "original_hw": self.original_hw,
                "resized_hw": self.resized_hw,
                "model_hw": np.array(self.model_hw, np.int64),
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> "ImageEmbeddings":
        """Reads what ``save`` wrote.

        Raises:
          WeightsError: if the file is damaged, or holds something else.
        """
        tensors = read_tensors(Path(path))
        fields = {"features", "original_hw", "resized_hw", "model_hw"}
        if set(tensors) != fields:
            raise WeightsError(
                f"{path} holds no image embeddings: expected {sorted(fields)}, found "
                f"{sorted(tensors)[:8]}"
            )
        height, width = tensors["model_hw"].tolist()
        return cls(
            jax.numpy.asarray(tensors["features"]),
            tensors["original_hw"],
            tensors["resized_hw"],
            (height, width),
        )
