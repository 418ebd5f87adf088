"""The one form in which every source hands over an image with its masks."""

import io
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from PIL import Image, UnidentifiedImageError

from sam_jax.data import rle as rle_codec

_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
_ORIENTATION = 0x0112  # the EXIF tag
_T = TypeVar("_T")
# What Pillow's decoders raise on damaged bytes (found by fuzzing them).
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class SkippedSampleError(Exception):
    """A sample of the dataset that is not used.

    Attributes:
        name: the sample, as in `Sample.name`.
        reason: a short fixed phrase, by which occurrences are counted.
        detail: what exactly was found, for the log.
    """

    def __init__(self, name: str, reason: str, detail: str = ""):
        super().__init__(name, reason, detail)
        self.name = name
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.name}: {self.reason}{detail}"


class CorruptSampleError(SkippedSampleError):
    """An image or mask of the dataset that cannot be used.

    Data errors only: a wrong path in a config or a bug raises something else
    and stops the run. Reasons are "missing image", "truncated image",
    "unreadable image", "missing json", "malformed json", "bad rle",
    "size mismatch", "no valid mask", "truncated tar", ...
    """


class NoObjectError(SkippedSampleError):
    """An image in which nothing is marked, or nothing that the filters let pass: no damage.

    Reasons are "no annotation", "only empty masks" and "only filtered masks".
    """


@dataclass(frozen=True)
class Sample:
    """An image with its masks, still encoded.

    Attributes:
        image: an encoded file (JPEG, PNG, BMP, TIFF or WebP) or uint8
            [h, w, 3] RGB.
        masks_rle: one {"size": [h, w], "counts": ...} per mask, counts
            compressed (bytes or str) or a list. Not validated yet.
        dataset: which source it comes from.
        name: the file, or tar::member, for messages and results.
        unusable_masks: what was wrong with each annotation that the source
            could not express as an RLE at all.
        remarks: (reason, detail) of what was left out or changed about masks
            that are used, such as a part of a polygon.
    """

    image: bytes | np.ndarray
    masks_rle: tuple[dict[str, Any], ...]
    dataset: str
    name: str
    unusable_masks: tuple[str, ...] = ()
    remarks: tuple[tuple[str, str], ...] = ()


def decode_image(sample: Sample) -> UInt8[np.ndarray, "h w 3"]:
    """The image, RGB.

    Grey images are repeated over the channels; transparency is dropped, not
    blended. Images with more than 8 bits per grey value (16-bit PNG and TIFF,
    floats) are stretched linearly from their own minimum and maximum to
    0..255: such files rarely use the full range, and 12-bit microscopy
    would come out black otherwise.

    An EXIF orientation is ignored, as it is by pycocotools and in SA-1B:
    masks index the pixels as stored. Where annotations were drawn on the
    rotated image, the sizes disagree and `decode_masks` says why.

    Raises:
        CorruptSampleError: the bytes are truncated or no readable image.
    """
    if isinstance(sample.image, np.ndarray):
        return sample.image
    return np.asarray(open_image(sample))


def open_image(sample: Sample) -> Image.Image:
    """The image as `decode_image` has it, in Pillow's form.

    What is resized anyway need not become an array first, which takes as long
    as decoding half of it.

    Raises:
        CorruptSampleError: the bytes are truncated or no readable image.
    """
    return open_reduced(sample, None).image


class ReducedImage(NamedTuple):
    """An image that may have been decoded to a fraction of its size.

    Attributes:
        image: RGB, with sides of those in the file over `reduction`, rounded up.
        reduction: 1, 2, 4 or 8. One pixel spans so many of the file, though the
            last of a row or column may be cut short.
    """

    image: Image.Image
    reduction: int


def open_reduced(sample: Sample, at_least_hw: tuple[int, int] | None) -> ReducedImage:
    """The image, decoded no larger than it must be.

    A JPEG holds the frequencies of blocks of 8 x 8 pixels. From the lower half
    of them a decoder makes 4 x 4 in half of the time. Other formats come at
    their own size.

    Args:
        sample: where it stands.
        at_least_hw: a size that the image keeps, unless it is smaller to begin
            with; None for its own size.

    Raises:
        CorruptSampleError: the bytes are truncated or no readable image.
    """
    if isinstance(sample.image, np.ndarray):
        return ReducedImage(Image.fromarray(sample.image), 1)

    def read(image: Image.Image) -> ReducedImage:
        width = image.width
        drafted = image.draft(None, at_least_hw[::-1]) if at_least_hw else None
        # The second part is the box that the file's pixels fill, in those of the image.
        reduction = round(width / drafted[1][2]) if drafted else 1
        return ReducedImage(_to_rgb(image), reduction)

    return _read(sample.image, sample.name, read)


def image_hw(sample: Sample) -> tuple[int, int]:
    """Height and width of the image, read from its header alone.

    Raises:
        CorruptSampleError: the bytes are no readable image.
    """
    if isinstance(sample.image, np.ndarray):
        return sample.image.shape[0], sample.image.shape[1]
    return _read(sample.image, sample.name, lambda image: (image.height, image.width))


def _read(content: bytes, name: str, read: Callable[[Image.Image], _T]) -> _T:
    try:
        return read(Image.open(io.BytesIO(content), formats=_FORMATS))
    except UnidentifiedImageError as error:
        detail = f"{len(content)} bytes that no decoder knows"
        raise CorruptSampleError(name, "unreadable image", detail) from error
    except DECODE_ERRORS as error:
        truncated = "truncated" in str(error).lower()
        reason = "truncated image" if truncated else "unreadable image"
        raise CorruptSampleError(name, reason, str(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.array(image, np.float64)
        if not np.isfinite(grey).all():
            raise ValueError("pixels are not finite")
        grey -= grey.min()
        if grey.any():
            grey = grey / grey.max() * 255
        image = Image.fromarray(np.rint(grey).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation_hint(sample: Sample) -> str:
    """A remark for size errors where EXIF rotates the image, else ""."""
    if isinstance(sample.image, np.ndarray):
        return ""
    orientation = _read(
        sample.image, sample.name, lambda image: image.getexif().get(_ORIENTATION, 1)
    )
    if orientation == 1:
        return ""
    return f"; the file asks for EXIF orientation {orientation}: save it upright"


def decode_masks(sample: Sample, indices: Iterable[int]) -> Bool[np.ndarray, "k h w"]:
    """The chosen masks at full size.

    Args:
        sample: where they stand.
        indices: positions in `sample.masks_rle`; at least one.

    Raises:
        CorruptSampleError: a mask is no valid RLE ("bad rle"), its size is
            not the image's ("size mismatch"), or the image is unreadable.
    """
    hw = image_hw(sample)
    return np.stack([rle_codec.decode(mask_runs(sample, index, hw), hw) for index in indices])


def mask_runs(sample: Sample, index: int, hw: tuple[int, int]) -> Int64[np.ndarray, "r"]:
    """The validated runs of one mask (see `rle.run_lengths`).

    Args:
        sample: where it stands.
        index: its position in `sample.masks_rle`.
        hw: height and width of the image.

    Raises:
        CorruptSampleError: "bad rle", or "size mismatch" with `hw`.
    """
    rle = sample.masks_rle[index]
    try:
        runs = rle_codec.run_lengths(rle)
    except rle_codec.BadRleError as error:
        detail = f"mask {index}: {error}"
        raise CorruptSampleError(sample.name, "bad rle", detail) from error
    if tuple(rle["size"]) != tuple(hw):
        detail = f"mask {index} is {list(rle['size'])}, the image {list(hw)}"
        detail += _orientation_hint(sample)
        raise CorruptSampleError(sample.name, "size mismatch", detail)
    return runs
