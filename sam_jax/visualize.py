"""Pictures of masks, prompts and results: numpy arrays in, uint8 RGB arrays out.

Nothing here changes its inputs, opens a window or touches matplotlib's global state, so it is safe
in threads and on machines without a display. Coordinates are ``(x, y)`` pixel indices of the image
they are drawn on.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sam_jax.arrays import Bool, Float, Int, UInt8, UInt16
from sam_jax.errors import ConfigError

Color = tuple[int, int, int]

# What pictures can be written as, by suffix: Pillow's names.
PICTURE_FORMS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}

BLUE: Color = (0, 114, 255)
ORANGE: Color = (255, 149, 0)
GREEN: Color = (18, 168, 90)
RED: Color = (222, 45, 58)
INK: Color = (36, 39, 46)
MUTED: Color = (112, 118, 130)
PAPER: Color = (255, 255, 255)
# Colour around pictures that do not fill their panel.
_FRAME: Color = (240, 241, 244)

# The first colours of every palette, chosen to stand apart also for the colour-blind.
_FIRST_COLORS: tuple[Color, ...] = (
    BLUE,
    ORANGE,
    (0, 190, 140),
    (232, 62, 140),
    (250, 214, 20),
    (126, 87, 255),
    (64, 200, 255),
    (214, 82, 20),
)
_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
# Marks and text are drawn this many times larger and then reduced, which smooths their edges.
_SUPERSAMPLING = 6


def palette(num_colors: int) -> list[Color]:
    """Colours that differ as much as so many can, the same for the same place every time."""
    colors = list(_FIRST_COLORS[:num_colors])
    for index in range(len(colors), num_colors):
        # Turning by the golden angle keeps any number of hues apart; lightness alternates besides.
        lightness = (0.70, 0.58, 0.80)[index % 3]
        colors.append(_from_oklch(lightness, 0.16, index * _GOLDEN_ANGLE))
    return colors


def overlay_masks(
    image: UInt8[np.ndarray, "h w 3"],
    masks: Bool[np.ndarray, "k _ _"],
    colors: Sequence[Color] | None = None,
    *,
    fill_rate: float = 0.42,
    contour_px: float = 2.0,
) -> UInt8[np.ndarray, "h w 3"]:
    """The image under translucent masks with crisp, smooth contours.

    Large masks are drawn first, so that small ones on top of them stay visible. Contours run just
    inside their masks, so that neighbours do not cover each other's.

    Args:
      image: RGB.
      masks: any number, also none, of the image's size; they may overlap.
      colors: one per mask; by default from ``palette``.
      fill_rate: opacity within the contour, in [0, 1].
      contour_px: width of the contour; 0 draws none.

    Raises:
      ValueError: masks and image differ in size, or masks and colours in number.
    """
    colors = palette(len(masks)) if colors is None else colors
    if masks.shape[1:] != image.shape[:2] or len(colors) != len(masks):
        raise ValueError(
            f"masks {list(masks.shape)} with {len(colors)} colours do not fit an image "
            f"{list(image.shape)}"
        )
    canvas = image.astype(np.float32)
    areas = np.count_nonzero(masks, axis=(1, 2))
    for index in np.argsort(-areas, kind="stable"):
        if areas[index]:
            _blend_mask(canvas, masks[index], colors[index], fill_rate, contour_px)
    return _to_bytes(canvas)


def draw_points(
    image: UInt8[np.ndarray, "h w 3"],
    point_coords: Float[np.ndarray, "n 2"] | Int[np.ndarray, "n 2"],
    point_labels: Int[np.ndarray, "n"],
    *,
    radius_px: float | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with clicks on it: a green plus for foreground, a red minus for background.

    Args:
      image: RGB.
      point_coords: where.
      point_labels: 1 for foreground, 0 for background.
      radius_px: of the discs; by default a thirty-sixth of the image's longer side.
    """
    if radius_px is None:
        radius_px = max(5.0, max(image.shape[:2]) / 36)
    canvas = Image.fromarray(image)
    for (x, y), label in zip(point_coords.tolist(), point_labels.tolist(), strict=True):
        mark = _click_mark(radius_px, label == 1)
        corner = (round(x + 0.5 - mark.width / 2), round(y + 0.5 - mark.height / 2))
        canvas.paste(mark, corner, mark)
    return np.asarray(canvas)


def draw_boxes(
    image: UInt8[np.ndarray, "h w 3"],
    boxes_xyxy: Float[np.ndarray, "k 4"] | Int[np.ndarray, "k 4"],
    colors: Sequence[Color] | None = None,
    *,
    line_px: float = 2.5,
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with boxes around their contents, whose corners are pixels inside the box.

    Args:
      image: RGB.
      boxes_xyxy: both corners, inclusive.
      colors: one per box; green by default.
      line_px: width of the lines, which lie outside the box.
    """
    canvas = image.astype(np.float32)
    ys, xs = np.ogrid[: image.shape[0], : image.shape[1]]
    for box, color in zip(boxes_xyxy.tolist(), colors or [GREEN] * len(boxes_xyxy), strict=True):
        x0, y0, x1, y1 = box
        # Distance to the box's edge, positive outside, as if its corners were not rounded.
        outside = np.maximum(
            np.abs(xs - (x0 + x1) / 2) - (x1 - x0 + 1) / 2,
            np.abs(ys - (y0 + y1) / 2) - (y1 - y0 + 1) / 2,
        )
        _blend(canvas, INK, 0.5 * _band(outside, -1.0, line_px + 1.0))
        _blend(canvas, color, _band(outside, 0.0, line_px))
    return _to_bytes(canvas)


def save_picture(
    path: Path,
    picture: UInt8[np.ndarray, "h w 3"] | UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"],
    form: str = "PNG",
) -> None:
    """Writes a PNG, or another of the forms of ``picture_form``; makes the folder.

    Args:
      path: whatever its suffix.
      picture: of more than 8 bits, as a PNG only.
      form: by its name in Pillow.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, dict[str, int]] = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": 1},
    }
    Image.fromarray(picture).save(path, format=form, **options.get(form, {}))


def picture_form(path: Path, *, is_mask: bool = False) -> str:
    """Pillow's name for the form of picture that a file's name says.

    Args:
      path: the file.
      is_mask: whether every pixel must come back as it is, which leaves JPEG out.

    Raises:
      ConfigError: if it is none that can be written.
    """
    forms = {s: f for s, f in PICTURE_FORMS.items() if not (is_mask and f == "JPEG")}
    form = forms.get(path.suffix.lower())
    if form is None:
        ending = f"ends in {path.suffix!r}" if path.suffix else "has no ending"
        raise ConfigError(f"{path} {ending}: expected one of {', '.join(forms)}")
    return form


def resize_picture(
    image: UInt8[np.ndarray, "h w 3"], size_hw: tuple[int, int]
) -> UInt8[np.ndarray, "oh ow 3"]:
    """The image at another size, smooth in both directions."""
    resample = Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(image).resize(size_hw[::-1], resample))


def resize_mask(
    mask: Bool[np.ndarray, "h w"], size_hw: tuple[int, int]
) -> Bool[np.ndarray, "oh ow"]:
    """The mask at another size; enlarged, its edge is a smooth line and not a staircase."""
    factor = max(size_hw[0] / mask.shape[0], size_hw[1] / mask.shape[1])
    interpolation = cv2.INTER_LINEAR if factor > 1 else cv2.INTER_AREA
    soft = cv2.resize(mask.astype(np.float32), size_hw[::-1], interpolation=interpolation)
    if factor > 1:
        soft = cv2.GaussianBlur(soft, (0, 0), 0.45 * factor, borderType=cv2.BORDER_REPLICATE)
    return soft > 0.5


def grid(
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    margin_px: int = 14,
    text_px: int = 15,
    background: Color = PAPER,
) -> UInt8[np.ndarray, "h w 3"]:
    """Pictures side by side in rows, each with its caption below, on a plain sheet.

    Args:
      pictures: at least one; smaller ones are centred in their cell.
      captions: one per picture; captions wider than a picture are cut off with an ellipsis.
      columns: pictures in a row; by default as many as make the sheet about square.
      margin_px: around every cell.
      text_px: height of the captions' letters.
      background: colour of the sheet.

    Raises:
      ValueError: there is no picture, or captions and pictures differ in number.
    """
    if not pictures or (captions is not None and len(captions) != len(pictures)):
        raise ValueError(f"{len(pictures)} pictures with {captions} captions make no sheet")
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    heights = [
        max(picture.shape[0] for picture in pictures[row * columns : (row + 1) * columns])
        for row in range(rows)
    ]
    widths = [max(picture.shape[1] for picture in pictures[c::columns]) for c in range(columns)]
    caption_px = 0 if captions is None else round(1.9 * text_px)
    sheet = Image.new(
        "RGB",
        (
            sum(widths) + margin_px * (columns + 1),
            sum(heights) + (margin_px + caption_px) * rows + margin_px,
        ),
        background,
    )
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        left = margin_px + sum(widths[:column]) + margin_px * column
        top = margin_px + sum(heights[:row]) + (margin_px + caption_px) * row
        x = left + (widths[column] - picture.shape[1]) // 2
        y = top + (heights[row] - picture.shape[0]) // 2
        sheet.paste(Image.fromarray(picture), (x, y))
        if captions is not None:
            middle = (left + widths[column] / 2, top + heights[row] + 0.55 * caption_px)
            _write(sheet, captions[index], middle, text_px, max_width=widths[column])
    return np.asarray(sheet)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One prompted mask, ready to be shown.

    Attributes:
      image: RGB.
      ground_truth: the mask that was wanted.
      prediction: the mask that came out.
      caption: what to write beside it, such as its IoU.
      point_coords: clicks, as ``(x, y)`` pixels of the image.
      point_labels: 1 for foreground, 0 for background.
      box_xyxy: the four numbers of a box prompt, corners inclusive.
    """

    image: UInt8[np.ndarray, "h w 3"]
    ground_truth: Bool[np.ndarray, "h w"]
    prediction: Bool[np.ndarray, "h w"]
    caption: str = ""
    point_coords: Float[np.ndarray, "n 2"] | Int[np.ndarray, "n 2"] | None = None
    point_labels: Int[np.ndarray, "n"] | None = None
    box_xyxy: Sequence[float | int] | None = None


COLUMN_TITLES = ("image", "prompt", "prediction", "ground truth")


def example_sheet(
    examples: Sequence[Example], *, title: str = "", panel_px: int = 260
) -> UInt8[np.ndarray, "h w 3"]:
    """A row ``image | prompt | prediction | ground truth`` for each example, captions at the left.

    The first panel shows the whole image; the others show the surroundings of the object, which
    are marked in the first one if they are less than the whole.

    Args:
      examples: at least one.
      title: written above all rows.
      panel_px: height and width of each panel.

    Raises:
      ValueError: there is no example.
    """
    if not examples:
        raise ValueError("there is no example to show")
    margin, text_px = max(6, panel_px // 28), max(11, panel_px // 17)
    caption_px = round(0.62 * panel_px) if any(e.caption for e in examples) else 0
    title_px = round(2.6 * text_px) if title else 0
    header_px = round(2.2 * text_px)
    width = caption_px + 4 * panel_px + 5 * margin
    height = title_px + header_px + len(examples) * (panel_px + margin) + margin
    sheet = Image.new("RGB", (width, height), PAPER)
    if title:
        _write(sheet, title, (width / 2, 0.6 * title_px), round(1.25 * text_px), max_width=width)
    lefts = [caption_px + margin + column * (panel_px + margin) for column in range(4)]
    for left, text in zip(lefts, COLUMN_TITLES, strict=True):
        middle = (left + panel_px / 2, title_px + 0.5 * header_px)
        _write(sheet, text, middle, text_px, color=MUTED, max_width=panel_px)
    for row, example in enumerate(examples):
        top = title_px + header_px + row * (panel_px + margin)
        for line, text in enumerate(example.caption.splitlines()):
            middle = (caption_px / 2 + margin / 2, top + panel_px / 2)
            offset = (line - (len(example.caption.splitlines()) - 1) / 2) * 1.5 * text_px
            _write(
                sheet,
                text,
                (middle[0], middle[1] + offset),
                text_px,
                color=INK if line == 0 else MUTED,
                max_width=caption_px - margin,
            )
        for left, panel in zip(lefts, example_panels(example, panel_px), strict=True):
            sheet.paste(Image.fromarray(panel), (left, top))
    return np.asarray(sheet)


def example_panels(example: Example, panel_px: int) -> list[UInt8[np.ndarray, "s s 3"]]:
    """The four square panels of an example; see ``example_sheet``."""
    whole_image = (0, 0, *example.image.shape[:2])
    window = _surroundings(example)
    whole, close = _Frame(whole_image, panel_px), _Frame(window, panel_px)

    overview = whole.image(example.image)
    if window != whole_image:
        y0, x0, y1, x1 = window
        corners = whole.points(np.array([[x0, y0], [x1 - 1, y1 - 1]]))
        overview = draw_boxes(overview, corners.reshape(1, 4), [PAPER], line_px=2)

    plain = close.image(example.image)
    prompt = plain
    if example.box_xyxy is not None:
        corners = np.array(example.box_xyxy, float).reshape(2, 2)
        # A box ends with its outer pixels' outer edges; enlarged, these are half a pixel away.
        half = np.array([[-0.5], [0.5]])
        prompt = draw_boxes(prompt, (close.points(corners + half) - half).reshape(1, 4))
    if example.point_coords is not None and example.point_labels is not None:
        prompt = draw_points(prompt, close.points(example.point_coords), example.point_labels)

    contour_px = max(1.5, panel_px / 130)
    masks = [
        overlay_masks(plain, close.mask(mask)[None], [color], contour_px=contour_px)
        for mask, color in ((example.prediction, BLUE), (example.ground_truth, ORANGE))
    ]
    return [overview, prompt, *masks]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a diagram.

    Attributes:
      label: its entry in the legend; equal labels share one entry.
      x, y: its points.
      color: RGB.
      style: a line with marks, marks alone, or a dashed line at each height across the diagram.
    """

    label: str
    x: Sequence[float | int]
    y: Sequence[float | int]
    color: Color
    style: Literal["line", "marks", "level"] = "line"


def draw_curves(
    panels: Mapping[str, Sequence[Curve]],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float | int] | None = None,
    y_limits: tuple[float, float] | None = None,
    columns: int = 3,
    dpi: int = 144,
) -> UInt8[np.ndarray, "h w 3"]:
    """Diagrams with the same axes side by side, with one legend for all.

    Args:
      panels: curves by the title of their diagram; at least one.
      x_label: below the lowest row.
      y_label: beside the first column.
      x_ticks: where the horizontal axis has numbers.
      y_limits: of the vertical axis, the same for all.
      columns: diagrams in a row.
      dpi: pixels per inch; a diagram is 3 inches wide.

    Raises:
      ValueError: there is no panel.
    """
    # Not at the top of the file: it takes a second to import, and nothing else here needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("there is no diagram to draw")
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    labels = list(dict.fromkeys(curve.label for curves in panels.values() for curve in curves))
    # A legend's entry takes up to 2.3 inches and its row a fifth of one.
    legend_columns = max(1, int((3.0 * columns + 0.6) / 2.3))
    legend_rows = math.ceil(len(labels) / legend_columns)
    size = (3.0 * columns + 0.6, 2.5 * rows + 0.4 + 0.2 * legend_rows)
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    ink, muted = unit_color(INK), unit_color(MUTED)
    legend: dict[str, Any] = {}
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for curve in curves:
            legend.setdefault(curve.label, _plot(axis, curve))
        axis.set_title(title, fontsize=10, color=ink, loc="left", pad=5)
        axis.grid(axis="y", color="#e6e8ec", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color("#b8bdc7")
        axis.tick_params(colors=muted, labelsize=8.5, length=0, pad=4, labelbottom=True)
        if x_ticks is not None:
            axis.set_xticks(list(x_ticks))
        if y_limits is not None:
            axis.set_ylim(*y_limits)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel(x_label, fontsize=9.5, color=muted)
    for axis in axes[::columns]:
        axis.set_ylabel(y_label, fontsize=9.5, color=muted)
    figure.legend(
        handles=[legend[label] for label in labels],
        labels=labels,
        loc="outside lower center",
        ncols=legend_columns,
        frameon=False,
        fontsize=9,
        labelcolor=ink,
        handlelength=1.8,
        columnspacing=1.6,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def _plot(axis: Any, curve: Curve) -> Any:
    color = unit_color(curve.color)
    if curve.style == "level":
        for height in curve.y:
            line = axis.axhline(height, color=color, linewidth=1.3, linestyle=(0, (4, 2.5)))
        return line
    line = "-" if curve.style == "line" else "none"
    face = color if curve.style == "line" else "white"
    (drawn,) = axis.plot(
        curve.x,
        curve.y,
        color=color,
        linestyle=line,
        linewidth=2.0,
        marker="o",
        markersize=5.5,
        markerfacecolor=face,
        markeredgecolor="white" if curve.style == "line" else color,
        markeredgewidth=1.0 if curve.style == "line" else 1.6,
        clip_on=False,
        zorder=3,
    )
    return drawn


class _Frame:
    """A window of an image, enlarged or reduced to fit a square of pixels, in its middle."""

    def __init__(self, window: tuple[int, int, int, int], size_px: int):
        self._size_px = size_px
        self._rows, self._columns = slice(window[0], window[2]), slice(window[1], window[3])
        height, width = window[2] - window[0], window[3] - window[1]
        self._origin = np.array([window[1], window[0]])
        self._scale = size_px / max(height, width)
        self._size = (max(1, round(height * self._scale)), max(1, round(width * self._scale)))
        self._corner = ((size_px - self._size[0]) // 2, (size_px - self._size[1]) // 2)

    def image(self, image: np.ndarray) -> np.ndarray:
        picture = resize_picture(image[self._rows, self._columns], self._size)
        return self._on_square(picture, np.full((*[self._size_px] * 2, 3), _FRAME, np.uint8))

    def mask(self, mask: np.ndarray) -> np.ndarray:
        small = resize_mask(mask[self._rows, self._columns], self._size)
        return self._on_square(small, np.zeros([self._size_px] * 2, bool))

    def points(self, coords: np.ndarray) -> np.ndarray:
        # Centres of pixels go to where they come to lie, not to the centre of some pixel.
        return (coords - self._origin + 0.5) * self._scale - 0.5 + self._corner[::-1]

    def _on_square(self, picture: np.ndarray, square: np.ndarray) -> np.ndarray:
        (y, x), (height, width) = self._corner, self._size
        square[y : y + height, x : x + width] = picture
        return square


def _surroundings(example: Example) -> tuple[int, int, int, int]:
    """Rows and columns ``y0, x0, y1, x1`` around both masks and all clicks, with some context."""
    height, width = example.image.shape[:2]
    x, y, w, h = cv2.boundingRect(example.ground_truth.view(np.uint8))
    x0, y0, x1, y1 = x, y, x + w, y + h
    if example.point_coords is not None and len(example.point_coords):
        xs, ys = example.point_coords.T
        x0, y0 = min(x0, int(xs.min())), min(y0, int(ys.min()))
        x1, y1 = max(x1, int(xs.max()) + 1), max(y1, int(ys.max()) + 1)
    side = max(64, round(1.9 * max(x1 - x0, y1 - y0)))
    if side >= 0.75 * max(height, width):
        return 0, 0, height, width
    top = min(max((y0 + y1 - side) // 2, 0), max(height - side, 0))
    left = min(max((x0 + x1 - side) // 2, 0), max(width - side, 0))
    return top, left, min(top + side, height), min(left + side, width)


def _blend_mask(canvas, mask, color, fill_rate, contour_px):
    reach = math.ceil(contour_px) + 4
    x, y, w, h = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
    y0, x0 = max(y - reach, 0), max(x - reach, 0)
    part = (slice(y0, y + h + reach), slice(x0, x + w + reach))
    inside = mask[part].astype(np.uint8)
    # Beyond the image the mask is taken to go on, so that no contour runs along the image's edge.
    inside = cv2.copyMakeBorder(inside, reach, reach, reach, reach, cv2.BORDER_REPLICATE)
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    if not inside.all():
        depth -= cv2.distanceTransform(1 - inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Distances to pixels' centres jump from -1 to 1 across the edge; smoothed they pass through 0.
    depth = cv2.GaussianBlur(depth, (0, 0), 0.9)[reach:-reach, reach:-reach]
    area = canvas[part]
    _blend(area, color, fill_rate * np.clip(depth + 0.5, 0, 1))
    if contour_px:
        _blend(area, PAPER, 0.55 * _band(depth, -1.2, 0.0))
        _blend(area, color, _band(depth, 0.0, contour_px))


def _band(distance, low, high):
    """Fraction of a pixel at ``distance`` from a line that lies within ``[low, high]`` of it."""
    covered = np.minimum(distance + 0.5, high) - np.maximum(distance - 0.5, low)
    return np.clip(covered, 0, 1)


def _blend(area, color, opacity):
    area += (np.array(color, np.float32) - area) * opacity[..., None].astype(np.float32)


def _to_bytes(canvas):
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def _click_mark(radius_px: float, is_foreground: bool) -> Image.Image:
    # Odd, so that the mark has a middle pixel to lay on the clicked one.
    size = 2 * math.ceil(radius_px) + 5
    scale = _SUPERSAMPLING
    mark = Image.new("RGBA", (size * scale, size * scale), (0, 0, 0, 0))
    draw = ImageDraw.Draw(mark)
    middle, radius = size * scale / 2, radius_px * scale
    rings = ((1.12, (*INK, 110)), (1.0, (*PAPER, 255)), (0.8, (*_click_color(is_foreground), 255)))
    for reach, color in rings:
        r = reach * radius
        draw.ellipse((middle - r, middle - r, middle + r, middle + r), fill=color)
    long, thick = 0.44 * radius, 0.13 * radius
    draw.rectangle((middle - long, middle - thick, middle + long, middle + thick), fill=PAPER)
    if is_foreground:
        draw.rectangle((middle - thick, middle - long, middle + thick, middle + long), fill=PAPER)
    return mark.resize((size, size), Image.Resampling.BOX)


def _click_color(is_foreground: bool) -> Color:
    return GREEN if is_foreground else RED


def _write(sheet, text, middle, size_px, *, color=INK, max_width):
    """Writes one line centred at ``middle``, shortened with an ellipsis to fit."""
    font = ImageFont.load_default(size_px)
    if font.getlength(text) > max_width:
        while text and font.getlength(text + "…") > max_width:
            text = text[:-1]
        text = text.rstrip() + "…"
    ImageDraw.Draw(sheet).text(middle, text, fill=color, font=font, anchor="mm")


def unit_color(color: Color) -> tuple[float, float, float]:
    """A colour in [0, 1], as matplotlib takes it."""
    red, green, blue = color
    return red / 255, green / 255, blue / 255


def _from_oklch(lightness: float, chroma: float, hue: float) -> Color:
    """A colour given by perceived lightness, chroma and hue, as sRGB bytes.

    Source: Ottosson 2020, "A perceptual color space for image processing".
    """
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    lms = np.array(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    ) @ (lms**3)
    linear = np.clip(linear, 0, 1)
    encoded = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    red, green, blue = np.rint(255 * encoded).astype(int).tolist()
    return red, green, blue
