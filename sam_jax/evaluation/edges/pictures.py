"""Pictures of an edge evaluation: curves of precision and recall, and edge maps."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from sam_jax.arrays import Bool, UInt8
from sam_jax.visualize import INK, MUTED, grid, palette, resize_picture

_PANEL_PX = 320
_COLUMNS = 3


def precision_recall(
    curves: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    scores: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    dpi: int = 144,
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Precision against recall, with lines of equal F and a dot at the best threshold.

    Args:
      curves: see ``EdgeReport``; those of the first source in colours, the others dashed.
      scores: see there.
      dpi: pixels per inch; the picture is 5 inches wide.
    """
    # Not at the top of the file: it takes a second to import, and nothing else here needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5.6), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    _draw_equal_f(axis)
    colors = palette(max(map(len, curves.values())))
    for place, (source, by_suppression) in enumerate(curves.items()):
        style: Any = "-" if place == 0 else (0, (1 + place, 2))
        for color, (suppression, curve) in zip(colors, by_suppression.items(), strict=False):
            recall, precision = (np.array(curve[name]) for name in ("recall", "precision"))
            # Where nothing is predicted there is no precision.
            drawn = (recall > 0) | (precision > 0)
            best = scores[source][suppression]
            label = f"{source}, {suppression}: ODS {best['ods']:.3f}"
            shade = np.array(color) / 255
            axis.plot(recall[drawn], precision[drawn], color=shade, linestyle=style, label=label)
            axis.plot(best["ods_recall"], best["ods_precision"], "o", color=shade, markersize=4)
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision", aspect="equal")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        loc="outside lower center", ncols=2, frameon=False, fontsize=8, labelcolor=_unit(INK)
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def map_sheet(
    rows: Sequence[
        tuple[
            str,
            UInt8[np.ndarray, "_ _ 3"],
            UInt8[np.ndarray, "_ _"],
            Sequence[Bool[np.ndarray, "_ _"]],
        ]
    ],
) -> UInt8[np.ndarray, "_ _ 3"]:
    """A row ``image | edge map | annotators`` for each image; edges are dark.

    Args:
      rows: caption, image, edge map and boundaries, of which the most agreed upon are the darkest.
    """
    pictures, captions = [], []
    for caption, pixels, edges, boundaries in rows:
        agreed = np.rint(255 * np.mean(boundaries, axis=0)).astype(np.uint8)
        panels = (pixels, *(np.dstack([255 - plane] * 3) for plane in (edges, agreed)))
        pictures += [_fitted(panel) for panel in panels]
        captions += [caption, "edges", f"{len(boundaries)} annotators"]
    return grid(pictures, captions, columns=_COLUMNS)


def _draw_equal_f(axis: Any) -> None:
    recall = np.linspace(0.01, 1, 400)
    for tenth in range(1, 10):
        f = tenth / 10
        # F = 2 P R / (P + R), solved for P.
        reachable = recall[recall > f / 2]
        precision = f * reachable / (2 * reachable - f)
        inside = precision <= 1
        axis.plot(reachable[inside], precision[inside], color="#d8dbe1", linewidth=0.8, zorder=0)
        axis.annotate(
            f"F {f:.1f}", (1, f / (2 - f)), (2, 0), textcoords="offset points", va="center",
            fontsize=7, color=_unit(MUTED), annotation_clip=False,
        )  # fmt: skip


def _fitted(picture: UInt8[np.ndarray, "_ _ 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
    height, width = picture.shape[:2]
    scale = _PANEL_PX / max(height, width)
    return resize_picture(picture, (max(round(height * scale), 1), max(round(width * scale), 1)))


def _unit(color: tuple[int, int, int]) -> tuple[float, float, float]:
    red, green, blue = color
    return red / 255, green / 255, blue / 255
