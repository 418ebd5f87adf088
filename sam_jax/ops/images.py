"""Images as the model takes them."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from sam_jax.arrays import Array, Bool, Float, Int, Shaped, UInt8


@dataclasses.dataclass(frozen=True)
class ImageChannels:
    """Channels of a model's images, and the statistics that they are normalised by.

    Attributes:
      in_chans: number of channels, whose values are those of the files, float32; None for 8-bit
        RGB.
      pixel_mean: of each channel, in the units of the files.
      pixel_std: deviation of each channel, likewise; by default both are ImageNet's.

    Raises:
      ValueError: if these are no statistics of so many channels.
    """

    in_chans: int | None = None
    pixel_mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, ...] = (58.395, 57.12, 57.375)

    def __post_init__(self):
        if self.in_chans is not None and (
            isinstance(self.in_chans, bool) or not isinstance(self.in_chans, int)
        ):
            raise ValueError(f"in_channels = {self.in_chans!r}: expected a number of channels")
        if self.in_chans is not None and self.in_chans < 1:
            raise ValueError(f"in_channels = {self.in_chans}: expected at least 1")
        for name in ("pixel_mean", "pixel_std"):
            object.__setattr__(self, name, self._checked(name, getattr(self, name)))

    def _checked(self, name: str, found: Any) -> tuple[float, ...]:
        try:
            values = tuple(float(value) for value in found)
        except (TypeError, ValueError):
            values = ()
        fits = len(values) == self.count and all(map(math.isfinite, values))
        if not fits or (name == "pixel_std" and min(values) <= 0):
            kind = "finite numbers above 0" if name == "pixel_std" else "finite numbers"
            of = "red, green and blue" if self.in_chans is None else f"{self.count} channels"
            raise ValueError(
                f"{name} = {found!r}: expected {self.count} {kind}, one for each of {of}, in the "
                "units of the files; `sam-jax channels FILES` computes them"
            )
        return values

    @property
    def count(self) -> int:
        """Number of channels."""
        return 3 if self.in_chans is None else self.in_chans

    @property
    def statistics(self) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
        """Mean and deviation of each channel, float32."""
        return np.array(self.pixel_mean, np.float32), np.array(self.pixel_std, np.float32)

    @property
    def dtype(self) -> type[np.uint8] | type[np.float32]:
        """Type of the pixels on their way to the device."""
        return np.uint8 if self.in_chans is None else np.float32

    def __str__(self) -> str:
        if self == RGB:
            return "8-bit RGB"
        kind = "8-bit RGB" if self.in_chans is None else f"{self.count}, values as stored"
        mean, std = (
            ", ".join(f"{value:.6g}" for value in values)
            for values in (self.pixel_mean, self.pixel_std)
        )
        return f"{kind}; mean {mean}; deviation {std}"


# What published weights take.
RGB = ImageChannels()


def valid_area(image_hw: Int[Array, "b 2"], size: tuple[int, int]) -> Bool[Array, "b h w"]:
    """True where the image is, False on the padding at its bottom and right."""
    rows = jnp.arange(size[0])[None, :, None] < image_hw[:, 0, None, None]
    columns = jnp.arange(size[1])[None, None, :] < image_hw[:, 1, None, None]
    return rows & columns


def normalize_images(
    images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
    image_hw: Int[Array, "b 2"],
    channels: ImageChannels = RGB,
) -> Float[Array, "b h w c"]:
    """Images with their channels' mean and deviation removed, padding set to zero afterwards.

    Done on the device, so that of 8-bit images bytes and not floats cross from the host.

    Args:
      images: 8-bit RGB, or values as they are stored.
      image_hw: height and width of each image without its padding.
      channels: whose statistics they are; by default ImageNet's.
    """
    normalized = normalize_whole_images(images, channels)
    return jnp.where(valid_area(image_hw, images.shape[1:3])[..., None], normalized, 0.0)


def normalize_whole_images(
    images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"], channels: ImageChannels = RGB
) -> Float[Array, "b h w c"]:
    """``normalize_images`` of images without padding."""
    mean, std = channels.statistics
    return (images.astype(jnp.float32) - mean) / std


def as_pixels(
    images: Float[np.ndarray, "*shape c"], channels: ImageChannels = RGB
) -> Shaped[np.ndarray, "*shape c"]:
    """Normalised images in the units of their files again; 8-bit ones rounded and cut off."""
    mean, std = channels.statistics
    pixels = images * std + mean
    if channels.in_chans is not None:
        return pixels
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
