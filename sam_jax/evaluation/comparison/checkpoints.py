"""Two checkpoints side by side: the difference of each measure, and how sure it is."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sam_jax.arrays import UInt8
from sam_jax.errors import ConfigError
from sam_jax.evaluation.comparison.bootstrap import (
    FEW,
    LEVEL,
    Interval,
    default_num_draws,
    paired_draws,
    percentile_interval,
    strata_of,
    two_sided_p_value,
)
from sam_jax.evaluation.comparison.figures import Bar, draw_differences
from sam_jax.evaluation.detection.prompt_boxes import JITTERED, OWN
from sam_jax.evaluation.evaluation import Record, is_skipped
from sam_jax.evaluation.kinds import KINDS
from sam_jax.evaluation.mean_ious import MEAN
from sam_jax.evaluation.results import Results

# Options of sources that say where a data set lies on one machine, and nothing about it.
_PLACES = ("path", "images", "masks", "cache_dir")
# Likewise, of kinds that have no sources; ``truth`` has a digest.
_PLACES_OF_KINDS = ("truth", "images", "path")
# Digests that results of before do not have.
_DIGESTS = ("truth_digest", "truth_digests")
_MAX_SHOWN = 8
# The measures whose differences are drawn by default, the paper's first: one click at the centre.
_DRAWN_FIRST = ("center_1", "random_1", "box")


@dataclasses.dataclass(frozen=True)
class Difference:
    """One measure of both.

    Attributes:
      measure: its name, ``dataset/measure`` or ``mean/measure``.
      a, b: its values.
      interval: of b - a.
      p_value: see ``bootstrap.two_sided_p_value``.
      num_undefined: draws in which one of both had nothing to measure; the interval is of others.
    """

    measure: str
    a: float
    b: float
    interval: Interval
    p_value: float
    num_undefined: int = 0

    @property
    def difference(self) -> float:
        """B - a: positive where b has more."""
        return self.b - self.a

    @property
    def dataset(self) -> str:
        """The data set that it is of, empty where the name does not say."""
        return self.measure.rpartition("/")[0]

    @property
    def short(self) -> str:
        """The measure without the data set."""
        return self.measure.rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All measures of two evaluations of the same examples.

    Attributes:
      a, b: names of the results.
      kind: of the evaluation.
      num_examples: that both have.
      num_fewest: the examples of the data set that has the fewest.
      num_draws: of the bootstrap.
      seed: of the draws.
      differences: by measure, in the order of the evaluation's report.
    """

    a: str
    b: str
    kind: str
    num_examples: int
    num_fewest: int
    num_draws: int
    seed: int
    differences: tuple[Difference, ...]

    def as_json(self) -> dict[str, Any]:
        """All numbers, as values of JSON; what is undefined is null."""
        return {
            "a": self.a,
            "b": self.b,
            "kind": self.kind,
            "num_examples": self.num_examples,
            "num_fewest_examples": self.num_fewest,
            "num_draws": self.num_draws,
            "seed": self.seed,
            "level": LEVEL,
            "measures": {
                d.measure: {
                    "a": _number(d.a),
                    "b": _number(d.b),
                    "difference": _number(d.difference),
                    "low": _number(d.interval.low),
                    "high": _number(d.interval.high),
                    "p_value": d.p_value,
                    "num_undefined_draws": d.num_undefined,
                }
                for d in self.differences
            },
        }

    def print_table(self, console: Console) -> None:
        """Prints a row for each measure, within 100 columns."""
        factor, unit = self._scale()
        console.print(f"A: {self.a}\nB: {self.b}", markup=False, highlight=False)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("data set", overflow="fold")
        table.add_column("measure")
        for heading in ("A", "B", "B - A", f"{LEVEL:.0%} interval", "p"):
            table.add_column(heading, justify="right", no_wrap=True)
        datasets = list(dict.fromkeys(d.dataset for d in self.differences))
        for dataset in datasets:
            of_dataset = [d for d in self.differences if d.dataset == dataset]
            for place, d in enumerate(of_dataset):
                low, high = (factor * end for end in d.interval)
                table.add_row(
                    # As they stand: names may hold what rich reads as markup.
                    Text(dataset if place == 0 else ""),
                    Text(d.short),
                    f"{factor * d.a:.2f}",
                    f"{factor * d.b:.2f}",
                    f"{factor * d.difference:+.2f}",
                    f"{low:+.2f} to {high:+.2f}",
                    f"{d.p_value:.4f}",
                    style=None if low <= 0 <= high or math.isnan(low) else "bold",
                    end_section=d is of_dataset[-1],
                )
        console.print(table)
        console.print(
            f"{unit}{self.num_examples:,} examples, {self.num_draws:,} draws of them (seed "
            f"{self.seed}), the same for A and B; bold: zero lies outside of the interval. Of many "
            "measures, one in twenty does so by chance.",
            highlight=False,
        )
        if self.num_fewest < FEW:
            console.print(
                f"A data set has {self.num_fewest} examples: intervals of fewer than {FEW} are too "
                "short.",
                highlight=False,
            )
        for d in self.differences:
            if d.num_undefined:
                console.print(
                    f"{d.measure} is undefined in {d.num_undefined:,} draws, which are left out",
                    markup=False,
                    highlight=False,
                )

    def drawable_measures(self) -> list[str]:
        """Measures that several data sets have, without those of the means."""
        found: dict[str, int] = {}
        for d in self.differences:
            if d.dataset not in ("", MEAN):
                found[d.short] = found.get(d.short, 0) + 1
        return list(found)

    def figure(self, measure: str | None = None) -> UInt8[np.ndarray, "_ _ 3"] | None:
        """Bars of the difference on each data set, sorted, with their mean; None without any.

        Source: Kirillov et al. 2023, figure 9(a).

        Args:
          measure: which; by default one click at the centre, as there, or else the first.

        Raises:
          ConfigError: there is no such measure.
        """
        known = self.drawable_measures()
        if not known:
            return None
        if measure is None:
            measure = next((name for name in _DRAWN_FIRST if name in known), known[0])
        if measure not in known:
            raise ConfigError(f"no measure {measure!r} to draw; there are {', '.join(known)}")
        factor, unit = self._scale()
        bars = {
            d.dataset: Bar(factor * d.difference, *(factor * end for end in d.interval))
            for d in self.differences
            if d.short == measure
        }
        mean = bars.pop(MEAN, None)
        return draw_differences(
            bars,
            mean if len(bars) > 1 else None,
            title=f"{measure}: B - A{', percentage points' if unit else ''}",
            names=(self.a, self.b),
        )

    def _scale(self) -> tuple[float, str]:
        """A factor for people, and what to say of it: rates in percent, all else as it is."""
        values = [abs(v) for d in self.differences for v in (d.a, d.b) if math.isfinite(v)]
        return (100.0, "In percent. ") if max(values, default=0.0) <= 1 else (1.0, "")


def compare(
    a: Results,
    b: Results,
    *,
    measures: Sequence[str] = (),
    num_draws: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Compares two evaluations of the same examples, from their records alone.

    Examples are drawn with replacement, within each data set, the same for both: so what makes an
    example hard for both takes no part in the interval of their difference.

    Args:
      a: the first.
      b: the second.
      measures: which, without the data set; by default all.
      num_draws: of the bootstrap; by default 10,000 where the measures are means, else 1,000.
      seed: of the draws.
      on_progress: called with the numbers of draws done and in all.

    Raises:
      ConfigError: kind, settings or examples differ, or there is no such measure.
    """
    if a.kind not in KINDS:
        raise ConfigError(f"{a.folder}: unknown kind {a.kind!r}; there are {', '.join(KINDS)}")
    measured = KINDS[a.kind].measures
    if measured is None:
        raise ConfigError(f"evaluations of kind {a.kind!r} cannot be compared")
    check_comparable(a, b)
    of_a, of_b = (measured(results.records, results.settings) for results in (a, b))
    ones = np.ones(len(a.records))
    values_a, values_b = of_a(ones), of_b(ones)
    names = _chosen([name for name in values_a if name in values_b], measures)
    num_draws = num_draws or default_num_draws(of_a)
    strata = strata_of(of_a, a.records)
    draws_a, draws_b = paired_draws(
        [of_a, of_b],
        names,
        len(a.records),
        strata,
        num_draws=num_draws,
        seed=seed,
        on_progress=on_progress,
    )
    differences = []
    for name in names:
        drawn = draws_b[name] - draws_a[name]
        differences.append(
            Difference(
                name,
                values_a[name],
                values_b[name],
                percentile_interval(drawn),
                two_sided_p_value(drawn),
                int(np.count_nonzero(~np.isfinite(drawn))),
            )
        )
    return Comparison(
        a=str(a.folder),
        b=str(b.folder),
        kind=a.kind,
        num_examples=len(a.records),
        num_fewest=min(map(len, strata), default=0),
        num_draws=num_draws,
        seed=seed,
        differences=tuple(differences),
    )


def check_comparable(a: Results, b: Results) -> None:
    """Finds out whether two results are of the same examples under the same settings.

    Where a data set lay does not matter, nor do the weights.

    Raises:
      ConfigError: if not; the message says what differs.
    """
    if a.kind != b.kind:
        raise ConfigError(f"{a.folder} is of kind {a.kind!r}, {b.folder} of kind {b.kind!r}")
    settings_a, settings_b = _without_places(a.settings), _without_places(b.settings)
    for name in _DIGESTS:
        if name not in settings_a or name not in settings_b:
            settings_a.pop(name, None)
            settings_b.pop(name, None)
    differing = _differing(settings_a, settings_b)
    if not differing and len(a.records) != len(b.records):
        differing.append(f"number of examples: {len(a.records)} and {len(b.records)}")
    if not differing:
        for number, (of_a, of_b) in enumerate(zip(a.records, b.records, strict=True)):
            differing += _differing(_identity(of_a), _identity(of_b), f"example {number}")
    if differing:
        more = len(differing) - _MAX_SHOWN
        lines = differing[:_MAX_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise ConfigError(
            f"{a.folder} and {b.folder} cannot be compared, as they differ in\n  "
            + "\n  ".join(lines)
            + "\nevaluate both with the same config on the same data"
        )


def _identity(record: Record) -> dict[str, Any]:
    """All that says which example a record is of, and which masks of it."""
    identity: dict[str, Any] = {
        name: value
        for name, value in record.items()
        if name in ("dataset", "image", "image_id", "file_name")
    }
    for name in ("image", "file_name"):
        if isinstance(identity.get(name), str):
            identity[name] = identity[name].rpartition("/")[2]
    identity["is skipped"] = is_skipped(record)
    masks = record.get("masks")
    if isinstance(masks, list) and all(isinstance(mask, dict) for mask in masks):
        identity["masks"] = [mask.get("mask") for mask in masks]
    return identity


def _without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: of for name, of in settings.items() if name not in _PLACES_OF_KINDS}
    # A file of boxes, which has a digest, or the name of a way to make them.
    if "boxes" in kept and kept["boxes"] not in (OWN, JITTERED):
        kept["boxes"] = "a file"
    return {**kept, "sources": _kept(settings.get("sources"))}


def _kept(sources: Any) -> Any:
    """Sources, and sources that they are joined from, without their places."""
    if isinstance(sources, list):
        return [_kept(source) for source in sources]
    if isinstance(sources, Mapping):
        return {name: _kept(of) for name, of in sources.items() if name not in _PLACES}
    return sources


def _differing(a: Any, b: Any, where: str = "") -> list[str]:
    """The places at which two values of JSON differ, with what stands there."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return [
            found
            for name in dict.fromkeys([*a, *b])
            for found in _differing(
                a.get(name), b.get(name), f"{where}, {name}" if where else str(name)
            )
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [f for i, (x, y) in pairs for f in _differing(x, y, f"{where}[{i}]")]
    return [] if a == b else [f"{where}: {a!r:.60} and {b!r:.60}"]


def _chosen(names: Sequence[str], measures: Sequence[str]) -> list[str]:
    known = dict.fromkeys(name.rpartition("/")[2] for name in names)
    unknown = [measure for measure in measures if measure not in known]
    if unknown:
        raise ConfigError(f"no measure {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in names if not measures or name.rpartition("/")[2] in measures]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
