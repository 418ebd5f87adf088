"""Scores of edge maps from counts of matched pixels: ODS, OIS, AP and R50.

Source: Arbeláez et al. 2011, section 3.1, as computed by the benchmark's ``collect_eval_bdry`` and
by Dollár and Zitnick's ``edgesEvalDir``, which adds R50. What looks odd below is theirs.
"""

from typing import NamedTuple

import numpy as np

from sam_jax.arrays import Float

# Points between two thresholds at which the best F is looked for.
_STEPS_BETWEEN = 100
_RECALLS = np.linspace(0.0, 1.0, 101)


class EdgeCounts(NamedTuple):
    """Counts of pixels at rising thresholds, of one image or, with a first dimension, of several.

    Attributes:
      annotated: marked pixels, of all annotators, the same at every threshold.
      recalled: those of them that are matched.
      predicted: pixels of the thinned prediction.
      confirmed: those of them that are matched with any annotator's.
    """

    annotated: Float[np.ndarray, "*n 1"]
    recalled: Float[np.ndarray, "*n t"]
    predicted: Float[np.ndarray, "*n t"]
    confirmed: Float[np.ndarray, "*n t"]


class Curve(NamedTuple):
    """Recall and precision at rising thresholds, in [0, 1]; 0 where there is nothing to count."""

    recall: Float[np.ndarray, "*n t"]
    precision: Float[np.ndarray, "*n t"]

    @property
    def f(self) -> Float[np.ndarray, "*n t"]:
        """Their harmonic mean; 0 where both are 0."""
        total = self.recall + self.precision
        return 2 * self.recall * self.precision / np.where(total == 0, 1, total)


class OperatingPoint(NamedTuple):
    """The threshold of the highest F, with what is reached there."""

    threshold: float
    recall: float
    precision: float
    f: float


def curve_of(counts: EdgeCounts) -> Curve:
    """Recall and precision from counts."""
    return Curve(
        _rate(counts.recalled, counts.annotated), _rate(counts.confirmed, counts.predicted)
    )


def pooled(counts: EdgeCounts, weights: Float[np.ndarray, "n"]) -> EdgeCounts:
    """Sums over images, each of which counts as often as its weight says."""
    return EdgeCounts(*(weights @ part for part in counts))


def best_point(thresholds: Float[np.ndarray, "t"], curve: Curve) -> OperatingPoint:
    """The highest F of a curve whose recall and precision are linear between thresholds."""
    if len(thresholds) == 1:
        return OperatingPoint(*(float(x[0]) for x in (thresholds, *curve, curve.f)))
    share = np.linspace(0.0, 1.0, _STEPS_BETWEEN)

    def between(values: np.ndarray) -> np.ndarray:
        return (values[:-1, None] * (1 - share) + values[1:, None] * share).ravel()

    finer = Curve(between(curve.recall), between(curve.precision))
    best = int(finer.f.argmax())
    values = (between(thresholds), *finer, finer.f)
    return OperatingPoint(*(float(x[best]) for x in values))


def optimal_image_f(counts: EdgeCounts, weights: Float[np.ndarray, "n"]) -> float:
    """OIS: F of the counts that each image has at the threshold that suits it best.

    No interpolation here; of several equally good thresholds the highest counts.
    """
    f = curve_of(counts).f
    best = f.shape[1] - 1 - f[:, ::-1].argmax(axis=1)
    rows = np.arange(len(f))
    chosen = EdgeCounts(counts.annotated, *(part[rows, best][:, None] for part in counts[1:]))
    return float(curve_of(pooled(chosen, weights)).f[0])


def optimal_f_of_images(counts: EdgeCounts) -> Float[np.ndarray, "n"]:
    """The highest F of each image at any threshold."""
    return curve_of(counts).f.max(axis=1)


def average_precision(curve: Curve) -> float:
    """Area under the curve: precision at recalls 0, 0.01, ... 1, over 100 and not 101 of them.

    Precision is linear between the recalls that thresholds reach, and 0 outside of them. A curve of
    a single recall has no area.
    """
    recalls, precisions = _rising(curve.recall, curve.precision)
    if len(recalls) < 2:
        return 0.0
    heights = np.interp(_RECALLS, recalls, precisions, left=0.0, right=0.0)
    return float(heights.sum() / (len(_RECALLS) - 1))


def recall_at_half_precision(curve: Curve) -> float:
    """R50: recall where precision is 50 %, or the lowest precision if that is higher.

    0 if precision never gets there.
    """
    # By recall first, so that of thresholds with the same recall or precision the same one counts
    # as in ``edgesEvalDir``.
    recalls, precisions = _rising(curve.recall, curve.precision)
    precisions, recalls = _rising(precisions[::-1], recalls[::-1])
    wanted = max(precisions[0], 0.5)
    return float(np.interp(wanted, precisions, recalls, right=0.0))


def edge_scores(
    thresholds: Float[np.ndarray, "t"], counts: EdgeCounts, weights: Float[np.ndarray, "n"]
) -> dict[str, float]:
    """All scores of images, each of which counts as often as its weight says.

    Returns:
      ``ods``, ``ods_threshold``, ``ods_recall``, ``ods_precision``, ``ois``, ``ap`` and ``r50``.
    """
    curve = curve_of(pooled(counts, weights))
    best = best_point(thresholds, curve)
    return {
        "ods": best.f,
        "ois": optimal_image_f(counts, weights),
        "ap": average_precision(curve),
        "r50": recall_at_half_precision(curve),
        "ods_threshold": best.threshold,
        "ods_recall": best.recall,
        "ods_precision": best.precision,
    }


def _rate(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.where(whole == 0, 1, whole)


def _rising(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys without repetitions, sorted, and the value at the first place of each."""
    unique, first = np.unique(keys, return_index=True)
    return unique, values[first]
