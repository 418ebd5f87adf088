"""Figures of numbers with their intervals: differences of two models, and groups of masks."""

import io
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sam_jax.arrays import UInt8
from sam_jax.visualize import BLUE, INK, MUTED, ORANGE, palette, unit_color

_ROW_IN = 0.26
_MAX_NAME = 60


class Bar(NamedTuple):
    """A number with its interval; NaN where there is none."""

    value: float
    low: float
    high: float


def draw_differences(
    bars: Mapping[str, Bar],
    mean: Bar | None,
    *,
    title: str,
    names: tuple[str, str],
    dpi: int = 144,
) -> UInt8[np.ndarray, "h w 3"]:
    """A bar for each data set, the largest on top, with intervals and numbers.

    Args:
      bars: differences by data set; at least one.
      mean: theirs, as a bar of its own below; None draws none.
      title: above.
      names: what was compared, A and B.
      dpi: pixels per inch; the figure is 7 inches wide.
    """
    rows = sorted(bars.items(), key=lambda item: -item[1].value)
    if mean is not None:
        rows.append((f"mean of {len(bars)}", mean))
    figure = _new_figure((7.0, 1.3 + _ROW_IN * len(rows)), dpi)
    axis = figure.subplots()
    places = [float(place) for place in range(len(rows))]
    if mean is not None:
        places[-1] += 0.5
    for place, (_, bar) in zip(places, rows, strict=True):
        color = BLUE if bar.value >= 0 else ORANGE
        is_mean = mean is not None and place == places[-1]
        axis.barh(place, bar.value, height=0.66, color=unit_color(INK if is_mean else color))
        if math.isfinite(bar.low):
            axis.plot([bar.low, bar.high], [place] * 2, color=unit_color(MUTED), linewidth=1.4)
    ends = [x for _, bar in rows for x in (*bar, 0.0) if math.isfinite(x)]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0
    for place, (_, bar) in zip(places, rows, strict=True):
        # Beyond the interval, on the side where the bar points to.
        is_right = bar.value >= 0
        finite = [x for x in (*bar, 0.0) if math.isfinite(x)]
        edge = max(finite) if is_right else min(finite)
        axis.text(
            edge + (0.012 if is_right else -0.012) * span,
            place,
            f"{bar.value:+.1f}",
            ha="left" if is_right else "right",
            va="center",
            fontsize=8,
            color=unit_color(INK),
        )
    axis.set_xlim(low - 0.1 * span, high + 0.1 * span)
    axis.set_ylim(places[-1] + 0.6, -0.6)
    axis.set_yticks(places, [_short(name) for name, _ in rows])
    axis.axvline(0, color=unit_color(INK), linewidth=0.8)
    axis.grid(axis="x", color="#e6e8ec", linewidth=0.8)
    axis.set_title(title, fontsize=10, color=unit_color(INK), loc="left")
    axis.set_xlabel(
        f"A: {_short(names[0])}\nB: {_short(names[1])}",
        fontsize=8,
        color=unit_color(MUTED),
        loc="left",
    )
    _finish(axis)
    return _picture(figure)


def draw_groups(
    panels: Mapping[str, Mapping[str, Mapping[str, Bar]]], *, x_label: str, dpi: int = 144
) -> UInt8[np.ndarray, "h w 3"]:
    """A row of diagrams for each attribute, a diagram for each measure, a mark for each group.

    Args:
      panels: means by attribute, measure and group; at least one of each.
      x_label: what the means are.
      dpi: pixels per inch.
    """
    measures = list(dict.fromkeys(measure for of in panels.values() for measure in of))
    sizes = [max(len(groups) for groups in of.values()) for of in panels.values()]
    heights = [0.75 + _ROW_IN * size for size in sizes]
    figure = _new_figure((1.6 + 2.6 * len(measures), 0.3 + sum(heights)), dpi)
    axes = figure.subplots(len(panels), len(measures), squeeze=False, height_ratios=heights)
    for row, (attribute, of_attribute) in zip(axes, panels.items(), strict=True):
        for axis, measure in zip(row, measures, strict=True):
            groups = of_attribute.get(measure, {})
            _draw_panel(axis, groups)
            is_first = axis is row[0]
            axis.set_yticks(
                range(len(groups)), [_short(name, 28) if is_first else "" for name in groups]
            )
            title = f"{attribute}: {measure}" if is_first else measure
            axis.set_title(_short(title, 40), fontsize=9.5, color=unit_color(INK), loc="left")
            _finish(axis)
    for axis in axes[-1]:
        axis.set_xlabel(x_label, fontsize=9, color=unit_color(MUTED))
    return _picture(figure)


def _draw_panel(axis: Any, groups: Mapping[str, Bar]) -> None:
    for place, (bar, color) in enumerate(zip(groups.values(), palette(len(groups)), strict=True)):
        if not math.isfinite(bar.value):
            continue
        has_interval = math.isfinite(bar.low)
        if has_interval:
            axis.plot([bar.low, bar.high], [place] * 2, color=unit_color(color), linewidth=2)
        axis.plot(
            bar.value,
            place,
            marker="o",
            markersize=6,
            color=unit_color(color),
            # Open where nothing is known of the interval.
            markerfacecolor=unit_color(color) if has_interval else "white",
        )
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.margins(x=0.12)
    axis.grid(axis="x", color="#e6e8ec", linewidth=0.8)


def _new_figure(size: tuple[float, float], dpi: int) -> Any:
    # Not at the top of the file: it takes a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(axis: Any) -> None:
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(colors=unit_color(MUTED), labelsize=8, length=0)


def _picture(figure: Any) -> UInt8[np.ndarray, "h w 3"]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def _short(text: str, length: int = _MAX_NAME) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]
