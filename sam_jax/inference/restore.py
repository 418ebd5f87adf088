"""From the decoder's low-resolution logits to a mask of the original image, on the host.

Images of one dataset differ in size, so this step would compile anew for each on a device; and
the low-resolution logits are a sixteenth of what the device would send after upsampling them.
"""

import cv2
import numpy as np

from sam_jax.arrays import Bool, Float


def restore_mask(
    low_res_logits: Float[np.ndarray, "lh lw"],
    model_hw: tuple[int, int],
    resized_hw: tuple[int, int],
    original_hw: tuple[int, int],
) -> Bool[np.ndarray, "oh ow"]:
    """The mask in the original image's pixels: where ``restore_logits`` exceeds 0."""
    return restore_logits(low_res_logits, model_hw, resized_hw, original_hw) > 0


def restore_logits(
    low_res_logits: Float[np.ndarray, "lh lw"],
    model_hw: tuple[int, int],
    resized_hw: tuple[int, int],
    original_hw: tuple[int, int],
) -> Float[np.ndarray, "oh ow"]:
    """Logits in the original image's pixels.

    Bilinear to the model's input size, padding cropped away, bilinear to the original size; half-
    pixel centres, edges clamped, no antialiasing (PyTorch's ``align_corners=False``).

    Args:
      low_res_logits: of one mask, unbounded.
      model_hw: size of the model's padded input.
      resized_hw: size of the image within that input, at its top left.
      original_hw: size of the image before it was resized.

    Source: segment-anything, ``postprocess_masks``.
    """
    logits = _resize(low_res_logits, model_hw)[: resized_hw[0], : resized_hw[1]]
    return _resize(logits, original_hw)


def _resize(logits, size_hw):
    return cv2.resize(logits, size_hw[::-1], interpolation=cv2.INTER_LINEAR)
