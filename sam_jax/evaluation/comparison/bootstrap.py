"""The bootstrap: how much a measure would vary if other examples of the same kind had been taken.

Source: Efron and Tibshirani 1993, chapters 13 (percentile intervals) and 15 (p-values).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from sam_jax.arrays import Float, Int
from sam_jax.evaluation.evaluation import Measures, Record, is_skipped

LEVEL = 0.95
# Draws of measures that take one matrix product, and of those that are worked out anew each time.
NUM_DRAWS, NUM_SLOW_DRAWS = 10_000, 1_000
# Of fewer examples a percentile interval of a mean is clearly too short. Beside Student's, it is
# a tenth too short for 20 examples, a fifth for 10, and half for 4.
FEW = 20
# Numbers drawn at once: 32 MB.
_AT_ONCE = 1 << 22
# Slow draws between two reports of progress.
_SLOW_AT_ONCE = 10


class Interval(NamedTuple):
    """An interval of a measure; ``low`` to ``high``, both within it."""

    low: float
    high: float


@runtime_checkable
class DrawnMeasures(Protocol):
    """Measures that are worked out for many draws at once."""

    @property
    def strata(self) -> list[Int[np.ndarray, "_"]]:
        """Records that may stand for each other; all others count once in every draw."""
        ...

    def of_draws(self, multiplicities: Float[np.ndarray, "d n"]) -> dict[str, np.ndarray]:
        """Measures of each draw, by name."""
        ...


def of_many_draws(measures: object) -> DrawnMeasures | None:
    """The measures, if they are worked out for many draws at once."""
    return measures if isinstance(measures, DrawnMeasures) else None


def draw_multiplicities(
    num_records: int,
    strata: Sequence[Int[np.ndarray, "_"]],
    num_draws: int,
    seed: int,
    most_at_once: int = NUM_DRAWS,
) -> Iterator[Float[np.ndarray, "_ n"]]:
    """Multiplicities of records: how often each counts in each draw, some draws at a time.

    Each stratum is drawn from with replacement, as many as it has; a record of none counts once.
    """
    generator = np.random.default_rng(seed)
    step = min(most_at_once, max(1, _AT_ONCE // max(num_records, 1)))
    for start in range(0, num_draws, step):
        count = min(step, num_draws - start)
        drawn = np.ones((count, num_records))
        for stratum in strata:
            size = len(stratum)
            picks = generator.integers(size, size=(count, size))
            # A row of bins for each draw.
            picks += size * np.arange(count)[:, None]
            numbers = np.bincount(picks.reshape(-1), minlength=count * size)
            drawn[:, stratum] = numbers.reshape(count, size)
        yield drawn


def strata_of(measures: Measures, records: Sequence[Record]) -> list[Int[np.ndarray, "_"]]:
    """Records that may stand for each other: the measures' own, or those of each dataset.

    Datasets are fixed, their images a sample. A record of what was skipped stands for nothing.
    """
    drawn = of_many_draws(measures)
    if drawn is not None:
        return drawn.strata
    by_dataset: dict[object, list[int]] = {}
    for number, record in enumerate(records):
        if not is_skipped(record):
            by_dataset.setdefault(record.get("dataset"), []).append(number)
    return [np.array(numbers) for numbers in by_dataset.values()]


def default_num_draws(measures: Measures) -> int:
    """A number of draws that takes seconds to minutes."""
    return NUM_SLOW_DRAWS if of_many_draws(measures) is None else NUM_DRAWS


def paired_draws(
    measures: Sequence[Measures],
    names: Sequence[str],
    num_records: int,
    strata: Sequence[Int[np.ndarray, "_"]],
    *,
    num_draws: int,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, np.ndarray]]:
    """Draws of several models' measures on the same examples.

    Args:
      measures: of the records of each model.
      names: which of them.
      num_records: that each has.
      strata: see ``strata_of``.
      num_draws: how many.
      seed: of the draws.
      on_progress: called with the numbers of draws done and in all.

    Returns:
      for each model, float64 arrays [num_draws] by name; NaN where a draw has nothing to measure.
    """
    found: list[dict[str, list[np.ndarray]]] = [{name: [] for name in names} for _ in measures]
    done = 0
    is_slow = any(of_many_draws(of_model) is None for of_model in measures)
    at_once = _SLOW_AT_ONCE if is_slow else NUM_DRAWS
    for multiplicities in draw_multiplicities(num_records, strata, num_draws, seed, at_once):
        for of_model, into in zip(measures, found, strict=True):
            drawn = _measured(of_model, multiplicities)
            for name in names:
                into[name].append(drawn.get(name, np.full(len(multiplicities), np.nan)))
        done += len(multiplicities)
        on_progress(done, num_draws)
    return [{name: np.concatenate(parts) for name, parts in of.items()} for of in found]


def percentile_interval(draws: Float[np.ndarray, "d"], level: float = LEVEL) -> Interval:
    """The middle part of the draws, NaN where none is a number; draws that are none are left out.

    Args:
      draws: of a measure.
      level: the rate of draws within the interval.
    """
    finite = draws[np.isfinite(draws)]
    if not finite.size:
        return Interval(np.nan, np.nan)
    tail = (1 - level) / 2
    low, high = np.quantile(finite, [tail, 1 - tail]).tolist()
    return Interval(low, high)


def two_sided_p_value(differences: Float[np.ndarray, "d"]) -> float:
    """The p-value of a difference, in (0, 1], against none.

    Twice the rate of draws on the other side of zero, zero itself included, with the measured one
    counted among the draws: so it is never 0, and below ``1 - level`` about where the percentile
    interval leaves zero out. 1 where no draw is a number.
    """
    finite = differences[np.isfinite(differences)]
    fewer = min(int(np.count_nonzero(finite <= 0)), int(np.count_nonzero(finite >= 0)))
    return min(1.0, 2 * (1 + fewer) / (1 + finite.size))


def _measured(
    measures: Measures, multiplicities: Float[np.ndarray, "d n"]
) -> dict[str, np.ndarray]:
    drawn = of_many_draws(measures)
    if drawn is not None:
        return drawn.of_draws(multiplicities)
    each = [measures(row) for row in multiplicities]
    names = dict.fromkeys(name for of_one in each for name in of_one)
    return {name: np.array([of_one.get(name, np.nan) for of_one in each]) for name in names}
