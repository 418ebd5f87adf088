"""The one form in which every source hands over an image with its masks."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8
from PIL import Image

from sam_jax import image_channels, images
from sam_jax import rle as rle_codec
from sam_jax.buckets import DataPath
from sam_jax.images import Orientation, ReducedImage


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
      image: a picture file (see `sam_jax.images`, or `sam_jax.image_channels` for those of other
        channels) or uint8 [h, w, 3] RGB.
      masks_rle: one {"size": [h, w], "counts": ...} per mask, counts compressed (bytes or str) or a
        list. Not validated yet.
      dataset: which source it comes from.
      name: the file, or tar::member, for messages and results.
      unusable_masks: what was wrong with each annotation that the source could not express as an
        RLE at all.
      orientation: how an image that is stored turned is taken where the sizes of its masks do not
        tell; see `is_turned`.
      remarks: (reason, detail) of what the source decided or changed about masks that are used,
        such as a part of a polygon; see `all_remarks`.
      in_channels: channels of the image, whose values are taken as they are stored; None for 8-bit
        RGB.
    """

    image: bytes | np.ndarray
    masks_rle: tuple[dict[str, Any], ...]
    dataset: str
    name: str
    unusable_masks: tuple[str, ...] = ()
    orientation: Orientation = "upright"
    remarks: tuple[tuple[str, str], ...] = ()
    in_channels: int | None = None

    @functools.cached_property
    def header(self) -> images.Header:
        """Metadata of the picture file; only for samples that come as a file.

        Raises:
          CorruptSampleError: the bytes are no readable image.
        """
        assert isinstance(self.image, bytes)
        with _picture_errors(self.name):
            return image_channels.header_of(self.image, self.name, self.in_channels)


def read_picture_file(path: DataPath) -> bytes:
    """Contents of a picture file, not decoded.

    Raises:
      CorruptSampleError: it is missing.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CorruptSampleError(str(path), "missing image") from error


def sample_of_file(
    path: DataPath,
    image: bytes,
    dataset: str,
    orientation: Orientation,
    masks_rle: Iterable[dict[str, Any]],
    unusable_masks: Iterable[str],
    remarks: Iterable[tuple[str, str]],
    in_channels: int | None = None,
) -> Sample:
    """The sample of a picture file of its own; arguments as the fields of `Sample`."""
    masks, unusable, said = tuple(masks_rle), tuple(unusable_masks), tuple(remarks)
    return Sample(image, masks, dataset, str(path), unusable, orientation, said, in_channels)


def decode_image(sample: Sample) -> UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w c"]:
    """The image, 8-bit RGB, as `sam_jax.images` makes it and docs/pictures.md says.

    Of other channels, float32 as `sam_jax.image_channels` makes it. A picture that is stored turned
    is taken the way that its masks fit, see `is_turned`.

    Raises:
      CorruptSampleError: the bytes are truncated or no readable image.
    """
    if isinstance(sample.image, np.ndarray):
        return sample.image
    return np.asarray(open_image(sample))


def open_image(sample: Sample) -> Image.Image | Float32[np.ndarray, "h w c"]:
    """The image as `decode_image` has it, if it is RGB in Pillow's form.

    What is resized anyway need not become an array first, which takes as long
    as decoding half of it.

    Raises:
      CorruptSampleError: the bytes are truncated or no readable image.
    """
    return open_reduced(sample, None).image


def open_reduced(sample: Sample, at_least_hw: tuple[int, int] | None) -> ReducedImage:
    """The image, decoded no larger than it must be.

    Args:
      sample: where it stands.
      at_least_hw: a size that the image keeps, unless it is smaller to begin with; None for its own
        size.

    Raises:
      CorruptSampleError: the bytes are truncated or no readable image.
    """
    if isinstance(sample.image, np.ndarray):
        return ReducedImage(Image.fromarray(sample.image), 1)
    orientation: Orientation = "upright" if is_turned(sample) else "stored"
    with _picture_errors(sample.name):
        if sample.in_channels is not None:
            values = image_channels.decode(
                sample.image, sample.name, sample.in_channels, orientation
            )
            return ReducedImage(values, 1)
        return images.decode(
            sample.image, sample.name, orientation=orientation, at_least_hw=at_least_hw
        )


def image_hw(sample: Sample) -> tuple[int, int]:
    """Height and width of the image, read from its header alone.

    Raises:
      CorruptSampleError: the bytes are no readable image.
    """
    if isinstance(sample.image, np.ndarray):
        return sample.image.shape[0], sample.image.shape[1]
    header = sample.header
    return header.upright_hw if is_turned(sample) else header.stored_hw


def is_turned(sample: Sample) -> bool:
    """True if the image is turned as its EXIF says, rather than taken as it is stored.

    Where the sizes of the masks fit one of the two, they decide; else
    `Sample.orientation` does.

    Raises:
      CorruptSampleError: the bytes are no readable image.
    """
    if sample.header.orientation == 1:
        return False
    fitting = _fitting_orientation(sample)
    return (fitting or sample.orientation) == "upright"


def _fitting_orientation(sample: Sample) -> Orientation | None:
    """The way up that most masks have the size of; None where sizes do not tell."""
    stored_hw, upright_hw = sample.header.stored_hw, sample.header.upright_hw
    sizes = [
        tuple(rle["size"]) for rle in sample.masks_rle if isinstance(rle.get("size"), (list, tuple))
    ]
    upright, stored = sizes.count(upright_hw), sizes.count(stored_hw)
    if upright == stored:
        return None
    return "upright" if upright > stored else "stored"


def all_remarks(sample: Sample) -> tuple[tuple[str, str], ...]:
    """Decisions about masks and picture that should be known, as (reason, detail).

    Reasons are short fixed phrases, by which occurrences are counted.

    Raises:
      CorruptSampleError: the bytes are no readable image.
    """
    # The source may have asked for the picture's remarks already; they are counted once.
    return tuple(dict.fromkeys((*sample.remarks, *picture_remarks(sample))))


def picture_remarks(sample: Sample) -> tuple[tuple[str, str], ...]:
    """Decisions about the picture alone, in the form of `all_remarks`.

    Raises:
      CorruptSampleError: the bytes are no readable image.
    """
    if isinstance(sample.image, np.ndarray):
        return ()
    found = []
    if sample.header.orientation != 1 and _fitting_orientation(sample) is None:
        way = "turned upright" if sample.orientation == "upright" else "taken as stored"
        reason = (
            f"{way}; EXIF turns it, and the sizes of its masks do not tell whether they are of "
            "the upright picture (orientation decides)"
        )
        found.append((reason, ""))
    if sample.header.has_frames:
        found.append(("the first of several frames or pages", ""))
    return tuple(found)


@contextlib.contextmanager
def _picture_errors(name: str) -> Iterator[None]:
    """Raises what a picture is refused for as a `CorruptSampleError`."""
    try:
        yield
    except images.UnreadableImageError as error:
        raise CorruptSampleError(name, error.reason, error.detail) from error


def _orientation_hint(sample: Sample) -> str:
    """A remark for size errors where EXIF turns the image, else ""."""
    if isinstance(sample.image, np.ndarray) or sample.header.orientation == 1:
        return ""
    header = sample.header
    return (
        f"; the file asks for EXIF orientation {header.orientation}: it is "
        f"{list(header.stored_hw)} as stored, {list(header.upright_hw)} upright"
    )


def decode_masks(sample: Sample, indices: Iterable[int]) -> Bool[np.ndarray, "k h w"]:
    """The chosen masks at full size.

    Args:
      sample: where they stand.
      indices: positions in `sample.masks_rle`; at least one.

    Raises:
      CorruptSampleError: a mask is no valid RLE ("bad rle"), its size is not the image's ("size
        mismatch"), or the image is unreadable.
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
