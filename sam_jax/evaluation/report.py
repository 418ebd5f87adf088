"""What an evaluation found: numbers for programs, a table and pictures for people."""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from sam_jax.arrays import UInt8
from sam_jax.checkpoint import CHECKPOINTS
from sam_jax.evaluation.baselines import DISK_BASELINE
from sam_jax.evaluation.protocols import BOX_PROTOCOL, CLICK_PROTOCOLS, ORACLE
from sam_jax.visualize import BLUE, GREEN, MUTED, ORANGE, Color, Curve, draw_curves

MEAN = "mean"

_CLICK_NAMES = {
    "center": "centre",
    "random": "random",
    "center_points_only": "centre, points only",
    "random_points_only": "random, points only",
}
_BOX_COLUMNS = {
    BOX_PROTOCOL: "model",
    f"{BOX_PROTOCOL}_{ORACLE}": "best of 3",
    "box_filled": "whole box",
    "box_ellipse": "ellipse",
    "box_grabcut": "GrabCut",
}
_CURVES: dict[str, tuple[str, Color]] = {
    "center": ("first click at the centre", BLUE),
    "random": ("random first click", ORANGE),
    "center_points_only": ("centre, points only", (120, 180, 255)),
    "random_points_only": ("random, points only", (255, 200, 120)),
}


@dataclasses.dataclass(frozen=True)
class DatasetReport:
    """What was found on one dataset.

    Attributes:
      name: of the dataset.
      num_images: images with at least one mask.
      num_masks: masks that every mean is over.
      skipped: images and masks left out, and what was decided about others, by reason.
      miou: mean IoU in [0, 1] by measure.
      examples: one case of what was skipped, by reason; of the host that reports.
    """

    name: str
    num_images: int
    num_masks: int
    skipped: dict[str, int]
    miou: dict[str, float]
    examples: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)


@dataclasses.dataclass(frozen=True)
class EvalReport:
    """The result of an evaluation.

    Measures are named ``center_3`` (centre click, three clicks), ``center_1_oracle`` (best of the
    three masks), ``random_9``, ``box``, ``box_oracle``, ``disk_center``, ``box_grabcut``, ...

    Attributes:
      datasets: one report each, in the order of the config.
      mean: unweighted mean over the datasets, by measure.
      num_clicks: numbers of clicks after which there is a measure.
      disk_radius_rates: radius of the disk baseline, as a rate of the square root of the image's
        area, by measure.
      settings: the configuration, as plain values.
      seconds: how long it took on this host.
      pictures: RGB pictures by name.
    """

    datasets: tuple[DatasetReport, ...]
    mean: dict[str, float]
    num_clicks: tuple[int, ...]
    disk_radius_rates: dict[str, float]
    settings: dict[str, Any]
    seconds: float = dataclasses.field(compare=False)
    pictures: dict[str, UInt8[np.ndarray, "_ _ 3"]] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    def as_flat_dict(self) -> dict[str, float]:
        """Every mean IoU under ``dataset/measure`` and ``mean/measure``."""
        flat = {f"{MEAN}/{measure}": value for measure, value in self.mean.items()}
        for dataset in self.datasets:
            flat |= {f"{dataset.name}/{measure}": v for measure, v in dataset.miou.items()}
        return flat

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Writes all numbers to a file that appears whole or not at all."""
        content = {
            "mean": self.mean,
            "datasets": {
                d.name: {k: v for k, v in dataclasses.asdict(d).items() if k != "name"}
                for d in self.datasets
            },
            "disk_radius_rates": self.disk_radius_rates,
            "settings": self.settings,
            "seconds": round(self.seconds, 1),
        }
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{os.getpid()}.unfinished")
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(target)

    def write(self, folder: Path) -> None:
        """Writes ``report.json`` and a PNG for each picture."""
        self.write_json(folder / "report.json")
        for name, picture in self.pictures.items():
            Image.fromarray(picture).save(folder / f"{name}.png")

    def print_table(self, console: Console | None = None) -> None:
        """Prints mean IoU in percent, clicks and boxes apart, within 100 columns."""
        console = console or Console(width=None if sys.stdout.isatty() else 100)
        for table in (self._click_table(), self._box_table()):
            if table is not None:
                console.print(table)
        masks = sum(dataset.num_masks for dataset in self.datasets)
        images = sum(dataset.num_images for dataset in self.datasets)
        console.print(f"{masks:,} masks on {images:,} images in {self.seconds:,.0f} s")
        for dataset in self.datasets:
            if dataset.skipped:
                reasons = ", ".join(f"{n:,} {reason}" for reason, n in dataset.skipped.items())
                console.print(f"skipped or remarked in {dataset.name}: {reasons}")
            for reason, example in dataset.examples.items():
                # As it stands: file names may hold what rich reads as markup.
                console.print(f"  {reason}: {example}", markup=False, highlight=False)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes diagrams of mean IoU against the number of clicks as a PNG file."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.curves()).save(target, format="PNG")

    def curves(self) -> UInt8[np.ndarray, "_ _ 3"]:
        """Diagrams of mean IoU against the number of clicks: the mean first, then each dataset."""
        rows = self._rows()
        if MEAN in rows:
            rows = {f"mean of {len(rows) - 1} datasets": rows.pop(MEAN), **rows}
        return draw_curves(
            {name: self._curves_of(miou) for name, miou in rows.items()},
            x_label="clicks",
            y_label="mean IoU, %",
            x_ticks=self.num_clicks,
            y_limits=(0.0, 100.0),
        )

    def _curves_of(self, miou: Mapping[str, float]) -> list[Curve]:
        curves = []
        for protocol, (label, color) in _CURVES.items():
            if f"{protocol}_1_{ORACLE}" not in miou:
                continue
            heights = [100 * miou[f"{protocol}_{n}"] for n in self.num_clicks]
            curves.append(Curve(label, self.num_clicks, heights, color))
            if CLICK_PROTOCOLS[protocol].feeds_logits and 1 in self.num_clicks:
                oracle = 100 * miou[f"{protocol}_1_{ORACLE}"]
                curves.append(Curve("best of three masks", [1], [oracle], color, "marks"))
        for measure, label, color in (
            (BOX_PROTOCOL, "box prompt", GREEN),
            ("box_grabcut", "GrabCut from the box", (140, 200, 165)),
            ("disk_center", "disk around the centre click", MUTED),
        ):
            if measure in miou:
                curves.append(Curve(label, [], [100 * miou[measure]], color, "level"))
        return curves

    def _rows(self) -> dict[str, Mapping[str, float]]:
        """Mean IoU by measure of each dataset with masks and, of several, their mean."""
        rows: dict[str, Mapping[str, float]] = {d.name: d.miou for d in self.datasets if d.miou}
        return rows | ({MEAN: self.mean} if len(rows) > 1 else {})

    def _click_table(self) -> Table | None:
        protocols = [p for p in CLICK_PROTOCOLS if f"{p}_1_{ORACLE}" in self._measures()]
        if not protocols:
            return None
        columns = [(str(n), f"{{protocol}}_{n}") for n in self.num_clicks]
        columns.insert(1, ("best of 3", f"{{protocol}}_1_{ORACLE}"))
        if any(measure.startswith(DISK_BASELINE) for measure in self._measures()):
            columns.append(("disk", f"{DISK_BASELINE}_{{first_click}}"))
        table = _table("Mean IoU (%) by number of clicks", ["dataset", "masks", "first click"])
        for name, _ in columns:
            table.add_column(name, justify="right")
        for row, miou in self._rows().items():
            for protocol in protocols:
                first_click = CLICK_PROTOCOLS[protocol].first_click
                table.add_row(
                    *((row, self._num_masks(row)) if protocol == protocols[0] else ("", "")),
                    _CLICK_NAMES[protocol],
                    *_percent(
                        miou,
                        [m.format(protocol=protocol, first_click=first_click) for _, m in columns],
                    ),
                    style="bold" if row == MEAN else None,
                    end_section=protocol == protocols[-1] and len(protocols) > 1,
                )
        return table

    def _box_table(self) -> Table | None:
        measures = [m for m in _BOX_COLUMNS if m in self._measures()]
        if not measures:
            return None
        table = _table("Mean IoU (%) from the box", ["dataset", "masks"])
        for measure in measures:
            table.add_column(_BOX_COLUMNS[measure], justify="right")
        for row, miou in self._rows().items():
            style = "bold" if row == MEAN else None
            table.add_row(row, self._num_masks(row), *_percent(miou, measures), style=style)
        return table

    def _measures(self) -> set[str]:
        return {measure for dataset in self.datasets for measure in dataset.miou}

    def _num_masks(self, row: str) -> str:
        return next((f"{d.num_masks:,}" for d in self.datasets if d.name == row), "")


def results_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """Where results go if nobody says: into a run or a folder of weights, or beside a file of them.

    Of a name on the Hugging Face Hub, into the current folder: a folder called like it would be
    taken for the weights the next time.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return (path.parent if path.name == CHECKPOINTS else path) / "eval"
    if path.exists():
        return path.with_name(f"{path.stem}_eval")
    return Path(f"{path.as_posix().strip('./').replace('/', '_')}_eval")


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right" if column == "masks" else "left")
    return table


def _percent(miou: Mapping[str, float], measures: Sequence[str]) -> list[str]:
    return [f"{100 * miou[m]:.1f}" if m in miou else "" for m in measures]
