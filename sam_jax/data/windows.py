"""The part of a model input that an image fills: where it lies, and pixels that can wait."""

import dataclasses
import functools
import hashlib
from collections.abc import Container
from typing import NamedTuple

import cv2
import numpy as np
import PIL
from jaxtyping import Float32, UInt8
from PIL import Image

from sam_jax import resizing
from sam_jax.data.samples import Sample, image_hw, is_turned, open_reduced
from sam_jax.images import Orientation
from sam_jax.resizing import resize_image

# A decoder that reduces an image has removed what is too fine for the result. What is left to
# reduce, if little, needs no antialiasing, and bilinear interpolation without it is four times as
# fast. Up to here the difference to decoding and resizing in full stays what the decoder makes it.
_SMALL_STEP = 1.25
# What decodes and resizes; another version may give other pixels.
_DECODERS = f"Pillow {PIL.__version__}, OpenCV {cv2.__version__}"


class Placement(NamedTuple):
    """Position of the image in the input: resized to `scaled_hw`, `crop_hw` of it kept."""

    scaled_hw: tuple[int, int]
    crop_yx: tuple[int, int]
    crop_hw: tuple[int, int]
    flip: bool

    @classmethod
    def whole(cls, scaled_hw: tuple[int, int], flip: bool) -> "Placement":
        """All of the image, at the upper left."""
        return cls(scaled_hw, (0, 0), scaled_hw, flip)


@dataclasses.dataclass(frozen=True)
class Window:
    """Part of an image that is shown to the model, still encoded.

    Attributes:
      sample: whose image it is.
      placement: where the image lies.
      reduced_decoding: as `TrainTransform.reduced_decoding`.
    """

    sample: Sample
    placement: Placement
    reduced_decoding: bool

    def without_masks(self) -> "Window":
        """The same window of a sample that has no masks to carry."""
        sample = self.sample
        if isinstance(sample.image, bytes):
            # The masks may have told which way up the image is.
            way: Orientation = "upright" if is_turned(sample) else "stored"
            sample = dataclasses.replace(sample, orientation=way)
        sample = dataclasses.replace(sample, masks_rle=(), unusable_masks=(), remarks=())
        return dataclasses.replace(self, sample=sample)

    @functools.cached_property
    def digest(self) -> str:
        """A name that no window of other pixels has, found without decoding any.

        Raises:
          CorruptSampleError: the bytes are no readable image.
        """
        image = self.sample.image
        followed_from: list[object] = [
            *(tuple(self.placement), self.reduced_decoding, self.sample.in_channels, _DECODERS)
        ]
        if isinstance(image, bytes):
            followed_from.append(is_turned(self.sample))
            hashed = hashlib.blake2b(image, digest_size=16)
        else:
            followed_from += [image.shape, image.dtype.name]
            hashed = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16)
        hashed.update(repr(followed_from).encode())
        return hashed.hexdigest()

    def pixels(self) -> UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w c"]:
        """The window's pixels, decoded and resized.

        Raises:
          CorruptSampleError: the image is unreadable.
        """
        placement = self.placement
        at_least_hw = placement.scaled_hw if self.reduced_decoding else None
        image, reduction = open_reduced(self.sample, at_least_hw)
        pixels = resize_reduced(image, reduction, image_hw(self.sample), placement)
        return np.ascontiguousarray(pixels[:, ::-1] if placement.flip else pixels)


class LazyImage(NamedTuple):
    """An image that is decoded only if that is needed.

    Attributes:
      digest: of the window, see `Window.digest`.
      source: the window, which has been decoded without a fault before, or its pixels.
    """

    digest: str
    source: Window | UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w c"]

    @classmethod
    def of(cls, window: Window, known: Container[str]) -> "LazyImage":
        """The image of a window: decoded, unless one of its digest is known to be in order.

        Raises:
          CorruptSampleError: the image is unreadable.
        """
        if window.digest in known:
            return cls(window.digest, window.without_masks())
        return cls(window.digest, window.pixels())

    def pixels(self) -> UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w c"]:
        """The window's pixels."""
        return self.source.pixels() if isinstance(self.source, Window) else self.source


def resize_reduced(
    image: Image.Image | Float32[np.ndarray, "h w c"],
    reduction: int,
    hw: tuple[int, int],
    placement: Placement,
) -> UInt8[np.ndarray, "h2 w2 3"] | Float32[np.ndarray, "h2 w2 c"]:
    """The placed part of an image that was decoded to a fraction of its size `hw`."""
    extent_hw = hw[0] / reduction, hw[1] / reduction
    steps = [have / want for have, want in zip(extent_hw, placement.scaled_hw, strict=True)]
    is_whole = placement.crop_hw == placement.scaled_hw and extent_hw == resizing.image_hw(image)
    if reduction > 1 and is_whole and max(steps) <= _SMALL_STEP:
        return cv2.resize(np.asarray(image), placement.scaled_hw[::-1])
    return resize_image(image, placement.scaled_hw, placement.crop_yx, placement.crop_hw, extent_hw)
