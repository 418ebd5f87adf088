"""IoU of masks and its means, the same to the last bit in any order."""

from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np

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
    """Sums of IoUs per dataset and measure.

    A measure is a way of prompting, such as ``center_3``. Nothing is added for padding: callers add
    the IoUs of real masks, one by one.
    """

    def __init__(self) -> None:
        self._units: Counter[tuple[str, str]] = Counter()
        self._num_ious: Counter[tuple[str, str]] = Counter()

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

    def means(self) -> dict[str, dict[str, float]]:
        """Mean IoU per dataset and measure, datasets and measures in the order they came."""
        means: dict[str, dict[str, float]] = defaultdict(dict)
        for (dataset, measure), units in self._units.items():
            number = self._num_ious[dataset, measure]
            means[dataset][measure] = units / number / UNITS_PER_IOU
        return dict(means)


def mean_over_datasets(means: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Unweighted mean over the datasets of every measure that all of them have.

    A mean over fewer datasets than the others would stand beside them without being comparable.
    """
    shared = [m for m in next(iter(means.values()), {}) if all(m in d for d in means.values())]
    return {m: float(np.mean([d[m] for d in means.values()])) for m in shared}
