"""Masks drawn as images: the label of each pixel, read from every form such files have.

What a picture means must not depend on how it is stored. So a mask comes out the same from grey
values, a palette, colours or an alpha channel, or the file is refused with the reason.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Int64, Shaped, UInt16
from PIL import Image

from sam_jax.images import (
    Header,
    Orientation,
    UnreadableImageError,
    decode_in_own_mode,
    read_header,
)

# Colour that Pascal VOC draws around objects and over what is too hard to label.
_VOC_VOID = 0xE0E0C0
_BLACK = 0
# A file with more labels than this is a photograph in the wrong folder.
_MAX_LABELS = 10_000
# More colours than this in what is not transparent is a photograph that was cut out.
_MANY_COLORS = 256
# float32 holds every whole number up to here.
_MAX_FLOAT_LABEL = 1 << 24
# A photograph changes from pixel to pixel, and a smooth map by one grey value; objects do neither.
_MAX_CHANGE_RATE = 0.3
_MAX_RAMP_RATE = 0.9
_MIN_SMOOTH_LABELS = 16
# With fewer such labels, one that is nowhere 3 pixels wide and high may be a small object.
_MIN_BLENDS = 3
_BLEND_RATE = 0.9
# Of the pixels around objects, those that are background: nearly all beside labels, a quarter of
# them at the most beside outlines that were smoothed, resized or saved as JPEG.
_HARD_OUTLINE_RATE = 0.6
_SMEARED = (
    "it was smoothed, resized or saved as JPEG; save labels as they are, or resized by the nearest "
    "neighbour"
)
# Labels in so many pieces on average, none of them large, come from a lossy format.
_MANY_PIECES = 4
_LABELS_LOOKED_AT = 16
_PIXELS_LOOKED_AT = 1 << 20
# Pixels to either side in which the two sides of a soft outline are found.
_REACH_PX = 16

SOFT_EDGE = "soft outline cut at half"
VOID = "void outline left out"
NO_BACKGROUND = "label map without background: every label is an object"
ALPHA = "alpha channel taken for the mask"
WHITE_BESIDE_LABELS = "label 255 beside others taken for an object, not for void"


class LabelMapError(ValueError):
    """A file that does not say which pixels belong together."""


class LabelMap(NamedTuple):
    """The labels of a file.

    Attributes:
      labels: 0 is background, 1, 2, ... are the objects, in the order of their labels in the file.
      remarks: what about the file had to be decided, each one of the phrases of this module.
    """

    labels: UInt16[np.ndarray, "h w"]
    remarks: tuple[str, ...] = ()


class _Stored(NamedTuple):
    """Labels as a file has them.

    Attributes:
      labels: grey values, palette indices, or 0xRRGGBB.
      channels: what neighbouring pixels would be mixed in: grey or RGB.
      background: the label that is no object.
      void: labels that a convention says are neither.
      whitest: the grey value of white, where labels are grey values.
      remarks: what had to be decided.
    """

    labels: Shaped[np.ndarray, "h w"]
    channels: Shaped[np.ndarray, "h w c"]
    background: int = _BLACK
    void: tuple[int, ...] = ()
    whitest: int | None = None
    remarks: tuple[str, ...] = ()


def read_label_map(
    path: Path,
    background: int | None = None,
    ignore_labels: Sequence[int] = (),
    orientation: Orientation = "upright",
) -> LabelMap:
    """The labels of each pixel of a file.

    Args:
      path: a picture of one page, or a NumPy file (.npy) of a whole number for each pixel.
      background: the label that is no object: a grey value, palette index or colour 0xRRGGBB. None
        is black, which in a palette is index 0.
      ignore_labels: labels that are neither object nor background.
      orientation: whether it is turned as its EXIF says.

    Raises:
      LabelMapError: the file is damaged, or it is not clear which pixels belong together.
      OSError: the file cannot be read.
    """
    if path.suffix.lower() == ".npy":
        stored = _of_grey(_of_array(path), background, None)
    else:
        stored = _stored(_opened(path, orientation), background)
    remarks = list(stored.remarks)
    ignored = set(ignore_labels)
    values, ranks = _ranked(stored.labels)
    soft = _soft_edge(stored, values, ranks, ignored)
    if soft is not None:
        remarks.append(SOFT_EDGE)
        is_object = np.abs(values - soft) <= np.abs(values - stored.background)
        values = np.where(is_object, soft, stored.background)
    present = set(values.tolist())
    void = {label for label in stored.void if label in present} - ignored
    if void:
        remarks.append(VOID)
    objects = present - {stored.background} - ignored - void
    if min(objects, default=0) < 0:
        raise LabelMapError(
            f"label {min(objects)} is negative; if it marks what is no object, put it into "
            "ignore_labels"
        )
    if objects and stored.background not in present and not ignored & present:
        remarks.append(NO_BACKGROUND)
    if stored.whitest == 255 and 255 in objects and len(objects) > 1:
        remarks.append(WHITE_BESIDE_LABELS)
    numbers = {label: number for number, label in enumerate(sorted(objects), start=1)}
    table = np.array([numbers.get(label, 0) for label in values.tolist()], np.uint16)
    return LabelMap(table[ranks], tuple(remarks))


def _of_array(path: Path) -> Int64[np.ndarray, "h w"]:
    """The whole numbers of a NumPy file; nothing is allocated for what a damaged one promises."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, TypeError, SyntaxError) as error:
        raise LabelMapError(f"it is no array that can be read ({error})") from error
    if array.ndim != 2 or not array.size or array.dtype.kind not in "biuf":
        raise LabelMapError(
            f"its array has the shape {array.shape} and the type {array.dtype}; expected a number "
            "for each pixel, [h, w]"
        )
    values = np.asarray(array)
    if array.dtype.kind == "f":
        return _whole(values)
    if array.dtype.kind == "u" and values.max() > np.iinfo(np.int64).max:
        raise LabelMapError(f"it holds {values.max()}, which is no label")
    return values.astype(np.int64)


def _opened(path: Path, orientation: Orientation) -> Image.Image:
    content = path.read_bytes()
    try:
        header = read_header(content, str(path))
        image = decode_in_own_mode(content, str(path), orientation)
    except UnreadableImageError as error:
        raise LabelMapError(error.detail) from error
    _check_form(image, header)
    return image


def _check_form(image: Image.Image, header: Header) -> None:
    if header.has_frames:
        raise LabelMapError("it has several pages; save each as a file of its own")
    if header.bits > 8 and image.mode in ("L", "LA", "RGB", "RGBA", "RGBX"):
        raise LabelMapError(
            f"it has {header.bits} bits in each channel of {image.mode}, of which 8 are kept; save "
            "labels as 16-bit grey"
        )


def _stored(image: Image.Image, background: int | None) -> _Stored:
    mode = image.mode
    if mode == "P":
        return _of_palette(image, background)
    if mode == "F":
        return _of_grey(_whole(np.asarray(image)), background, None)
    if mode in ("1", "L") or mode.startswith("I"):
        values = np.asarray(image, np.uint8 if mode == "1" else None)
        whitest = {"1": 1, "L": 255}.get(mode, 65_535)
        if "transparency" not in image.info:
            return _of_grey(values, background, whitest)
        if mode.startswith("I"):
            raise LabelMapError("it is 16-bit grey with a transparent value; save it without")
    if mode in ("1", "L", "LA", "PA", "RGB", "RGBA"):
        return _of_colors(np.asarray(image.convert("RGBA")), background)
    raise LabelMapError(f"its mode is {mode}; save it as grey values, palette or RGB")


def _of_grey(
    values: Shaped[np.ndarray, "h w"], background: int | None, whitest: int | None
) -> _Stored:
    return _Stored(values, values[..., None], background or 0, whitest=whitest)


def _whole(values: Shaped[np.ndarray, "h w"]) -> Int64[np.ndarray, "h w"]:
    if not np.isfinite(values).all():
        raise LabelMapError("a label is not finite")
    if (values != np.rint(values)).any():
        example = values[values != np.rint(values)][0]
        raise LabelMapError(
            f"labels are whole numbers, but it holds {example}; round them, or make probabilities "
            "masks by a threshold"
        )
    if np.abs(values).max() > _MAX_FLOAT_LABEL:
        raise LabelMapError(
            f"labels above {_MAX_FLOAT_LABEL:,} are not exact as floats; save them as integers"
        )
    return values.astype(np.int64)


def _of_palette(image: Image.Image, background: int | None) -> _Stored:
    indices = np.asarray(image).astype(np.int64)
    used = _ranked(indices)[0]
    if (transparency := image.info.get("transparency")) is not None:
        alpha = np.full(256, 255)
        if isinstance(transparency, bytes):
            alpha[: len(transparency)] = list(transparency)
        else:
            alpha[transparency] = 0
        if len(set(alpha[used].tolist())) > 1 and background is None:
            return _of_colors(np.asarray(image.convert("RGBA")), None)
    palette = image.getpalette("RGB") or []
    colors = np.zeros((256, 3), np.int64)
    entries = np.array(palette[:768], np.int64).reshape(-1, 3)
    colors[: len(entries)] = entries
    codes = _codes(colors)
    black = [index for index in used.tolist() if codes[index] == _BLACK]
    if background is None and codes[0] != _BLACK:
        if len(black) != 1:
            raise LabelMapError(
                f"index 0 of its palette is not black but {tuple(colors[0].tolist())}: say which "
                "index is background with background="
            )
        background = black[0]
    # In other data sets 255 is an ordinary object, with another colour in the palette.
    void = (255,) if codes[255] == _VOC_VOID else ()
    return _Stored(indices, colors[indices], background or 0, void)


def _of_colors(pixels: Shaped[np.ndarray, "h w 4"], background: int | None) -> _Stored:
    alpha = pixels[..., 3].astype(np.int64)
    colors = pixels[..., :3].astype(np.int64)
    # An alpha that is the same everywhere says nothing.
    if alpha.min() != alpha.max() and background is None:
        codes = _ranked(_codes(colors[alpha > 0]))[0]
        if len(codes) == 1 or len(codes) > _MANY_COLORS:
            return _of_grey(alpha, None, 255)._replace(remarks=(ALPHA,))
        if _BLACK in codes or not np.isin(alpha, (0, 255)).all():
            raise LabelMapError(
                "it has several colours, and an alpha channel that says something else than black "
                "does about what is background; save labels without transparency"
            )
        colors[alpha == 0] = 0
    if (colors == colors[..., :1]).all() and background is None:
        return _of_grey(colors[..., 0], None, 255)
    return _Stored(_codes(colors), colors, background or 0, (_VOC_VOID,))


def _codes(colors: Int64[np.ndarray, "*shape 3"]) -> Int64[np.ndarray, "*shape"]:
    return colors @ np.array([1 << 16, 1 << 8, 1], np.int64)


def _soft_edge(
    stored: _Stored,
    values: Int64[np.ndarray, "n"],
    ranks: Shaped[np.ndarray, "h w"],
    ignored: set[int],
) -> int | None:
    """The value of the only object of a mask whose outline is smoothed; None for a map of labels.

    Smoothing, resizing and JPEG leave values between those of both sides along each outline, in
    places too thin to be objects. Thin objects beside a large one may have such values as well, but
    leave most of its outline to the background.

    Raises:
      LabelMapError: outlines between several objects are smoothed, so that it is lost which pixels
        belong to which; or nothing but a photograph is to be seen.
    """
    if len(values) <= 2:
        return None
    if len(values) > _MAX_LABELS:
        raise LabelMapError(f"it has {len(values):,} labels; is it a photograph?")
    if len(values) > _MIN_SMOOTH_LABELS:
        _check_constant(stored.labels, len(values))
    window = np.ones((3, 3), np.uint8)
    is_flat = cv2.erode(ranks, window) == cv2.dilate(ranks, window)
    is_solid = np.zeros(len(values), bool)
    is_solid[ranks[is_flat]] = True
    is_solid[values == stored.whitest] = True
    solid_objects = set(values[is_solid].tolist()) - {stored.background} - ignored
    num_thin = len(values) - int(is_solid.sum())
    is_cut_out = solid_objects == {stored.whitest}
    if (
        num_thin >= (1 if is_cut_out else _MIN_BLENDS)
        and num_thin > len(solid_objects) - is_cut_out
    ):
        thin, ground = ~is_solid[ranks], stored.labels == stored.background
        between = _between(stored.channels, ~thin, ground)
        is_object = np.isin(values, list(solid_objects))[ranks]
        is_soft = is_cut_out or not _has_hard_outline(is_object, ground)
        if is_soft and between[thin].mean() >= _BLEND_RATE:
            if len(solid_objects) == 1 and stored.channels.shape[-1] == 1:
                return solid_objects.pop()
            raise LabelMapError(
                f"{num_thin} labels lie between others along their outlines: {_SMEARED}"
            )
    if num_thin > max(_MIN_SMOOTH_LABELS, len(solid_objects)) and _is_scattered(ranks, is_solid):
        raise LabelMapError(f"{num_thin} labels are specks all over: {_SMEARED}")
    return None


def _has_hard_outline(
    is_object: Bool[np.ndarray, "h w"], is_background: Bool[np.ndarray, "h w"]
) -> bool:
    around = cv2.dilate(is_object.view(np.uint8), np.ones((3, 3), np.uint8)).view(bool) & ~is_object
    return bool(around.any()) and float(is_background[around].mean()) > _HARD_OUTLINE_RATE


def _is_scattered(ranks: Shaped[np.ndarray, "h w"], is_solid: Bool[np.ndarray, "n"]) -> bool:
    thin = np.flatnonzero(~is_solid)
    chosen = thin[:: -(-len(thin) // _LABELS_LOOKED_AT)]
    pieces = [cv2.connectedComponents((ranks == rank).view(np.uint8))[0] - 1 for rank in chosen]
    return float(np.mean(pieces)) >= _MANY_PIECES


def _check_constant(labels: Shaped[np.ndarray, "h w"], count: int) -> None:
    """Refuses photographs and smooth maps, in which a value is no object."""
    # A part of the rows and columns of a large picture is enough.
    stride = 1 + labels.size // _PIXELS_LOOKED_AT
    rows, columns = labels[::stride].astype(np.int64), labels[:, ::stride].astype(np.int64)
    across, down = np.diff(rows, axis=1), np.diff(columns, axis=0)
    steps = np.abs(np.concatenate([across.reshape(-1), down.reshape(-1)]))
    changes = steps[steps > 0]
    if changes.size > _MAX_CHANGE_RATE * steps.size:
        raise LabelMapError(
            f"it has {count} values that change from pixel to pixel; is it a photograph?"
        )
    if (changes == 1).mean() > _MAX_RAMP_RATE:
        raise LabelMapError(
            f"it has {count} values that change by 1 from pixel to pixel, as probabilities or "
            "distances do; make masks of them by a threshold"
        )


def _ranked(
    labels: Shaped[np.ndarray, "*shape"],
) -> tuple[Int64[np.ndarray, "n"], UInt16[np.ndarray, "*shape"] | Int64[np.ndarray, "*shape"]]:
    """The values there are, rising, and the position of each pixel's among them."""
    if labels.size and labels.min() >= 0 and labels.max() < 1 << 16:
        # Faster than ``np.unique``, which sorts the pixels.
        is_there = np.bincount(labels.reshape(-1)) > 0
        ranks = (np.cumsum(is_there) - 1).astype(np.uint16)
        return np.flatnonzero(is_there), ranks[labels]
    values, ranks = np.unique(labels, return_inverse=True)
    kind = np.uint16 if len(values) <= 1 << 16 else np.int64
    return values.astype(np.int64), ranks.reshape(labels.shape).astype(kind)


def _between(
    channels: Shaped[np.ndarray, "h w c"],
    solid: Bool[np.ndarray, "h w"],
    background: Bool[np.ndarray, "h w"],
) -> Bool[np.ndarray, "h w"]:
    """True for pixels between solid values near them, or one and the background, in each channel.

    Background may be near without being solid, as a gap between objects.
    """
    window = np.ones((2 * _REACH_PX + 1, 2 * _REACH_PX + 1), np.uint8)
    between = np.ones(solid.shape, bool)
    for channel in np.moveaxis(channels.astype(np.float32), -1, 0):
        least = cv2.erode(np.where(solid, channel, np.float32(np.inf)), window)
        greatest = cv2.dilate(np.where(solid, channel, np.float32(-np.inf)), window)
        if background.any():
            ground = channel[background][0]
            least, greatest = np.minimum(least, ground), np.maximum(greatest, ground)
        between &= (least <= channel) & (channel <= greatest) & (least < greatest)
    return between
