"""The report of an evaluation that ends in a few figures in percent."""

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from sam_jax.arrays import UInt8
from sam_jax.data.tally import Tally
from sam_jax.evaluation.evaluation import Record

SKIPPED = "skipped"


@dataclasses.dataclass(frozen=True)
class FiguresReport:
    """Figures with what they are over.

    Attributes:
      title: of the table.
      figures: in [0, 1] by name; NaN where there is nothing to take them over.
      counts: numbers of images, objects and so on, by what is counted.
      left_out: what was not used, or was changed.
      settings: the configuration, as plain values.
      seconds: how long it took on this host.
      pictures: RGB pictures by name.
    """

    title: str
    figures: Mapping[str, float]
    counts: Mapping[str, int]
    left_out: Tally
    settings: Mapping[str, Any]
    seconds: float = dataclasses.field(compare=False)
    pictures: Mapping[str, UInt8[np.ndarray, "_ _ 3"]] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    def as_flat_dict(self) -> dict[str, float]:
        """The figures by name; those of nothing are left out."""
        return {name: value for name, value in self.figures.items() if not math.isnan(value)}

    def as_json(self) -> dict[str, Any]:
        """Everything but the pictures, as values of JSON."""
        return {
            "figures": self.as_flat_dict(),
            "counts": dict(self.counts),
            "left_out": dict(self.left_out.counts),
            "examples": dict(self.left_out.examples),
            "settings": dict(self.settings),
            "seconds": round(self.seconds, 1),
        }

    def print_table(self, console: Console | None = None) -> None:
        """Prints the figures in percent, within 100 columns."""
        console = console or Console(width=None if sys.stdout.isatty() else 100)
        # A title of the table's own would be broken to its width.
        console.print(self.title, style="bold", markup=False, highlight=False)
        table = Table(box=box.SIMPLE_HEAD)
        for name in self.figures:
            table.add_column(name.rpartition("_")[2], justify="right")
        table.add_row(
            *("-" if math.isnan(value) else f"{100 * value:.1f}" for value in self.figures.values())
        )
        console.print(table)
        counts = ", ".join(f"{number:,} {what}" for what, number in self.counts.items())
        console.print(f"{counts} in {self.seconds:,.0f} s")
        for line in self.left_out.lines():
            # As it stands: file names may hold what rich reads as markup.
            console.print(f"left out or changed: {line}", markup=False, highlight=False)


def skipped_tally(records: Iterable[Record], left_out: Tally) -> Tally:
    """All that was left out: of the data, and images that were skipped or have bad annotations."""
    tally = Tally()
    tally.update(left_out)
    for record in records:
        if SKIPPED in record:
            reason, said = record[SKIPPED]
            tally.add(f"images skipped ({reason})", said)
        for said in record.get("unusable", ()):
            tally.add("unusable annotations", f"{record['image']}: {said}")
    return tally
