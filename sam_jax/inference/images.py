"""Images as users have them, and their embeddings as values that can be kept."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps

from sam_jax.arrays import Array, Float, Int, UInt8
from sam_jax.convert.files import WeightsError, read_tensors, write_safetensors
from sam_jax.data.rle import MAX_SIDE_PX
from sam_jax.data.samples import DECODE_ERRORS
from sam_jax.data.transforms import fit_longest_side, resize_image
from sam_jax.errors import UserError


class ImageError(UserError, ValueError):
    """An image that cannot be segmented as it is; the message says why and what to do."""


def as_rgb(image: Any, name: str = "image") -> UInt8[np.ndarray, "h w 3"]:
    """An image as 8-bit RGB.

    Grey images (``[h, w]`` or ``[h, w, 1]``) are repeated over the channels, of RGBA the
    transparency is dropped. Everything else is refused: how to bring other types to 8 bits depends
    on what they mean.

    Args:
      image: an array, or what numpy makes one of, such as an image of Pillow's.
      name: what to call it in messages.

    Raises:
      ImageError: if it is empty, not 8-bit, or of another shape.
    """
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ImageError(
            f"{name} has shape {np.shape(image)}: expected [h, w, 3] (RGB), [h, w, 4] (RGBA), "
            "[h, w] or [h, w, 1] (grey)"
        )
    if 0 in array.shape:
        raise ImageError(f"{name} is empty: its shape is {np.shape(image)}")
    if max(array.shape) > MAX_SIDE_PX:
        raise ImageError(f"{name} is too large: {array.shape[:2]}, at most {MAX_SIDE_PX} a side")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        hint = {
            "u": "for 16 bits, (image // 257).astype('uint8') keeps the full range",
            "f": "for floats in [0, 1], (255 * image).round().astype('uint8')",
        }.get(array.dtype.kind, "convert it to uint8")
        raise ImageError(f"{name} has type {array.dtype}, expected uint8 in [0, 255]; {hint}")
    channels = array[..., :3]
    return np.ascontiguousarray(np.broadcast_to(channels, (*channels.shape[:2], 3)))


def allow_large_pictures() -> None:
    """Lets Pillow open pictures up to a gigapixel; by default it takes large ones for attacks."""
    Image.MAX_IMAGE_PIXELS = 2**30


def open_image(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """A picture file as 8-bit RGB, turned upright as its camera says.

    Raises:
      ImageError: if it is missing, damaged or no picture, or not of 8 bits.
    """
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            # Palettes and other spaces of 8 bits have a meaning; types of more bits have none here.
            is_deep = upright.mode in ("F", "I") or upright.mode.startswith("I;")
            return as_rgb(upright if is_deep else upright.convert("RGB"), str(path))
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is too large: {error}") from None
    except ImageError:
        raise
    except DECODE_ERRORS as error:
        raise ImageError(f"{path} is damaged or no picture: {error}") from None


def model_input(
    image: UInt8[np.ndarray, "oh ow 3"], size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
    """An image resized to fit and padded at the bottom and right, and its size without padding."""
    resized_hw = fit_longest_side(image.shape[:2], size)
    padded = np.zeros((*size, 3), np.uint8)
    padded[: resized_hw[0], : resized_hw[1]] = resize_image(image, resized_hw)
    return padded, resized_hw


@dataclasses.dataclass(frozen=True, eq=False)
class ImageEmbeddings:
    """What a model keeps of images: all that prompting them needs.

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
        """Those of some of the images: of one by its number, of several by a slice or a list.

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
