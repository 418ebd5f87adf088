"""The figure of data sets' statistics, with the panels of the paper's figures 5 and 6."""

import io
import math
from typing import Any

import numpy as np
from PIL import Image

from sam_jax.arrays import Float, Int, UInt8
from sam_jax.dataset_statistics.counts import CONCAVITY_BINS, IMAGE_BINS, SIZE_BINS
from sam_jax.dataset_statistics.report import DatasetReport
from sam_jax.visualize import INK, MUTED, palette, unit_color

# The numbers that the paper's legend gives for the data sets of its figures: images, masks.
PAPER_LEGEND = (
    "In the paper (images, masks): SA-1B 11M, 1129M; Open Images 1M, 2.7M; LVIS 0.120M, 1.5M; "
    "COCO 0.123M, 0.9M; ADE20K 0.028M, 0.7M"
)
_MAPS_IN_A_ROW = 6
_CURVES_IN_A_ROW = 3
_WIDTH_IN = 10.5
# Few masks are shown in fewer cells, so that a map shows more than where each one is.
_FEWEST_CELLS, _MASKS_OF_CELL = 16, 4
_SIZE_CURVE_BINS = 40
_CONCAVITY_CURVE_BINS = 25
_MAX_NAME = 26


def draw_statistics(report: DatasetReport, dpi: int = 144) -> UInt8[np.ndarray, "h w 3"]:
    """Maps of mask centres, and curves of masks per image, relative size and concavity.

    Args:
      report: of any number of data sets.
      dpi: pixels per inch; the figure is 10.5 inches wide.
    """
    # Not at the top of the file: it takes a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_stores = len(report.stores)
    map_rows = math.ceil(num_stores / _MAPS_IN_A_ROW)
    legend_rows = math.ceil(num_stores / _CURVES_IN_A_ROW)
    heights = [2.0 * map_rows, 2.9, 0.3 + 0.22 * legend_rows]
    figure = Figure(figsize=(_WIDTH_IN, sum(heights)), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(3, 1, height_ratios=heights)
    maps, curves, legend = parts
    _draw_maps(maps, report, map_rows)
    handles = _draw_curves(curves, report)
    labels = [
        f"{_short(s.name)} ({s.counts.num_images:,} images, {s.counts.num_masks:,} masks)"
        for s in report.stores
    ]
    legend.legend(
        handles=handles,
        labels=labels,
        loc="upper center",
        ncols=min(num_stores, _CURVES_IN_A_ROW),
        frameon=False,
        fontsize=8.5,
        labelcolor=unit_color(INK),
    )
    legend.text(
        0.5, 0.02, PAPER_LEGEND, ha="center", va="bottom", fontsize=7.5, color=unit_color(MUTED)
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def _draw_maps(figure: Any, report: DatasetReport, rows: int) -> None:
    columns = max(min(len(report.stores), _MAPS_IN_A_ROW), 4)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, store in zip(axes, report.stores, strict=False):
        # Each map has its own scale: what it shows is where its masks are, not how many.
        axis.imshow(_pooled(store.counts.centers), cmap="viridis", interpolation="nearest")
        axis.set_title(_short(store.name), fontsize=8.5, color=unit_color(INK), pad=4)
    figure.suptitle(
        "mask centres (centroids) on the image stretched to a square",
        fontsize=9.5,
        color=unit_color(MUTED),
    )


def _draw_curves(figure: Any, report: DatasetReport) -> list[Any]:
    """Draws the three diagrams; returns a line of each data set, for the legend."""
    per_image, size, concavity = figure.subplots(1, 3)
    handles = []
    sizes_x = (np.arange(_SIZE_CURVE_BINS) + 0.5) / _SIZE_CURVE_BINS
    concavity_x = (np.arange(_CONCAVITY_CURVE_BINS) + 0.5) / _CONCAVITY_CURVE_BINS
    for store, color in zip(report.stores, palette(len(report.stores)), strict=True):
        style: dict[str, Any] = {"color": unit_color(color), "linewidth": 1.6}
        (line,) = per_image.plot(
            range(len(IMAGE_BINS)), 100 * store.image_rates, marker="o", markersize=4, **style
        )
        handles.append(line)
        sizes = store.counts.sizes.reshape(_SIZE_CURVE_BINS, SIZE_BINS // _SIZE_CURVE_BINS)
        style |= {"marker": "o", "markersize": 2.5}
        size.plot(sizes_x, _percent(sizes.sum(axis=1) / store.counts.num_masks), **style)
        stratified = store.stratified_concavity(report.strata)
        if stratified is not None:
            together = CONCAVITY_BINS // _CONCAVITY_CURVE_BINS
            rates = stratified[1].reshape(_CONCAVITY_CURVE_BINS, together).sum(axis=1)
            concavity.plot(concavity_x, _percent(rates), **style)
    per_image.set_xticks(range(len(IMAGE_BINS)), IMAGE_BINS)
    per_image.set_ylim(0, None)
    for axis in (size, concavity) if report.strata else (size,):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    for axis in (size, concavity):
        axis.set_xlim(0, 1)
    for axis, x_label, y_label in (
        (per_image, "masks of an image", "images, %"),
        (size, "relative size of masks", "masks, %"),
        (concavity, "concavity, sizes balanced", "masks, %"),
    ):
        axis.set_xlabel(x_label, fontsize=9.5, color=unit_color(MUTED))
        axis.set_ylabel(y_label, fontsize=9.5, color=unit_color(MUTED))
        axis.grid(axis="y", color="#e6e8ec", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=unit_color(MUTED), labelsize=8)
    if not report.strata:
        concavity.text(
            *(0.5, 0.5, "no stratum of sizes\nthat all data sets have masks in"),
            transform=concavity.transAxes,
            ha="center",
            va="center",
            fontsize=8.5,
            color=unit_color(MUTED),
        )
    return handles


def _percent(rates: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Rates in percent; a logarithm has no place for none of them."""
    return np.where(rates > 0, 100 * rates, np.nan)


def _pooled(centers: Int[np.ndarray, "c c"]) -> Int[np.ndarray, "k k"]:
    """The map of centres in cells of which each has some masks on average."""
    cells = len(centers)
    while cells > _FEWEST_CELLS and centers.sum() < _MASKS_OF_CELL * cells**2:
        cells //= 2
        centers = centers.reshape(cells, 2, cells, 2).sum(axis=(1, 3))
    return centers


def _short(name: str) -> str:
    """The end of a name that is too long, which tells more than its beginning."""
    return name if len(name) <= _MAX_NAME else "…" + name[1 - _MAX_NAME :]
