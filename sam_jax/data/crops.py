"""From a `Sample` to a crop of its image, without masks: what pre-training sees."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image

from sam_jax import resizing
from sam_jax.data.samples import Sample, image_hw, open_reduced
from sam_jax.data.transforms import image_zeros

# Crops are drawn so often before the middle of the image is taken instead.
_NUM_DRAWS = 10


class Box(NamedTuple):
    """A part of an image: its first row and column, and its size, in pixels."""

    y: float
    x: float
    height: float
    width: float


class CropExample(NamedTuple):
    """An image of the size of the model input, RGB or of other channels."""

    image: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w c"]

    def unpack_into(self, batch: Mapping[str, Shaped[np.ndarray, "..."]], row: int) -> None:
        """Writes the example into a batch; see `CropTransform.zeros`."""
        batch["image"][row] = self.image


@dataclass(frozen=True)
class CropTransform:
    """Makes images alone: a random crop, resized to the whole model input, perhaps flipped.

    Attributes:
      image_size: (H, W) of the model input, pixels.
      crop_area_rates: least and most part of an image's area that a crop shows, drawn uniformly.
      crop_aspect_rates: least and most width of a crop over its height, in units of the model
        input's, drawn uniformly by its logarithm.
      hflip_rate: probability of a horizontal flip.
      reduced_decoding: as `TrainTransform.reduced_decoding`.
      in_channels: as `TrainTransform.in_channels`.

    Source: Szegedy et al. 2015, section 6, in the form that He et al. 2022 (MAE), appendix A.1,
        pre-train with: parts of 0.2 to 1, bicubic, flips, and nothing else.
    """

    image_size: tuple[int, int]
    crop_area_rates: tuple[float, float] = (0.2, 1.0)
    crop_aspect_rates: tuple[float, float] = (3 / 4, 4 / 3)
    hflip_rate: float = 0.5
    reduced_decoding: bool = True
    in_channels: int | None = None

    def __post_init__(self):
        if min(self.image_size) < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}")
        low, high = self.crop_area_rates
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"crop_area_rates must be 0 < low <= high <= 1, got {self.crop_area_rates}"
            )
        low, high = self.crop_aspect_rates
        if not 0 < low <= high:
            raise ValueError(
                f"crop_aspect_rates must be 0 < low <= high, got {self.crop_aspect_rates}"
            )

    def zeros(self, batch_size: int) -> dict[str, np.ndarray]:
        """A batch to write examples into."""
        return {"image": image_zeros((batch_size, *self.image_size), self.in_channels)}

    def packed(self, sample: Sample, rng: np.random.Generator) -> tuple[CropExample, tuple[()]]:
        """A training example; masks are not looked at, so none is dropped.

        Raises:
          CorruptSampleError: the image cannot be read.
        """
        hw = image_hw(sample)
        box = self._draw(hw, rng)
        at_least_hw = None
        if self.reduced_decoding:
            # The size of the whole image at which the crop has that of the model input.
            at_least_hw = (
                math.ceil(hw[0] * self.image_size[0] / box.height),
                math.ceil(hw[1] * self.image_size[1] / box.width),
            )
        image, reduction = open_reduced(sample, at_least_hw)
        reduced = Box(*(value / reduction for value in box))
        crop = resized_crop(image, reduced, self.image_size)
        if rng.random() < self.hflip_rate:
            crop = crop[:, ::-1]
        return CropExample(np.ascontiguousarray(crop)), ()

    def _draw(self, hw: tuple[int, int], rng: np.random.Generator) -> Box:
        low, high = self.crop_aspect_rates
        unit = self.image_size[1] / self.image_size[0]
        for _ in range(_NUM_DRAWS):
            area = hw[0] * hw[1] * rng.uniform(*self.crop_area_rates)
            aspect = unit * math.exp(rng.uniform(math.log(low), math.log(high)))
            width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < height <= hw[0] and 0 < width <= hw[1]:
                y = int(rng.integers(hw[0] - height + 1))
                x = int(rng.integers(hw[1] - width + 1))
                return Box(y, x, height, width)
        # The image is so narrow that no such part fits into it.
        return central_box(hw, unit * min(max(hw[1] / hw[0] / unit, low), high))


def central_box(hw: tuple[int, int], aspect: float) -> Box:
    """The largest part in the middle of an image whose width over its height is `aspect`."""
    height, width = min(hw[0], hw[1] / aspect), min(hw[1], hw[0] * aspect)
    return Box((hw[0] - height) / 2, (hw[1] - width) / 2, height, width)


def central_crop(
    image: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w c"], size_hw: tuple[int, int]
) -> UInt8[np.ndarray, "h2 w2 3"] | Float32[np.ndarray, "h2 w2 c"]:
    """The largest part in the middle of an image that has the form of a size, at that size."""
    box = central_box((image.shape[0], image.shape[1]), size_hw[1] / size_hw[0])
    return resized_crop(image, box, size_hw)


def resized_crop(
    image: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w c"] | Image.Image,
    box: Box,
    size_hw: tuple[int, int],
) -> UInt8[np.ndarray, "h2 w2 3"] | Float32[np.ndarray, "h2 w2 c"]:
    """A part of an image at another size, bicubic with antialiasing."""
    # A reduced image may end within its last pixel.
    height, width = resizing.image_hw(image)
    right, bottom = min(box.x + box.width, width), min(box.y + box.height, height)
    corners = (box.x, box.y, right, bottom)
    return resizing.resample(image, size_hw, corners, Image.Resampling.BICUBIC)
