"""Mean IoUs of records that count as often as one likes, many ways of counting at once."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sam_jax.arrays import Float, Int
from sam_jax.evaluation.baselines import DISK_BASELINE
from sam_jax.evaluation.evaluation import Record

MEAN = "mean"
# Separates a disk's measure from its radius.
_RADIUS = "@"


class _Dataset(NamedTuple):
    """Sums of a dataset's IoUs.

    Attributes:
      examples: which records have masks of it.
      measures: names.
      sums: of IoUs, by record and measure.
      numbers: of masks, likewise.
    """

    examples: Int[np.ndarray, "n"]
    measures: list[str]
    sums: Float[np.ndarray, "n m"]
    numbers: Float[np.ndarray, "n m"]


class MeanIous:
    """The measures of records of prompted masks: ``Measures``, and those of many draws at once.

    A mean is over the masks of a dataset; the mean of means, ``mean/...``, is unweighted and has
    what all datasets have, as in ``metrics.mean_over_datasets``. Of disks, the radius is chosen
    that has the highest mean, see ``baselines.best_disk``. Measures are named
    ``dataset/measure``.

    Args:
      records: with dataset and masks, each mask with its IoUs by measure; those without masks
        count for nothing.
      settings: of the evaluation; nothing depends on them.
    """

    def __init__(self, records: Sequence[Record], settings: Mapping[str, Any] | None = None):
        del settings
        by_dataset: dict[str, list[int]] = {}
        for number, record in enumerate(records):
            if record.get("masks"):
                by_dataset.setdefault(record["dataset"], []).append(number)
        self._datasets = {name: _sums(records, examples) for name, examples in by_dataset.items()}

    @property
    def strata(self) -> list[Int[np.ndarray, "_"]]:
        """The records of each dataset, within which they may be exchanged."""
        return [dataset.examples for dataset in self._datasets.values()]

    def __call__(self, multiplicities: Float[np.ndarray, "n"]) -> dict[str, float]:
        """Measures of records that count so often each."""
        drawn = self.of_draws(multiplicities[None])
        return {name: float(values[0]) for name, values in drawn.items()}

    def of_draws(self, multiplicities: Float[np.ndarray, "d n"]) -> dict[str, np.ndarray]:
        """Measures of each draw, NaN where it has no mask.

        Args:
          multiplicities: how often each record counts.

        Returns:
          float64 arrays [d] by name.
        """
        means = {}
        with np.errstate(invalid="ignore"):
            for name, dataset in self._datasets.items():
                drawn = multiplicities[:, dataset.examples]
                values = (drawn @ dataset.sums) / (drawn @ dataset.numbers)
                means[name] = dict(zip(dataset.measures, values.T, strict=True))
        _choose_disks(means)
        flat = {
            f"{MEAN}/{measure}": np.mean([of_one[measure] for of_one in means.values()], axis=0)
            for measure in next(iter(means.values()), {})
            if all(measure in of_one for of_one in means.values())
        }
        for name, of_one in means.items():
            flat |= {f"{name}/{measure}": values for measure, values in of_one.items()}
        return flat


def _sums(records: Sequence[Record], examples: Sequence[int]) -> _Dataset:
    columns: dict[str, int] = {}
    # Places and values of all IoUs, for one sum.
    rows, places, ious = [], [], []
    for row, number in enumerate(examples):
        for mask in records[number]["masks"]:
            for measure, iou in mask["ious"].items():
                rows.append(row)
                places.append(columns.setdefault(measure, len(columns)))
                ious.append(iou)
    shape = (len(examples), len(columns))
    flat = np.ravel_multi_index((np.array(rows, int), np.array(places, int)), shape)
    size = shape[0] * shape[1]
    sums = np.bincount(flat, weights=ious, minlength=size).reshape(shape)
    numbers = np.bincount(flat, minlength=size).reshape(shape).astype(float)
    return _Dataset(np.array(examples), list(columns), sums, numbers)


def _choose_disks(means: dict[str, dict[str, np.ndarray]]) -> None:
    """Replaces disks of all radii by those of the best radius of each draw."""
    first = next(iter(means.values()), {})
    radii: dict[str, list[str]] = {}
    for measure in first:
        kind, separator, _ = measure.partition(_RADIUS)
        if separator and kind.startswith(DISK_BASELINE):
            radii.setdefault(kind, []).append(measure)
    for kind, of_radii in radii.items():
        values = {name: np.stack([m.pop(r) for r in of_radii]) for name, m in means.items()}
        best = np.sum(list(values.values()), axis=0).argmax(axis=0)
        for name, of_dataset in values.items():
            means[name][kind] = np.take_along_axis(of_dataset, best[None], axis=0)[0]
