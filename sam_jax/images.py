"""Pictures: which files are read and which pixels come of them, in training and prompting alike.

A picture is 8-bit RGB, upright. What other modes, depths and formats become, or why they are
refused, stands in ``docs/pictures.md``; every reader of the package goes through this module, so
that a model is prompted with the pixels that it was trained on.
"""

import contextlib
import functools
import io
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.ExifTags import Base

from sam_jax.arrays import Shaped, UInt8
from sam_jax.errors import UserError

_log = logging.getLogger(__name__)

# Formats by Pillow's name, with the endings that folders are searched for. What a file is, its
# content says: endings only tell pictures from other files.
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc"),
    "PPM": (".pbm", ".pgm", ".ppm", ".pnm", ".pfm"),
}
PICTURE_SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
# JPEG's own limit; anything larger is a damaged header, not a photograph.
MAX_SIDE_PX = 65_535
# A gigapixel: by default Pillow takes large scans for attacks.
MAX_PIXELS = 2**30
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
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

# Which way pictures are taken that are stored turned: as EXIF says, or as they are stored.
Orientation = Literal["upright", "stored"]

# What turns a stored picture upright, by its EXIF orientation, and what turns it back.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNS_BACK = {
    **_TURNS,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}
# Values of TIFF's tags.
_SIGNED, _FROM_WHITE = 2, 0
# Chunks in which a PNG may say how it is turned. Pillow decodes all of it to look for them.
_PNG_METADATA = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
# How upright copies are saved, so that their pixels are those of the picture, or almost.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}
_EIGHT_BITS = "save it with 8 bits a channel, black at 0 and white at 255"
_AS_STORED = "a model that takes values as they are stored, of any channels, has model.in_channels"
# Modes of Pillow's whose numbers are values of channels; 16-bit grey has several more.
_MODES_OF_VALUES = ("L", "LA", "RGB", "RGBA", "I", "F")
# Beginnings of files that are often found under a picture's name, and what they are.
_NO_PICTURES = {
    b"": "it is empty",
    b"version https://git-lfs": "it is a Git LFS pointer; fetch the file by `git lfs pull`",
    b"<!doctype html": "it is an HTML page: what was downloaded is not the picture",
    b"<html": "it is an HTML page: what was downloaded is not the picture",
    b"<svg": "it is a vector graphic; save it as PNG",
    b"%pdf": "it is a PDF; save its page as PNG",
    b"\x93numpy": f"it is an array of numpy's, expected 8-bit RGB; {_AS_STORED}",
}


class ImageError(UserError, ValueError):
    """An image that cannot be segmented as it is; the message says why and what to do."""


class UnreadableImageError(ImageError):
    """A picture file from which no pixels can be read.

    Attributes:
      name: the file, or what the caller calls the image.
      detail: what was found, what was expected, and what to do.
      reason: "truncated image" or "unreadable image", by which occurrences are counted.
    """

    def __init__(self, name: str, detail: str, reason: str = "unreadable image"):
        super().__init__(name, detail, reason)
        self.name = name
        self.detail = detail
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name} {self.detail}"


class Header(NamedTuple):
    """Metadata of a picture file, known before its pixels are decoded.

    Attributes:
      stored_hw: height and width of the pixels in the file.
      orientation: EXIF's, 1 to 8; 1 is upright.
      has_frames: whether other frames or pages follow the first.
      bits: of a channel.
    """

    stored_hw: tuple[int, int]
    orientation: int
    has_frames: bool
    bits: int

    @property
    def upright_hw(self) -> tuple[int, int]:
        """Height and width of the picture once it is turned."""
        height, width = self.stored_hw
        return (width, height) if self.orientation >= 5 else (height, width)


class ReducedImage(NamedTuple):
    """An image that may have been decoded to a fraction of its size.

    Attributes:
      image: RGB, with sides of those in the file over ``reduction``, rounded up; or an array
        ``[h, w, c]`` of other channels.
      reduction: 1, 2, 4 or 8. One pixel spans so many of the file, though the last of a row or
        column may be cut short.
    """

    image: Image.Image | Shaped[np.ndarray, "h w c"]
    reduction: int


def read_image(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
    """A picture file as 8-bit RGB, upright. Of several frames or pages, the first.

    Raises:
      ImageError: if it is missing, damaged, or no picture that can be read.
    """
    content = read_bytes(path)
    if read_header(content, str(path)).has_frames:
        _log.warning("%s holds several frames or pages: the first is taken", path)
    return np.asarray(decode(content, str(path)).image)


def read_bytes(path: str | Path) -> bytes:
    """The contents of an image file.

    Raises:
      UnreadableImageError: if it is missing or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UnreadableImageError(str(path), "does not exist") from None
    except OSError as error:
        raise UnreadableImageError(str(path), f"cannot be read: {error.strerror}") from None


def as_array(image: Any, name: str) -> Shaped[np.ndarray, "*shape"]:
    """An array of what numpy makes one of.

    Raises:
      UnreadableImageError: if numpy makes none of it; `name` is what it is called.
    """
    try:
        return np.asarray(image)
    except (ValueError, TypeError) as error:
        raise UnreadableImageError(name, f"is no array: {error}") from None


def as_rgb(image: Any, name: str = "image") -> UInt8[np.ndarray, "h w 3"]:
    """An image in memory as 8-bit RGB.

    Arrays are grey (``[h, w]`` or ``[h, w, 1]``), RGB or RGBA, whose transparency is dropped; bools
    are black and white. Deep ones are stretched, see ``docs/pictures.md``. Images of Pillow's are
    what their file is: converted by their mode, and turned upright as their EXIF says.

    Args:
      image: an array, what numpy makes one of, or an image of Pillow's.
      name: what to call it in messages.

    Raises:
      ImageError: if it is empty, or may mean several things; the message says what to do.
    """
    if isinstance(image, Image.Image):
        return np.asarray(_from_pillow(image, name))
    if isinstance(image, (str, bytes, os.PathLike)):
        raise UnreadableImageError(
            name, "is a path or a file's content, expected pixels: sam_jax.images.read_image(path)"
        )
    array = as_array(image, name)
    _check_shape(array, name)
    channels = array.reshape(*array.shape[:2], -1)[..., :3]
    if array.dtype == bool:
        channels = channels.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        _check_depth(array, name)
        try:
            channels = _stretched(channels)
        except _RefusedError as error:
            raise UnreadableImageError(name, str(error)) from None
    if channels.shape[2] == 1:
        channels = np.repeat(channels, 3, axis=2)
    return np.ascontiguousarray(channels)


def read_header(content: bytes, name: str) -> Header:
    """Reads the metadata of a picture file; no pixels are decoded.

    Args:
      content: the file.
      name: what to call it in messages.

    Raises:
      UnreadableImageError: if it is damaged, too large, or no picture.
    """
    with _opened(content, name) as image:
        width, height = image.size
        if _is_tiff(image):
            # Pillow gives the size that the picture has once it is turned.
            width, height = _tag(image, Base.ImageWidth), _tag(image, Base.ImageLength)
        exif, bits = _orientation(image, content), _bits(image, content)
        return Header((height, width), exif, _has_frames(image), bits)


def decode(
    content: bytes,
    name: str,
    *,
    orientation: Orientation = "upright",
    at_least_hw: tuple[int, int] | None = None,
) -> ReducedImage:
    """The RGB image in a file, decoded no larger than it must be.

    A JPEG holds the frequencies of blocks of 8 x 8 pixels. From the lower half of them a decoder
    makes 4 x 4 in half of the time. Other formats come at their own size.

    Args:
      content: the file.
      name: what to call it in messages.
      orientation: whether it is turned as its EXIF says.
      at_least_hw: a size that the image keeps, unless it is smaller to begin with; None for its
        own size.

    Raises:
      UnreadableImageError: if it is damaged, too large, or no picture that can be read.
    """
    with _opened(content, name) as image:
        exif = _orientation(image, content)
        turned = orientation == "upright" and exif != 1
        if at_least_hw and turned and exif >= 5:
            at_least_hw = at_least_hw[::-1]
        reduction = _draft(image, at_least_hw, whole_pixels=turned) if at_least_hw else 1
        return ReducedImage(_turned(image, _to_rgb(image, content), exif, turned), reduction)


def decode_in_own_mode(
    content: bytes, name: str, orientation: Orientation = "upright"
) -> Image.Image:
    """The picture in a file in its own mode, as label maps need it: only turned as EXIF says.

    Raises:
      UnreadableImageError: if it is damaged, too large, or no picture.
    """
    with _opened(content, name) as image:
        exif = _orientation(image, content)
        image.load()
        # A copy, since the file is closed behind it.
        return _turned(image, image.copy(), exif, orientation == "upright" and exif != 1)


def stored_values(
    content: bytes, name: str, orientation: Orientation = "upright"
) -> Shaped[np.ndarray, "h w *channels"]:
    """The values of a picture file as they are stored: nothing is stretched, or made RGB.

    Grey of any depth, grey with transparency, RGB and RGBA, of 8 or 16 bits; of a TIFF, whose other
    forms Pillow does not read or cuts to 8 bits, see ``image_channels``.

    Args:
      content: the file.
      name: what to call it in messages.
      orientation: whether it is turned as its EXIF says.

    Raises:
      UnreadableImageError: if it is damaged, too large, no picture, or has other numbers than
        values of channels.
    """
    with _opened(content, name) as image:
        exif, bits = _orientation(image, content), _bits(image, content)
        image.load()
        if image.mode not in _MODES_OF_VALUES and not image.mode.startswith("I;16"):
            raise _RefusedError(
                f"has pixels of Pillow's mode {image.mode}, which are no values of channels: save "
                "it as .npy, TIFF, grey, RGB or RGBA"
            )
        turn = orientation == "upright" and exif != 1
        if bits > 8 and image.mode in ("LA", "RGB", "RGBA"):
            if image.mode == "LA":
                raise _RefusedError(f"has {bits}-bit grey with transparency: save it as .npy")
            values = _deep_values(image, content, bits)
            return turned_array(values, exif) if turn else values
        return np.asarray(_turned(image, image.copy(), exif, turn))


def turned_array(
    values: Shaped[np.ndarray, "h w *channels"], orientation: int
) -> Shaped[np.ndarray, "h2 w2 *channels"]:
    """Stored values turned upright, of an EXIF orientation from 1 to 8."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    # Of the rows and columns of the upright picture.
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values


def upright_copy(content: bytes, name: str) -> bytes:
    """The file of a picture that is stored turned, upright, in the same format.

    Without loss where the format has such a way, otherwise of the highest quality. Mode and colour
    profile stay; deep pictures get the 8 bits that ``decode`` gives them.

    Raises:
      UnreadableImageError: if it cannot be read.
    """
    with _opened(content, name) as image:
        exif = _orientation(image, content)
        kind = "JPEG" if image.format == "MPO" else image.format
        deep = image.mode.startswith(("I", "F")) or _bits(image, content) > 8
        upright = _to_rgb(image, content) if deep else image
        image.load()
        upright = _turned(image, upright, exif, turn=True)
        options = {"icc_profile": image.info.get("icc_profile"), **_SAVE_OPTIONS.get(str(kind), {})}
        file = io.BytesIO()
        upright.save(file, kind, **options)
        return file.getvalue()


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that this build of Pillow can read."""
    Image.init()
    return tuple(kind for kind in _SUFFIXES if kind in Image.OPEN)


@contextlib.contextmanager
def _opened(content: bytes, name: str) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet; what its decoder raises becomes one error."""
    with _decoder_errors(name, content):
        if Image.MAX_IMAGE_PIXELS is not None and Image.MAX_IMAGE_PIXELS < MAX_PIXELS:
            # Pillow has one limit a process, and no argument for another.
            Image.MAX_IMAGE_PIXELS = MAX_PIXELS
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            check_size(image.size, name)
            yield image


@contextlib.contextmanager
def _decoder_errors(name: str, content: bytes = b"?") -> Iterator[None]:
    """Raises what a decoder raises as an `UnreadableImageError`."""
    try:
        yield
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError(
            name, f"is damaged or no picture: {_what_it_is(content)}"
        ) from None
    except _RefusedError as error:
        raise UnreadableImageError(name, str(error)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImageError(name, f"is too large: {error}") from None
    except DECODE_ERRORS as error:
        truncated = "truncated" in str(error).lower()
        reason = "truncated image" if truncated else "unreadable image"
        raise UnreadableImageError(name, f"is damaged or no picture: {error}", reason) from None


class _RefusedError(Exception):
    """A picture that is whole, but whose pixels do not say what they mean."""


def _what_it_is(content: bytes) -> str:
    start = content[:512].lstrip().lower()
    for beginning, what in _NO_PICTURES.items():
        if start.startswith(beginning) if beginning else not start:
            return what
    if content[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"):
        return "it is a HEIC picture; save it as JPEG or PNG"
    readable = ", ".join(_formats())
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return (
            "a TIFF of a kind that is not read (as several floats a pixel, or many bands); "
            f"{_EIGHT_BITS}; {_AS_STORED}"
        )
    return f"{len(content)} bytes that no decoder knows, of {readable}"


def check_size(size: tuple[int, int], name: str) -> None:
    """Raises UnreadableImageError for a width and height that no image may have."""
    if 0 in size:
        raise UnreadableImageError(name, f"is empty: {size[0]} x {size[1]} pixels")
    if max(size) > MAX_SIDE_PX or size[0] * size[1] > MAX_PIXELS:
        raise UnreadableImageError(
            name,
            f"is too large: {size[0]} x {size[1]} pixels, at most {MAX_SIDE_PX:,} a side and "
            f"{MAX_PIXELS:,} in all",
        )


def _check_shape(array: Shaped[np.ndarray, "..."], name: str) -> None:
    shape = array.shape
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        hint = ""
        if array.ndim == 3 and shape[0] in (1, 3, 4):
            hint = "; channels come last: np.moveaxis(image, 0, -1)"
        elif array.ndim == 3 and shape[2] == 2:
            hint = "; of grey with transparency, give image[..., 0]"
        elif array.ndim == 4:
            hint = "; give the images of a batch one by one"
        raise UnreadableImageError(
            name,
            f"has shape {shape}: expected [h, w, 3] (RGB), [h, w, 4] (RGBA), [h, w] or [h, w, 1] "
            f"(grey){hint}",
        )
    if 0 in shape:
        raise UnreadableImageError(name, f"is empty: its shape is {shape}")
    check_size((shape[1], shape[0]), name)


def _check_depth(array: Shaped[np.ndarray, "..."], name: str) -> None:
    """Refuses arrays that may mean several things: 0..1, 0..255, or normalised by channels."""
    kind, depth = array.dtype.kind, array.dtype.itemsize
    is_grey = array.ndim == 2 or array.shape[2] == 1
    is_deep = kind == "f" or (kind in "iu" and depth > 1)
    if (kind == "u" and depth == 2) or (is_grey and is_deep):
        return
    hint = {
        "f": "for floats in [0, 1], (255 * image).round().astype('uint8')",
        "i": "if its values are in [0, 255], image.astype('uint8')",
        "u": "if its values are in [0, 255], image.astype('uint8')",
    }.get(kind, "convert it to uint8")
    raise UnreadableImageError(
        name, f"has type {array.dtype}, expected uint8 in [0, 255], or uint16; {hint}"
    )


def _orientation(image: Image.Image, content: bytes | None = None) -> int:
    """EXIF orientation, 1 to 8; 1, which is upright, if none is readable."""
    if image.format == "PNG" and content and not any(word in content for word in _PNG_METADATA):
        return 1
    try:
        value = image.getexif().get(Base.Orientation, 1)
    except DECODE_ERRORS:
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _has_frames(image: Image.Image) -> bool:
    if image.format == "MPO":
        return False  # The others are small ones for a camera's screen, or for depth.
    try:
        return bool(getattr(image, "is_animated", False))
    except DECODE_ERRORS:
        return False


def _draft(image: Image.Image, at_least_hw: tuple[int, int], *, whole_pixels: bool) -> int:
    """Sets a JPEG to be decoded at 1 / n of its size, and returns n.

    Args:
      image: not decoded yet.
      at_least_hw: in the pixels as stored.
      whole_pixels: only by what divides its sides: else the pixels that are cut short, in the last
        row and column, would stand in the first of the turned image.
    """
    width, height = image.size
    if whole_pixels:
        fits = min(width // at_least_hw[1], height // at_least_hw[0])
        divides = [r for r in (8, 4, 2) if r <= fits and width % r == height % r == 0]
        if not divides:
            return 1
        at_least_hw = height // divides[0], width // divides[0]
    drafted = image.draft(None, at_least_hw[::-1])
    # drafted[1] is the box of the file's pixels, in pixels of the reduced image.
    return round(width / drafted[1][2]) if drafted else 1


def _turned(file: Image.Image, image: Image.Image, exif: int, turn: bool) -> Image.Image:
    """The image of a file with that orientation, turned or not, whatever Pillow did already."""
    if exif == 1:
        return image
    if _is_tiff(file) == turn:
        return image  # Pillow turns TIFFs when it decodes them, and nothing else.
    return image.transpose((_TURNS if turn else _TURNS_BACK)[exif])


def _from_pillow(image: Image.Image, name: str) -> Image.Image:
    content = _deep_content(image)
    if content is not None:
        whole = decode(content, name).image
        assert isinstance(whole, Image.Image)
        return whole
    with _decoder_errors(name):
        check_size(image.size, name)
        exif = _orientation(image)
        return _turned(image, _to_rgb(image, None), exif, exif != 1)


def _deep_content(image: Image.Image) -> bytes | None:
    """The file behind an image that is not decoded yet, where Pillow may cut its depth."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.tell():
        return None
    if image.format not in ("PNG", "TIFF", "JPEG2000", "PPM") or image.fp is None:
        return None
    position = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(position)
    return content


def _to_rgb(image: Image.Image, content: bytes | None) -> Image.Image:
    bits = _bits(image, content) if content else 8
    signed = _is_tiff(image) and _tag(image, Base.SampleFormat, 1) == _SIGNED
    from_white = _is_tiff(image) and _tag(image, Base.PhotometricInterpretation) == _FROM_WHITE
    image.load()
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image)
        if image.mode == "I" and _is_tiff(image) and not signed:
            # Pillow has no mode for 32 bits without a sign.
            grey = grey.view(np.uint32)
        grey = _stretched(grey)
        # Pillow inverts what counts from white for 8 bits only.
        return Image.fromarray(255 - grey if from_white else grey).convert("RGB")
    if content and bits > 8:
        return Image.fromarray(_stretched(_deep_channels(image, content, bits)))
    if signed:
        raise _RefusedError(f"has signed 8-bit pixels, expected 0 to 255; {_EIGHT_BITS}")
    premultiplied = {"La": "LA", "RGBa": "RGBA"}
    if image.mode in premultiplied:
        image = image.convert(premultiplied[image.mode])
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:
        # Dropped with the other transparency; Pillow would warn of it.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _bits(image: Image.Image, content: bytes) -> int:
    """Bits of a channel in the file, of which Pillow keeps 8 if there are several channels."""
    if image.format == "PNG":
        return content[24]
    if _is_tiff(image):
        return _tag(image, Base.BitsPerSample, 1)
    if image.format == "JPEG2000":
        size_marker = content.find(b"\xff\x4f\xff\x51")
        return (content[size_marker + 42] & 0x7F) + 1 if size_marker >= 0 else 8
    if image.format == "PPM" and isinstance(image, ImageFile.ImageFile) and image.tile:
        args = image.tile[0][3]
        if isinstance(args, tuple) and isinstance(args[-1], int):
            return args[-1].bit_length()  # of the largest value
    return 8


def _is_tiff(image: Image.Image) -> bool:
    return image.format == "TIFF" and hasattr(image, "tag_v2")


def _tag(image: Image.Image, tag: Base, default: int | None = None) -> int:
    """A number in a TIFF's tags, the first where there is one for each channel.

    Raises:
      TypeError: if it is not there, and has no default.
    """
    file: Any = image
    value = file.tag_v2.get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _deep_channels(image: Image.Image, content: bytes, bits: int) -> Shaped[np.ndarray, "h w 3"]:
    """The colours of a deep picture in full; see ``_deep_values``."""
    return _deep_values(image, content, bits)[..., :3]


def _deep_values(image: Image.Image, content: bytes, bits: int) -> Shaped[np.ndarray, "h w c"]:
    """RGB or RGBA of a deep picture in full, of which Pillow decodes the high bits.

    Those bits must agree: they tell whether both decoders mean the same by this file.
    """
    refusal = _RefusedError(f"has {bits} bits a channel in a form that is not read; {_EIGHT_BITS}")
    # Pillow scales the values of portable maps, and has no counterpart in other modes to compare.
    if image.format == "PPM" or image.mode not in ("LA", "RGB", "RGBA", "RGBX"):
        raise refusal
    try:
        deep = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        raise refusal from None
    if (
        not isinstance(deep, np.ndarray)
        or deep.ndim != 3
        or deep.shape[2] < 3
        or deep.dtype != np.uint16
    ):
        raise refusal
    values = deep[..., [2, 1, 0, *range(3, deep.shape[2])]].astype(np.uint16, copy=False)
    rgb = values[..., :3]
    high = np.asarray(image.convert("RGB")).astype(np.int32)
    # Pillow rounds JPEG 2000 to the high bits, and cuts the low ones off in other formats.
    tolerance = 1 if image.format == "JPEG2000" else 0
    if rgb.shape != high.shape or np.abs((rgb >> (bits - 8)) - high).max() > tolerance:
        raise refusal
    return values


def _stretched(
    values: Shaped[np.ndarray, "h w *channels"],
) -> UInt8[np.ndarray, "h w *channels"]:
    """Values as 8 bits: the least becomes 0, the greatest 255, linearly, in all channels alike."""
    low, high = values.min(), values.max()
    spread = float(high) - float(low)
    if not np.isfinite(spread):
        raise _RefusedError("has pixels that are not finite (NaN or infinite), expected numbers")
    if values.dtype.itemsize == 2 and values.dtype.kind in "iu":
        steps = np.arange(int(spread) + 1)
        table = np.rint(steps / (spread or 1) * 255).astype(np.uint8)
        return table[values.astype(np.int32) - int(low)]
    above = values.astype(np.float64) - float(low)
    return np.rint(above / (spread or 1) * 255).astype(np.uint8)
