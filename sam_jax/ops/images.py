"""Images as the model takes them."""

import jax.numpy as jnp
import numpy as np

from sam_jax.arrays import Array, Bool, Float, Int, UInt8

# Channel statistics of ImageNet in 8-bit units, RGB.
PIXEL_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
PIXEL_STD = np.array([58.395, 57.12, 57.375], np.float32)


def valid_area(image_hw: Int[Array, "b 2"], size: tuple[int, int]) -> Bool[Array, "b h w"]:
    """True where the image is, False on the padding at its bottom and right."""
    rows = jnp.arange(size[0])[None, :, None] < image_hw[:, 0, None, None]
    columns = jnp.arange(size[1])[None, None, :] < image_hw[:, 1, None, None]
    return rows & columns


def normalize_images(
    images: UInt8[Array, "b h w 3"], image_hw: Int[Array, "b 2"]
) -> Float[Array, "b h w 3"]:
    """Images with ImageNet's mean and deviation removed, padding set to zero afterwards.

    Done on the device, so that bytes and not floats cross from the host.
    """
    normalized = normalize_whole_images(images)
    return jnp.where(valid_area(image_hw, images.shape[1:3])[..., None], normalized, 0.0)


def normalize_whole_images(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """``normalize_images`` of images without padding."""
    return (images.astype(jnp.float32) - PIXEL_MEAN) / PIXEL_STD


def as_pixels(images: Float[np.ndarray, "*shape 3"]) -> UInt8[np.ndarray, "*shape 3"]:
    """Normalised images as 8-bit RGB again, what lies beyond cut off."""
    return np.clip(np.rint(images * PIXEL_STD + PIXEL_MEAN), 0, 255).astype(np.uint8)
