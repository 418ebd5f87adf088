"""The report of an edge evaluation: scores under each suppression, curves, and edge maps."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sam_jax.arrays import Float, UInt8
from sam_jax.data.corruption import NoObjectsError
from sam_jax.evaluation.edges.scores import (
    EdgeCounts,
    curve_of,
    edge_scores,
    optimal_f_of_images,
    pooled,
)
from sam_jax.evaluation.edges.thresholds import even_thresholds
from sam_jax.evaluation.evaluation import Measures, Record

# Scores that tables show, by their column.
_COLUMNS = {"ODS": "ods", "OIS": "ois", "AP": "ap", "R50": "r50"}
_NUM_NAMED = 3


@dataclasses.dataclass(frozen=True)
class EdgeReport:
    """The scores of edge maps.

    Attributes:
      scores: by the maps' source ("model", "sobel"), then by suppression; see ``edge_scores``.
      curves: recall and precision at each threshold, likewise.
      num_images: images that every score is over.
      unusable: what is wrong with images that are left out, by their name.
      settings: options, as plain values.
      seconds: how long it took on this host.
      pictures: RGB pictures by name.
    """

    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    curves: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
    num_images: int
    unusable: Mapping[str, str]
    settings: Mapping[str, Any]
    seconds: float = dataclasses.field(compare=False)
    pictures: Mapping[str, UInt8[np.ndarray, "_ _ 3"]] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    def as_flat_dict(self) -> dict[str, float]:
        """Every score under ``source/suppression/score``."""
        return _flat(self.scores)

    def as_json(self) -> dict[str, Any]:
        """Everything but the pictures, as values of JSON."""
        content = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "pictures"
        }
        return {**content, "seconds": round(self.seconds, 1)}

    def print_table(self, console: Console | None = None) -> None:
        """Prints the scores, a row for each suppression, within 100 columns."""
        console = console or Console(width=None if sys.stdout.isatty() else 100)
        drawn = Table(title="Edges", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        drawn.add_column("suppression")
        for source in self.scores:
            for place, column in enumerate(_COLUMNS):
                # As it stands: the name of a folder may hold what rich reads as markup.
                heading = Text(f"{'' if place else source}\n{column}")
                drawn.add_column(heading, justify="right")
        for suppression in next(iter(self.scores.values())):
            found = [self.scores[source][suppression] for source in self.scores]
            drawn.add_row(
                suppression, *(f"{s[key]:.3f}" for s in found for key in _COLUMNS.values())
            )
        console.print(drawn)
        console.print(f"{self.num_images:,} images in {self.seconds:,.0f} s")
        if self.unusable:
            console.print(
                f"{len(self.unusable):,} images are left out, the scores are of the others:"
            )
            for reason in list(self.unusable.values())[:_NUM_NAMED]:
                # As it stands: file names may hold what rich reads as markup.
                console.print(f"  {reason}", markup=False, highlight=False)


def summarize(records: Sequence[Record], settings: Mapping[str, Any], seconds: float) -> EdgeReport:
    """The report of edge maps' records.

    Args:
      records: see ``counts.image_record``.
      settings: with ``num_thresholds``, and what else the report shall keep.
      seconds: see ``EdgeReport``.

    Raises:
      NoObjectsError: no image could be used.
    """
    usable = _usable(records)
    unusable = {r["image"]: r["unusable"] for r in records if "unusable" in r}
    if not usable:
        reasons = list(unusable.values())[:_NUM_NAMED]
        raise NoObjectsError(f"none of {len(records)} images can be used: {'; '.join(reasons)}")
    counts = _counts(usable)
    weights = np.ones(len(usable))
    curves = {
        source: {
            suppression: {
                name: [round(value, 6) for value in values.tolist()]
                for name, values in curve_of(pooled(found, weights))._asdict().items()
            }
            for suppression, found in by_suppression.items()
        }
        for source, by_suppression in counts.items()
    }
    scores = _scores(counts, weights, settings)
    return EdgeReport(scores, curves, len(usable), unusable, settings, seconds)


def measures(records: Sequence[Record], settings: Mapping[str, Any]) -> Measures:
    """Scores by ``source/suppression/score`` of images that count as often as weights say."""
    counts = _counts(_usable(records))
    is_usable = np.array(["unusable" not in record for record in records], bool)

    def measured(weights: np.ndarray) -> dict[str, float]:
        return _flat(_scores(counts, weights[is_usable], settings))

    return measured


def f_by_image(records: Sequence[Record], source: str, suppression: str) -> dict[str, float]:
    """The best F of each usable image, by its name."""
    usable = _usable(records)
    f = optimal_f_of_images(_counts(usable)[source][suppression])
    return {record["image"]: value for record, value in zip(usable, f.tolist(), strict=True)}


def _usable(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if "unusable" not in record]


def _counts(usable: Sequence[Record]) -> dict[str, dict[str, EdgeCounts]]:
    """Counts of images, by source and suppression."""
    annotated = np.array([[record["annotated"]] for record in usable], float)

    def stacked(source: str, suppression: str) -> EdgeCounts:
        found = [record["maps"][source][suppression] for record in usable]
        return EdgeCounts(
            annotated,
            *(
                np.array([counts[name] for counts in found], float)
                for name in EdgeCounts._fields[1:]
            ),
        )

    return {
        source: {suppression: stacked(source, suppression) for suppression in by_suppression}
        for source, by_suppression in (usable[0]["maps"] if usable else {}).items()
    }


def _scores(
    counts: Mapping[str, Mapping[str, EdgeCounts]],
    weights: Float[np.ndarray, "n"],
    settings: Mapping[str, Any],
) -> dict[str, dict[str, dict[str, float]]]:
    thresholds = even_thresholds(settings["num_thresholds"])
    return {
        source: {
            suppression: edge_scores(thresholds, found, weights)
            for suppression, found in by_suppression.items()
        }
        for source, by_suppression in counts.items()
    }


def _flat(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    return {
        f"{source}/{suppression}/{score}": value
        for source, by_suppression in scores.items()
        for suppression, found in by_suppression.items()
        for score, value in found.items()
    }
