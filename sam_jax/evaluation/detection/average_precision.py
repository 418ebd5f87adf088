"""Average precision from matches of single images, by COCO's rules and by LVIS's."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from sam_jax.arrays import Bool, Float, Int
from sam_jax.evaluation.detection.matching import (
    IOU_THRESHOLDS,
    SIZES,
    greedy_matches,
    is_of_size,
    packed,
    unpacked,
)

Rules: TypeAlias = Literal["coco", "lvis"]
# Recalls at which precision is read; made as pycocotools makes them.
RECALLS: Float[np.ndarray, "r"] = np.linspace(0.0, 1.0, 101)
# COCO counts so many of each category in an image, LVIS so many of all.
MAX_DETECTIONS: Mapping[Rules, int] = {"coco": 100, "lvis": 300}
# LVIS's groups of categories, by how many images have them.
FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}


def counted(
    rules: Rules, scores: Float[np.ndarray, "d"], categories: Int[np.ndarray, "d"]
) -> list[int]:
    """The detections of an image that the rules count, in their order; best scores first win."""
    order = np.argsort(-scores, kind="stable")
    if rules == "lvis":
        return sorted(order[: MAX_DETECTIONS[rules]].tolist())
    kept = [
        order[categories[order] == category][: MAX_DETECTIONS[rules]]
        for category in np.unique(categories)
    ]
    return sorted(np.concatenate([*kept, np.zeros(0, int)]).tolist())


def category_matches(
    category_id: int,
    scores: Float[np.ndarray, "d"],
    areas: Float[np.ndarray, "d"],
    ious: Float[np.ndarray, "d g"],
    true_areas: Float[np.ndarray, "g"],
    crowd: Bool[np.ndarray, "g"],
    *,
    is_exhaustive: bool = True,
) -> list[Any]:
    """The matches of one category in one image, as values of JSON.

    Args:
      category_id: which.
      scores: of its detections.
      areas: of their masks, pixels.
      ious: with its objects; over the detection's own area where the object is a crowd.
      true_areas: of the objects.
      crowd: which of them mark groups.
      is_exhaustive: whether all objects of the category are marked; if not, detections of nothing
        are not held against it (LVIS's ``not_exhaustive_category_ids``).

    Returns:
      the category, the number of objects to be found of each size, scores by falling score, and for
      each size, of each detection, two integers whose bits say at which thresholds it is right and
      at which wrong; it is neither where it is ignored.

    Source: pycocotools, ``COCOeval.evaluateImg``; lvis, ``LVISEval.evaluate_img``.
    """
    order = np.argsort(-scores, kind="stable")
    ignored = ~is_of_size(true_areas) | crowd
    matches = greedy_matches(ious[order], ignored, crowd)
    found = matches >= 0
    matched_ignored = np.zeros_like(found)
    if len(true_areas):
        sizes = np.arange(len(SIZES))[:, None, None]
        matched_ignored = found & ignored[sizes, matches]
    of_other_size = ~is_of_size(areas[order])[:, None]
    wrong = ~found & ~of_other_size & is_exhaustive
    return [
        category_id,
        (~ignored).sum(axis=1).tolist(),
        scores[order].tolist(),
        packed(found & ~matched_ignored).tolist(),
        packed(wrong).tolist(),
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class CategoryMatches:
    """Matches of a category in all images, by falling score; of equal scores in image order.

    Attributes:
      num_objects: to be found in each image, of each size.
      images: number of the image of each detection.
      right: bits, as of ``category_matches``.
      wrong: likewise.
    """

    num_objects: Int[np.ndarray, "s n"]
    images: Int[np.ndarray, "d"]
    right: Int[np.ndarray, "s d"]
    wrong: Int[np.ndarray, "s d"]

    def precision_and_recall(
        self, weights: Float[np.ndarray, "n"]
    ) -> tuple[Float[np.ndarray, "s t r"], Float[np.ndarray, "s t"]]:
        """Precision at ``RECALLS``, and the highest recall; -1 where there is nothing to be found.

        Args:
          weights: how often each image counts.

        Source: pycocotools, ``COCOeval.accumulate``.
        """
        shape = (len(SIZES), len(IOU_THRESHOLDS))
        precision, recall = np.full((*shape, len(RECALLS)), -1.0), np.full(shape, -1.0)
        num_objects = self.num_objects @ weights
        some = num_objects > 0
        precision[some], recall[some] = 0.0, 0.0
        if not some.any() or not len(self.images):
            return precision, recall
        weight = weights[self.images]
        right = np.cumsum(unpacked(self.right[some]) * weight, axis=2)
        wrong = np.cumsum(unpacked(self.wrong[some]) * weight, axis=2)
        recalls = right / num_objects[some, None, None]
        precisions = right / (wrong + right + np.spacing(1))
        # At each recall the best precision of any recall that is not lower.
        envelope = np.maximum.accumulate(precisions[:, :, ::-1], axis=2)[:, :, ::-1]
        recall[some] = recalls[:, :, -1]
        read = np.zeros((*recalls.shape[:2], len(RECALLS)))
        for place in np.ndindex(*recalls.shape[:2]):
            at = np.searchsorted(recalls[place], RECALLS, side="left")
            reached = at < recalls.shape[2]
            read[place][reached] = envelope[place][at[reached]]
        precision[some] = read
        return precision, recall


def gather_matches(images: Sequence[Sequence[Any]]) -> dict[int, CategoryMatches]:
    """The matches of each category that has an object or a detection in any image.

    Args:
      images: of each image, what ``category_matches`` gave for its categories.
    """
    found: dict[int, list[tuple[int, Any]]] = {}
    for number, of_image in enumerate(images):
        for matches in of_image:
            found.setdefault(matches[0], []).append((number, matches))
    gathered = {}
    for category, of_category in sorted(found.items()):
        num_objects = np.zeros((len(SIZES), len(images)), np.int64)
        for number, matches in of_category:
            num_objects[:, number] = matches[1]
        scores = np.concatenate([np.array(matches[2], float) for _, matches in of_category])
        numbers = np.concatenate([np.full(len(m[2]), number) for number, m in of_category])
        right, wrong = (
            np.concatenate(
                [np.array(m[place], np.int16).reshape(len(SIZES), -1) for _, m in of_category],
                axis=1,
            )
            for place in (3, 4)
        )
        order = np.argsort(-scores, kind="stable")
        gathered[category] = CategoryMatches(
            num_objects, numbers[order], right[:, order], wrong[:, order]
        )
    return gathered


def average_precisions(
    matches: Mapping[int, CategoryMatches],
    weights: Float[np.ndarray, "n"],
    frequencies: Mapping[int, str],
) -> dict[str, float]:
    """COCO's and LVIS's figures in [0, 1]; NaN where there is nothing to be found.

    ``AP`` is the mean over thresholds, recalls and the categories that have an object to be found;
    ``AP50`` and ``AP75`` are those of one threshold, ``AP_small`` and so on of objects of a size,
    ``AP_rare`` and so on of categories of a frequency, ``AR`` is the mean of the highest recalls.

    Args:
      matches: by category.
      weights: how often each image counts.
      frequencies: "r", "c" or "f" by category, where they are known.
    """
    tables = {c: m.precision_and_recall(weights) for c, m in matches.items()}
    if not tables:
        return {}
    precision = np.stack([table[0] for table in tables.values()])
    recall = np.stack([table[1] for table in tables.values()])
    threshold = {50: 0, 75: 5}
    figures = {"AP": _mean(precision[:, 0])}
    figures |= {f"AP{rate}": _mean(precision[:, 0, t]) for rate, t in threshold.items()}
    for place, size in enumerate(SIZES):
        if size != "all":
            figures[f"AP_{size}"] = _mean(precision[:, place])
    if frequencies:
        of_category = np.array([frequencies.get(category) for category in tables])
        for letter, frequency in FREQUENCIES.items():
            figures[f"AP_{frequency}"] = _mean(precision[of_category == letter, 0])
    figures["AR"] = _mean(recall[:, 0])
    return figures


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan
