"""IoU of masks and its means, the same to the last bit in any order and on any number of hosts."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from sam_jax.arrays import Bool

# IoUs are summed as integers of this fraction: integer sums do not depend on their order, and
# 1e-12 is far below what a mean of IoUs is quoted to.
UNITS_PER_IOU = 2**40


def mask_iou(
    prediction: Bool[np.ndarray, "oh ow"], ground_truth: Bool[np.ndarray, "oh ow"]
) -> float:
    """Intersection over union, in [0, 1]; 0 for two empty masks."""
    intersection = int(np.count_nonzero(prediction & ground_truth))
    union = int(np.count_nonzero(prediction | ground_truth))
    return intersection / max(union, 1)


class IouTotals:
    """Sums of IoUs per dataset and measure, and counts of what was met on the way.

    A measure is a way of prompting, such as ``center_3``. Totals of different hosts or runs merge
    without loss. Nothing is added for padding: callers add the IoUs of real masks, one by one.
    """

    def __init__(self) -> None:
        self._units: Counter[tuple[str, str]] = Counter()
        self._num_ious: Counter[tuple[str, str]] = Counter()
        self._events: Counter[tuple[str, str]] = Counter()

    def add(self, dataset: str, ious: Mapping[str, float]) -> None:
        """Adds one mask's IoU under each measure.

        Raises:
          ValueError: an IoU lies outside [0, 1].
        """
        for measure, iou in ious.items():
            if not 0.0 <= iou <= 1.0:
                raise ValueError(f"IoU of {measure} on {dataset} is {iou}, not within [0, 1]")
            self._units[dataset, measure] += round(iou * UNITS_PER_IOU)
            self._num_ious[dataset, measure] += 1

    def count(self, dataset: str, event: str, number: int = 1) -> None:
        """Adds to a count of the dataset, such as ``images``."""
        self._events[dataset, event] += number

    def merge(self, other: "IouTotals") -> None:
        """Adds everything that another object holds."""
        # Counter.update adds; the + operator would drop sums of zero.
        self._units.update(other._units)
        self._num_ious.update(other._num_ious)
        self._events.update(other._events)

    def means(self) -> dict[str, dict[str, float]]:
        """Mean IoU per dataset and measure, datasets and measures in the order they came."""
        means: dict[str, dict[str, float]] = defaultdict(dict)
        for (dataset, measure), units in self._units.items():
            number = self._num_ious[dataset, measure]
            means[dataset][measure] = units / number / UNITS_PER_IOU
        return dict(means)

    def counts(self) -> dict[str, dict[str, int]]:
        """Counts per dataset and event."""
        counts: dict[str, dict[str, int]] = defaultdict(dict)
        for (dataset, event), number in self._events.items():
            counts[dataset][event] = number
        return dict(counts)

    def to_json(self) -> str:
        """Everything, as text that ``from_json`` reads."""
        return json.dumps(
            [list(counter.items()) for counter in (self._units, self._num_ious, self._events)]
        )

    @classmethod
    def from_json(cls, text: str) -> "IouTotals":
        """The object that ``to_json`` was called on."""
        totals = cls()
        counters = (totals._units, totals._num_ious, totals._events)
        for counter, items in zip(counters, json.loads(text), strict=True):
            counter.update({tuple(key): number for key, number in items})
        return totals


def mean_over_datasets(means: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Unweighted mean over the datasets of every measure that all of them have.

    A mean over fewer datasets than the others would stand beside them without being comparable.
    """
    shared = [m for m in next(iter(means.values()), {}) if all(m in d for d in means.values())]
    return {m: float(np.mean([d[m] for d in means.values()])) for m in shared}


def gather_totals(totals: IouTotals) -> IouTotals:
    """The totals of all hosts merged; every host must call this, and all get the same.

    The sums exceed 32 bits, which is all that arrays hold without x64, so text is exchanged.
    """
    if jax.process_count() == 1:
        return totals
    text = np.frombuffer(totals.to_json().encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    merged = IouTotals()
    for row, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True):
        merged.merge(IouTotals.from_json(bytes(row[:size]).decode()))
    return merged
