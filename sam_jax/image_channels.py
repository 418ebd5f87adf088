"""Images of any number of channels, with their values as files store them.

Satellites, microscopes and scanners give other channels than red, green and blue, in units of their
own, which 8 bits would lose. Nothing is stretched here: values become float32, and the model's own
mean and deviation bring them to its scale. ``sam_jax.images`` reads 8-bit RGB.
"""

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam_jax import images
from sam_jax.arrays import Float, Shaped, UInt8
from sam_jax.errors import ConfigError
from sam_jax.images import (
    DECODE_ERRORS,
    PICTURE_SUFFIXES,
    Header,
    Orientation,
    UnreadableImageError,
)

_log = logging.getLogger(__name__)

_NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# TIFF's tag 274.
_ORIENTATION_TAG = 274
# Kinds of numpy's types: integers with and without a sign, floats.
_KINDS = "iuf"
# Percentiles of a channel that are black and white where it is shown.
_SHOWN_PERCENTILES = (1, 99)
# Pixels that these are taken of, about.
_SHOWN_SAMPLE = 2**20


def image_suffixes(in_channels: int | None) -> tuple[str, ...]:
    """Endings by which images are told from other files of a folder.

    Args:
      in_channels: of the model, see ``ModelConfig``; None for 8-bit RGB.
    """
    return PICTURE_SUFFIXES if in_channels is None else (*PICTURE_SUFFIXES, ".npy")


def hint_of_arrays(folder: Any, in_channels: int | None) -> str:
    """A remark for messages that a folder has no picture, where it has arrays; else nothing."""
    if in_channels is not None or not isinstance(folder, Path) or not folder.is_dir():
        return ""
    found = next(folder.rglob("*.npy"), None)
    return f"; {found.name} is an image only for a model with model.in_channels" if found else ""


def read_pixels(
    path: str | Path, in_channels: int | None
) -> UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w c"]:
    """An image file as a model takes it, upright: 8-bit RGB, or float32 of so many channels.

    Raises:
      ImageError: if it is missing, damaged, or has other channels.
      ConfigError: if it takes a library that is not installed.
    """
    if in_channels is None:
        return images.read_image(path)
    content = images.read_bytes(path)
    if read_header(content, str(path)).has_frames:
        _log.warning("%s holds several images: the first is taken", path)
    return decode(content, str(path), in_channels)


def as_pixels(
    image: Any, in_channels: int | None, name: str = "image"
) -> UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w c"]:
    """An image in memory as a model takes it: 8-bit RGB, or float32 of so many channels.

    Args:
      image: for 8-bit RGB see ``images.as_rgb``; else an array ``[h, w, c]`` of real numbers, or
        ``[h, w]`` of one channel.
      in_channels: of the model; None for 8-bit RGB.
      name: what to call the image in messages.

    Raises:
      ImageError: if it has other channels or no real, finite numbers.
    """
    if in_channels is None:
        return images.as_rgb(image, name)
    if isinstance(image, Image.Image):
        raise UnreadableImageError(
            name, "is a picture of Pillow's, expected an array [h, w, c]: numpy.asarray(image)"
        )
    array = images.as_array(image, name)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] != in_channels:
        is_first = array.ndim == 3 and array.shape[0] == in_channels
        hint = "; channels come last: numpy.moveaxis(image, 0, -1)" if is_first else ""
        raise UnreadableImageError(
            name,
            f"has shape {np.shape(image)}: expected [h, w, {in_channels}], the channels of the "
            f"model (model.in_channels){hint}",
        )
    return _as_float32(array, name)


def decode(
    content: bytes, name: str, in_channels: int, orientation: Orientation = "upright"
) -> Float[np.ndarray, "h w c"]:
    """The image in a file, float32.

    Args:
      content: the file.
      name: what to call it in messages.
      in_channels: how many channels it must have.
      orientation: whether it is turned as its EXIF says.

    Raises:
      UnreadableImageError: if it is damaged, has other channels, or numbers that are not finite.
      ConfigError: if it takes a library that is not installed.
    """
    values = stored_channels(content, name, orientation)
    if (found := values.shape[2]) != in_channels:
        raise UnreadableImageError(
            name,
            f"has {found} channel{'s' * (found > 1)} ({values.dtype}, {list(values.shape[:2])} "
            f"pixels), expected {in_channels}, which the model takes: set model.in_channels to "
            f"{found}, or write files with the {in_channels} channels that it shall see",
        )
    return _as_float32(values, name)


def stored_channels(
    content: bytes, name: str, orientation: Orientation = "upright"
) -> Shaped[np.ndarray, "h w c"]:
    """All channels of a file's image, their values of the type in which they are stored.

    Files are ``.npy`` and TIFF, of any channels, and ordinary pictures, see
    ``images.stored_values``. Arrays and stacks of pages are ``[h, w]``, ``[h, w, c]`` or
    ``[c, h, w]``: channels are the shorter of the first and the last axis.

    Raises:
      UnreadableImageError: if it is damaged, too large, or holds something else.
      ConfigError: if it takes a library that is not installed.
    """
    if content.startswith(_NPY):
        shape, dtype = _npy_header(content, name)
        _check_type(dtype, name)
        _stored_hw(shape, name)
        with _damaged(name):
            values = np.load(io.BytesIO(content), allow_pickle=False)
        return _channels_last(values)
    if content.startswith(_TIFF):
        with _opened_tiff(content, name) as file:
            exif = _tiff_orientation(file)
            values = _channels_last(file.series[0].asarray().squeeze())
        _check_type(values.dtype, name)
        return images.turned_array(values, exif) if orientation == "upright" else values
    return _channels_last(images.stored_values(content, name, orientation))


def read_header(content: bytes, name: str) -> Header:
    """Metadata of an image file; see ``images.read_header``.

    Raises:
      UnreadableImageError: if it is damaged, too large, or no image.
      ConfigError: if it takes a library that is not installed.
    """
    if content.startswith(_NPY):
        shape, dtype = _npy_header(content, name)
        _check_type(dtype, name)
        return Header(_stored_hw(shape, name), 1, False, 8 * dtype.itemsize)
    if content.startswith(_TIFF):
        with _opened_tiff(content, name) as file:
            series = file.series[0]
            shape = tuple(side for side in series.shape if side != 1)
            bits = 8 * np.dtype(series.dtype).itemsize
            return Header(
                _stored_hw(shape, name), _tiff_orientation(file), len(file.series) > 1, bits
            )
    return images.read_header(content, name)


def header_of(content: bytes, name: str, in_channels: int | None) -> Header:
    """Metadata of an image file as a model takes it; errors as ``read_header``."""
    read = images.read_header if in_channels is None else read_header
    return read(content, name)


def rgb_view(pixels: Shaped[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w 3"]:
    """An image for people to look at: itself if it is 8-bit RGB.

    Of other channels, the first three are red, green and blue, or the first is grey where there are
    fewer; each is stretched over its values from the 1st to the 99th percentile.
    """
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        return pixels
    shown = pixels[..., : 3 if pixels.shape[2] >= 3 else 1].astype(np.float32)
    step = max(1, round(math.sqrt(shown.shape[0] * shown.shape[1] / _SHOWN_SAMPLE)))
    low, high = np.percentile(shown[::step, ::step], _SHOWN_PERCENTILES, axis=(0, 1))
    spread = np.where(high > low, high - low, 1.0)
    grey = np.rint(np.clip((shown - low) / spread, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(grey, (*grey.shape[:2], 3)))


def _as_float32(values: Shaped[np.ndarray, "h w c"], name: str) -> Float[np.ndarray, "h w c"]:
    _check_type(values.dtype, name)
    _stored_hw(values.shape, name)
    with np.errstate(over="ignore"):
        floats = np.ascontiguousarray(values, np.float32)
    if values.dtype.kind == "f" and not np.isfinite(floats).all():
        count = int(np.count_nonzero(~np.isfinite(floats).all(axis=2)))
        raise UnreadableImageError(
            name,
            f"has {count} pixels that are not finite (NaN, infinite or beyond float32), expected "
            "numbers: write a number where there is no data, as numpy.nan_to_num does",
        )
    return floats


def _check_type(dtype: np.dtype, name: str) -> None:
    if dtype.kind not in _KINDS:
        raise UnreadableImageError(
            name,
            f"has values of type {dtype}, expected real numbers: integers or floats"
            + (", as array.astype('uint8') makes" if dtype.kind == "b" else ""),
        )


def _stored_hw(shape: tuple[int, ...], name: str) -> tuple[int, int]:
    """Height and width of an array that holds an image, as it is stored."""
    if len(shape) not in (2, 3):
        raise UnreadableImageError(
            name,
            f"has shape {list(shape)}: expected [h, w, c], [c, h, w] or [h, w], one image a file",
        )
    if 0 in shape:
        raise UnreadableImageError(name, f"is empty: its shape is {list(shape)}")
    hw = shape[1:] if _is_channels_first(shape) else shape[:2]
    images.check_size((hw[1], hw[0]), name)
    return hw[0], hw[1]


def _is_channels_first(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] < shape[2]


def _channels_last(values: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "h w c"]:
    if values.ndim == 2:
        return values[..., None]
    return np.moveaxis(values, 0, -1) if _is_channels_first(values.shape) else values


def _npy_header(content: bytes, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array in a file, all of which is there; nothing is unpickled."""
    file = io.BytesIO(content)
    with _damaged(name):
        version = np.lib.format.read_magic(file)
        # Later versions differ in the names of fields, which an image has not.
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    length = len(content) - file.tell()
    # Before memory is taken for it.
    if dtype.kind in _KINDS and math.prod(shape) * dtype.itemsize > length:
        raise UnreadableImageError(
            name,
            f"is cut short: {length:,} bytes of values of an array {list(shape)} of {dtype}",
            "truncated image",
        )
    return shape, dtype


@contextlib.contextmanager
def _opened_tiff(content: bytes, name: str) -> Iterator[Any]:
    """A TIFF; what its decoder raises becomes one error."""
    try:
        import tifffile
    except ImportError:
        raise ConfigError(
            f"{name} is a TIFF, whose channels are read with tifffile: pip install 'sam-jax[tiff]'"
        ) from None
    with _damaged(name, tifffile.TiffFileError), tifffile.TiffFile(io.BytesIO(content)) as file:
        if not file.series:
            raise UnreadableImageError(name, "is a TIFF that holds no image")
        # Before memory is taken for it.
        _stored_hw(tuple(side for side in file.series[0].shape if side != 1), name)
        yield file


def _tiff_orientation(file: Any) -> int:
    tag = file.pages[0].tags.get(_ORIENTATION_TAG)
    value = 1 if tag is None else int(tag.value)
    return value if 1 <= value <= 8 else 1


@contextlib.contextmanager
def _damaged(name: str, *others: type[Exception]) -> Iterator[None]:
    """Raises what a decoder raises as an `UnreadableImageError`."""
    damages: tuple[type[Exception], ...] = (*DECODE_ERRORS, MemoryError, *others)
    try:
        yield
    except UnreadableImageError:
        raise
    except damages as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        if "imagecodecs" in reason:
            # A compression that tifffile itself does not know.
            raise ConfigError(f"{name}: {reason}: pip install imagecodecs") from None
        raise UnreadableImageError(name, f"is damaged or no image: {reason}") from None
