"""The report of an evaluation: numbers for programs, a table and pictures for people."""

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sam_jax.arrays import UInt8
from sam_jax.checkpoint import CHECKPOINTS
from sam_jax.data.corruption import NoObjectsError
from sam_jax.data.tally import Tally
from sam_jax.evaluation.baselines import DISK_RADIUS_RATES, best_disk, disk_measure
from sam_jax.evaluation.clicks import FirstClick
from sam_jax.evaluation.evaluation import Record
from sam_jax.evaluation.mean_ious import MEAN
from sam_jax.evaluation.metrics import IouTotals, mean_over_datasets
from sam_jax.evaluation.protocols import PROTOCOLS
from sam_jax.evaluation.protocols.protocol import ReportTable
from sam_jax.visualize import MUTED, Curve, draw_curves

# Baselines that diagrams show, as levels: measure, name in the legend, color.
_BASELINE_LEVELS = (
    ("box_grabcut", "GrabCut from the box", (140, 200, 165)),
    ("disk_center", "disk around the centre click", MUTED),
)


@dataclasses.dataclass(frozen=True)
class DatasetReport:
    """The scores on one dataset.

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

    def as_json(self) -> dict[str, Any]:
        """Everything but the pictures, as values of JSON."""
        return {
            "mean": self.mean,
            "datasets": {
                d.name: {k: v for k, v in dataclasses.asdict(d).items() if k != "name"}
                for d in self.datasets
            },
            "disk_radius_rates": self.disk_radius_rates,
            "settings": self.settings,
            "seconds": round(self.seconds, 1),
        }

    def print_table(self, console: Console | None = None) -> None:
        """Prints mean IoU in percent, a table for each kind of prompt, within 100 columns."""
        console = console or Console(width=None if sys.stdout.isatty() else 100)
        for table in dict.fromkeys(protocol.table for protocol in PROTOCOLS.values()):
            rows = self._protocols_in(table)
            if rows:
                console.print(self._drawn(table, rows))
        masks = sum(dataset.num_masks for dataset in self.datasets)
        images = sum(dataset.num_images for dataset in self.datasets)
        console.print(f"{masks:,} masks on {images:,} images in {self.seconds:,.0f} s")
        for dataset in self.datasets:
            if dataset.skipped:
                reasons = ", ".join(f"{n:,} {reason}" for reason, n in dataset.skipped.items())
                # As it stands: names may hold what rich reads as markup.
                said = f"skipped or remarked in {dataset.name}: {reasons}"
                console.print(said, markup=False, highlight=False)
            for reason, example in dataset.examples.items():
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
        curves = [
            curve
            for protocol in PROTOCOLS.values()
            for curve in protocol.curves(miou, self.num_clicks)
        ]
        for measure, label, color in _BASELINE_LEVELS:
            if measure in miou:
                curves.append(Curve(label, [], [100 * miou[measure]], color, "level"))
        return curves

    def _rows(self) -> dict[str, Mapping[str, float]]:
        """Mean IoU by measure of each dataset with masks and, of several, their mean."""
        rows: dict[str, Mapping[str, float]] = {d.name: d.miou for d in self.datasets if d.miou}
        return rows | ({MEAN: self.mean} if len(rows) > 1 else {})

    def _protocols_in(self, table: ReportTable) -> list[tuple[str, dict[str, str]]]:
        """The protocols that were run and are shown in a table: row, and measures by column."""
        measured = {measure for dataset in self.datasets for measure in dataset.miou}
        shown = [protocol for protocol in PROTOCOLS.values() if protocol.table == table]
        rows = [(p.row, p.columns(measured, self.num_clicks)) for p in shown]
        return [(row, columns) for row, columns in rows if columns]

    def _drawn(self, table: ReportTable, rows: Sequence[tuple[str, Mapping[str, str]]]) -> Table:
        """The table for people: for each dataset a row of each protocol."""
        columns = list(dict.fromkeys(column for _, found in rows for column in found))
        drawn = Table(
            title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
        )
        drawn.add_column("dataset")
        drawn.add_column("masks", justify="right")
        if table.row_heading is not None:
            drawn.add_column(table.row_heading)
        for column in columns:
            drawn.add_column(column, justify="right")
        for dataset, miou in self._rows().items():
            for place, (row, found) in enumerate(rows):
                ious = (miou.get(found.get(column, "")) for column in columns)
                drawn.add_row(
                    *((Text(dataset), self._num_masks(dataset)) if place == 0 else ("", "")),
                    *([] if table.row_heading is None else [row]),
                    *("" if iou is None else f"{100 * iou:.1f}" for iou in ious),
                    style="bold" if dataset == MEAN else None,
                    end_section=place == len(rows) - 1 and len(rows) > 1,
                )
        return drawn

    def _num_masks(self, row: str) -> str:
        return next((f"{d.num_masks:,}" for d in self.datasets if d.name == row), "")


def summarize(
    records: Sequence[Record],
    left_out: Mapping[str, Tally],
    num_clicks: tuple[int, ...],
    *,
    settings: dict[str, Any],
    seconds: float,
) -> EvalReport:
    """The report of images that were prompted for masks.

    Args:
      records: see ``PromptedMasks``.
      left_out: what each dataset leaves out by itself, by its name, in the order of the report.
      num_clicks: see ``EvalReport``.
      settings: see there.
      seconds: see there.

    Raises:
      NoObjectsError: a dataset has no mask to evaluate on.
    """
    totals = IouTotals()
    num_images, num_masks = Counter[str](), Counter[str]()
    skipped = {name: Tally() for name in left_out}
    for record in records:
        dataset, masks = record["dataset"], record.get("masks", ())
        num_images[dataset] += bool(masks)
        num_masks[dataset] += len(masks)
        for mask in masks:
            totals.add(dataset, mask["ious"])
        for what, cases in record.get("remarked", {}).items():
            for reason, case in cases:
                skipped[dataset].add(f"{what} ({reason})", case)
    for name, tally in left_out.items():
        skipped[name].update(tally)
        if not num_masks[name]:
            number = sum(record["dataset"] == name for record in records)
            raise NoObjectsError(
                f"{name}: none of {number} samples has a mask to evaluate on; "
                f"skipped: {skipped[name]}"
            )
    means = totals.means()
    disk_radius_rates = _choose_disks(means)
    datasets = tuple(
        DatasetReport(
            name,
            num_images[name],
            num_masks[name],
            dict(tally.counts),
            means[name],
            tally.examples,
        )
        for name, tally in skipped.items()
    )
    mean = mean_over_datasets({name: means[name] for name in left_out})
    return EvalReport(datasets, mean, num_clicks, disk_radius_rates, settings, seconds)


def _choose_disks(means: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """Replaces the means of disks of all radii by those of the best; says which that is."""
    rates = {}
    for rule in get_args(FirstClick):
        measures = {rate: disk_measure(rule, rate) for rate in DISK_RADIUS_RATES}
        by_rate = [
            {rate: miou.pop(measure) for rate, measure in measures.items()}
            for miou in means.values()
            if all(measure in miou for measure in measures.values())
        ]
        if by_rate:
            rate = best_disk(by_rate)
            rates[disk_measure(rule)] = rate
            for miou, ious in zip(means.values(), by_rate, strict=True):
                miou[disk_measure(rule)] = ious[rate]
    return rates


def results_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """The default place of results: in a run or a folder of weights, or beside a file of them.

    Of a name on the Hugging Face Hub, into the current folder: a folder called like it would be
    taken for the weights the next time.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return (path.parent if path.name == CHECKPOINTS else path) / "eval"
    if path.exists():
        return path.with_name(f"{path.stem}_eval")
    return Path(f"{path.as_posix().strip('./').replace('/', '_')}_eval")
