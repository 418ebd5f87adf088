"""Mean IoU by groups of people, or of whatever a table of attributes tells apart."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sam_jax.arrays import Float, UInt8
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError
from sam_jax.evaluation.comparison.attributes import AttributedMask, AttributedMasks, AttributeTable
from sam_jax.evaluation.comparison.bootstrap import (
    FEW,
    LEVEL,
    NUM_DRAWS,
    Interval,
    draw_multiplicities,
    percentile_interval,
)
from sam_jax.evaluation.comparison.figures import Bar, draw_groups

# What the paper shows, one and three clicks of which the first is random, and the box.
_DEFAULT_MEASURES = ("random_1", "random_3", "box")
# In their place if nobody clicked at random.
_CENTER_MEASURES = ("center_1", "center_3", "box")
# A column with more values than this tells masks apart and not groups.
_MAX_GROUPS = 50

Unit = Literal["images", "masks"]
_NOWHERE = Interval(math.nan, math.nan)


@dataclasses.dataclass(frozen=True)
class Group:
    """The masks with one value of an attribute.

    Attributes:
      value: the value.
      num_masks: of them.
      num_images: which they are of.
      means: mean IoU by measure; none without masks.
      intervals: 95 % intervals by measure, NaN where one image, or one mask, gives none.
    """

    value: str
    num_masks: int
    num_images: int
    means: Mapping[str, float]
    intervals: Mapping[str, Interval]


@dataclasses.dataclass(frozen=True)
class Disparity:
    """Two groups whose intervals do not overlap."""

    attribute: str
    measure: str
    lower: str
    higher: str


@dataclasses.dataclass(frozen=True)
class FairnessReport:
    """Mean IoU by group.

    Source: Kirillov et al. 2023, section 6 and appendix C.

    Attributes:
      groups: by attribute, in the order of their first rows.
      measures: names.
      unit: what was drawn.
      num_draws: of the bootstrap.
      seed: of the draws.
      num_masks: masks with a row.
      num_without_row: masks without.
      num_without_value: masks whose row says nothing of an attribute, by attribute.
      unmatched: rows without a mask, by reason.
    """

    groups: Mapping[str, tuple[Group, ...]]
    measures: tuple[str, ...]
    unit: Unit
    num_draws: int
    seed: int
    num_masks: int
    num_without_row: int
    num_without_value: Mapping[str, int]
    unmatched: Tally

    def disparities(self) -> list[Disparity]:
        """All pairs of groups of an attribute whose intervals of a measure do not overlap."""
        found = []
        for attribute, groups in self.groups.items():
            for measure, (a, b) in itertools.product(
                self.measures, itertools.combinations(groups, 2)
            ):
                if measure not in a.intervals or measure not in b.intervals:
                    continue
                of_a, of_b = a.intervals[measure], b.intervals[measure]
                # Comparisons with NaN are false.
                if of_a.high < of_b.low:
                    found.append(Disparity(attribute, measure, a.value, b.value))
                elif of_b.high < of_a.low:
                    found.append(Disparity(attribute, measure, b.value, a.value))
        return found

    def as_json(self) -> dict[str, Any]:
        """All numbers, as values of JSON; intervals that are undefined are null."""
        return {
            "measures": list(self.measures),
            "level": LEVEL,
            "resampled": self.unit,
            "num_draws": self.num_draws,
            "seed": self.seed,
            "num_masks": self.num_masks,
            "num_masks_without_row": self.num_without_row,
            "num_masks_without_value": dict(self.num_without_value),
            "rows_without_mask": dict(self.unmatched.counts),
            "examples": dict(self.unmatched.examples),
            "groups": {
                attribute: {group.value: _as_json(group) for group in groups}
                for attribute, groups in self.groups.items()
            },
            "disjoint_intervals": [dataclasses.asdict(d) for d in self.disparities()],
        }

    def print_table(self, console: Console) -> None:
        """Prints mean IoU in percent with its interval, a table for each attribute."""
        for attribute, groups in self.groups.items():
            table = Table(
                # As it stands, and values likewise: they may hold what rich reads as markup.
                title=Text(attribute, style="bold"),
                title_justify="left",
                box=box.SIMPLE_HEAD,
                pad_edge=False,
            )
            table.add_column("group", overflow="fold")
            for heading in ("masks", "images", *self.measures):
                table.add_column(heading, justify="right", no_wrap=True)
            for group in groups:
                table.add_row(
                    Text(group.value),
                    f"{group.num_masks:,}",
                    f"{group.num_images:,}",
                    *(_shown(group, measure) for measure in self.measures),
                )
            console.print(table)
        for d in self.disparities():
            console.print(
                f"intervals do not overlap: {d.attribute}, {d.measure}: {d.lower} below {d.higher}",
                markup=False,
                highlight=False,
            )
        for line in self.remarks():
            console.print(line, markup=False, highlight=False)

    def remarks(self) -> Iterable[str]:
        """Sentences about how intervals came about, and about what is in no group."""
        yield (
            f"Mean IoU in percent of {self.num_masks:,} masks; {LEVEL:.0%} percentile intervals "
            f"of {self.num_draws:,} draws of {self.unit} (seed {self.seed})."
        )
        alone = self.unit.removesuffix("s")
        for attribute, groups in self.groups.items():
            for group in groups:
                if group.num_masks == 0:
                    yield f"{attribute} {group.value}: no evaluated mask"
                elif any(math.isnan(interval.low) for interval in group.intervals.values()):
                    yield f"{attribute} {group.value}: of one {alone} there is no interval"
        few = [
            f"{attribute} {group.value} ({number:,})"
            for attribute, groups in self.groups.items()
            for group in groups
            if 1 < (number := self._number(group)) < FEW
        ]
        if few:
            yield f"intervals of fewer than {FEW} {self.unit} are too short: {', '.join(few)}"
        if self.num_without_row:
            yield f"{self.num_without_row:,} evaluated masks have no row"
        for attribute, number in self.num_without_value.items():
            if number:
                yield f"{number:,} masks have no value of {attribute}"
        yield from self.unmatched.lines()

    def _number(self, group: Group) -> int:
        return group.num_images if self.unit == "images" else group.num_masks

    def figure(self) -> UInt8[np.ndarray, "_ _ 3"]:
        """A mark with its interval for each group."""
        panels = {}
        for attribute, groups in self.groups.items():
            panels[attribute] = {
                measure: {f"{g.value} ({g.num_masks:,})": _bar(g, measure) for g in groups}
                for measure in self.measures
            }
        return draw_groups(panels, x_label=f"mean IoU, %, with {LEVEL:.0%} interval")


def mean_iou_by_group(
    table: AttributeTable,
    joined: AttributedMasks,
    *,
    measures: Sequence[str] = (),
    unit: Unit = "images",
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> FairnessReport:
    """Mean IoU of the masks with each value of each attribute, over all data sets together.

    Args:
      table: the attributes.
      joined: the masks that have them, see ``attributes.join_attributes``.
      measures: of the evaluation; by default after one and three clicks, of which the first is
        random if there are such, and from the box.
      unit: what is drawn for the intervals. Masks of an image are alike, so that drawing masks
        gives intervals that are too short; the paper does not say what it draws.
      num_draws: of the bootstrap.
      seed: of the draws. Those of a group depend on nothing but the group.
      on_progress: called with the numbers of groups done and in all.

    Raises:
      ConfigError: no row is about an evaluated mask, there is no such measure, or an attribute has
        too many values to be one of groups.
    """
    if not joined.masks:
        raise ConfigError(
            f"{table.path}: none of its {len(table.rows):,} rows is about an evaluated mask: "
            f"{joined.unmatched}"
        )
    chosen = _chosen_measures(joined.masks, measures)
    values = {name: _values(table, name) for name in table.attributes}
    total, done = sum(map(len, values.values())), 0
    groups: dict[str, tuple[Group, ...]] = {}
    for attribute, of_attribute in values.items():
        found = []
        for value in of_attribute:
            masks = [mask for mask in joined.masks if mask.values[attribute] == value]
            key = _key(f"{seed}/{attribute}/{value}")
            found.append(_group(value, masks, chosen, unit, num_draws, key))
            done += 1
            on_progress(done, total)
        groups[attribute] = tuple(found)
    return FairnessReport(
        groups=groups,
        measures=chosen,
        unit=unit,
        num_draws=num_draws,
        seed=seed,
        num_masks=len(joined.masks),
        num_without_row=joined.num_without_row,
        num_without_value={
            name: sum(not mask.values[name] for mask in joined.masks) for name in table.attributes
        },
        unmatched=joined.unmatched,
    )


def _group(
    value: str,
    masks: Sequence[AttributedMask],
    measures: Sequence[str],
    unit: Unit,
    num_draws: int,
    seed: int,
) -> Group:
    if not masks:
        return Group(value, 0, 0, {}, {})
    # In an order of their own, so that draws do not depend on that of the records.
    masks = sorted(masks, key=lambda mask: (*mask.image, *(mask.ious[name] for name in measures)))
    ious = np.array([[mask.ious[name] for name in measures] for mask in masks])
    order: dict[tuple[str, str], int] = {}
    images = [order.setdefault(mask.image, len(order)) for mask in masks]
    units = np.array(images) if unit == "images" else np.arange(len(masks))
    intervals = _intervals(ious, units, num_draws, seed)
    return Group(
        value,
        len(masks),
        len(order),
        dict(zip(measures, ious.mean(axis=0).tolist(), strict=True)),
        dict(zip(measures, intervals, strict=True)),
    )


def _intervals(
    ious: Float[np.ndarray, "k m"], units: np.ndarray, num_draws: int, seed: int
) -> list[Interval]:
    """Intervals of the mean of each column, the rows drawn by their units."""
    num_units = int(units.max()) + 1
    if num_units < 2:
        return [_NOWHERE] * ious.shape[1]
    sums = np.zeros((num_units, ious.shape[1]))
    np.add.at(sums, units, ious)
    numbers = np.bincount(units).astype(float)
    means = [
        (drawn @ sums) / (drawn @ numbers)[:, None]
        for drawn in draw_multiplicities(num_units, [np.arange(num_units)], num_draws, seed)
    ]
    return [percentile_interval(column) for column in np.concatenate(means).T]


def _chosen_measures(masks: Sequence[AttributedMask], measures: Sequence[str]) -> tuple[str, ...]:
    known = [name for name in masks[0].ious if all(name in mask.ious for mask in masks)]
    unknown = [name for name in measures if name not in known]
    if unknown:
        raise ConfigError(f"no measure {', '.join(unknown)}; there are {', '.join(known)}")
    if measures:
        return tuple(measures)
    defaults = _DEFAULT_MEASURES if _DEFAULT_MEASURES[0] in known else _CENTER_MEASURES
    chosen = tuple(name for name in defaults if name in known)
    if not chosen:
        raise ConfigError(f"which measure shall be compared? There are {', '.join(known)}")
    return chosen


def _values(table: AttributeTable, attribute: str) -> list[str]:
    values = [v for v in dict.fromkeys(row.values[attribute] for row in table.rows) if v]
    if len(values) > _MAX_GROUPS:
        raise ConfigError(
            f"{table.path}: column {attribute} has {len(values):,} values, such as {values[0]!r} "
            f"and {values[1]!r}; groups are at most {_MAX_GROUPS}: name the columns to take"
        )
    return values


def _key(text: str) -> int:
    """A seed that follows from a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _shown(group: Group, measure: str) -> str:
    if measure not in group.means:
        return ""
    low, high = group.intervals[measure]
    interval = "" if math.isnan(low) else f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{100 * group.means[measure]:.1f}{interval}"


def _bar(group: Group, measure: str) -> Bar:
    low, high = group.intervals.get(measure, _NOWHERE)
    return Bar(100 * group.means.get(measure, math.nan), 100 * low, 100 * high)


def _as_json(group: Group) -> dict[str, Any]:
    def end(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        "num_masks": group.num_masks,
        "num_images": group.num_images,
        "measures": {
            name: {
                "mean": mean,
                "low": end(group.intervals[name].low),
                "high": end(group.intervals[name].high),
            }
            for name, mean in group.means.items()
        },
    }
