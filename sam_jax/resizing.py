"""Resizing images on the host, as the published model does."""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image


def fit_longest_side(
    hw: tuple[int, int], target_hw: tuple[int, int], scale: float = 1.0
) -> tuple[int, int]:
    """The size that makes an image just fit: (h, w) in pixels, each >= 1.

    The image is scaled by min(H / h, W / w) * scale; sides are rounded half
    up, and with scale 1 never exceed the target.

    Source: Appendix A, image encoder ("rescaling the image and padding the
        shorter side").
    Differs: H and W may differ.

    Args:
      hw: the image's height and width.
      target_hw: the model input's.
      scale: 1.0 fits exactly; 2.0 gives twice that size.
    """
    ratio = min(target_hw[0] / hw[0], target_hw[1] / hw[1]) * scale
    return max(1, int(hw[0] * ratio + 0.5)), max(1, int(hw[1] * ratio + 0.5))


def resize_image(
    image: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w c"] | Image.Image,
    scaled_hw: tuple[int, int],
    crop_yx: tuple[int, int] = (0, 0),
    crop_hw: tuple[int, int] | None = None,
    extent_hw: tuple[float, float] | None = None,
) -> UInt8[np.ndarray, "h2 w2 3"] | Float32[np.ndarray, "h2 w2 c"]:
    """The image at another size, or a window of it.

    Bilinear with antialiasing (Pillow), which is what the published
    checkpoints saw.

    Args:
      image: RGB, as an array or Pillow's; or float32 values of other channels.
      scaled_hw: the size the whole image is scaled to.
      crop_yx: upper left corner of the window, in pixels of the scaled image.
      crop_hw: the window's size; None keeps everything.
      extent_hw: how many of its pixels make up the whole image, where the last are cut short; None
        is all of them.
    """
    h, w = extent_hw or image_hw(image)
    crop_hw = crop_hw or scaled_hw
    y_scale, x_scale = h / scaled_hw[0], w / scaled_hw[1]
    box = (
        crop_yx[1] * x_scale,
        crop_yx[0] * y_scale,
        min((crop_yx[1] + crop_hw[1]) * x_scale, w),
        min((crop_yx[0] + crop_hw[0]) * y_scale, h),
    )
    return resample(image, crop_hw, box, Image.Resampling.BILINEAR)


def resample(
    image: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w c"] | Image.Image,
    size_hw: tuple[int, int],
    box_xyxy: tuple[float, float, float, float],
    method: Image.Resampling,
) -> UInt8[np.ndarray, "h2 w2 3"] | Float32[np.ndarray, "h2 w2 c"]:
    """A part of an image at another size, by one of Pillow's methods, with antialiasing.

    Float32 values are resampled channel by channel with the same weights, and neither rounded nor
    cut off.

    Args:
      image: see ``resize_image``.
      size_hw: of the result.
      box_xyxy: edges of the part in pixels of the image.
      method: which.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            planes = [
                Image.fromarray(np.ascontiguousarray(image[..., channel]))
                for channel in range(image.shape[2])
            ]
            resized = [plane.resize(size_hw[::-1], method, box=box_xyxy) for plane in planes]
            return np.stack([np.asarray(plane) for plane in resized], axis=-1)
        image = Image.fromarray(image)
    return np.asarray(image.resize(size_hw[::-1], method, box=box_xyxy))


def image_hw(
    image: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w c"] | Image.Image,
) -> tuple[int, int]:
    """Height and width of an image, an array or Pillow's."""
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    return image.height, image.width
