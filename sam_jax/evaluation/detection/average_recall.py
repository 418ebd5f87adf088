"""Average recall of proposals without classes, from matches of single images."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sam_jax.arrays import Bool, Float
from sam_jax.evaluation.detection.average_precision import FREQUENCIES
from sam_jax.evaluation.detection.matching import (
    IOU_THRESHOLDS,
    SIZES,
    greedy_matches,
    is_of_size,
    packed,
    unpacked,
)
from sam_jax.evaluation.evaluation import Measures

# Groups of objects over which there is a recall: by size, and by the frequency of their category.
GROUPS = (*SIZES, *FREQUENCIES.values())


def groups_of(
    areas: Float[np.ndarray, "g"], frequencies: Sequence[str | None]
) -> Bool[np.ndarray, "s g"]:
    """Tells for each of ``GROUPS`` which objects are of it.

    Args:
      areas: of the objects, pixels.
      frequencies: "r", "c" or "f" of their categories, where they are known.
    """
    letters = np.array(list(frequencies), dtype=object)
    return np.concatenate([is_of_size(areas), [letters == letter for letter in FREQUENCIES]])


def found_objects(
    ious: Float[np.ndarray, "d g"], groups: Bool[np.ndarray, "s g"], crowd: Bool[np.ndarray, "g"]
) -> dict[str, list[int | None]]:
    """Objects that proposals find, as values of JSON.

    Each group is matched by itself, as if there were no other objects: a proposal takes an object
    of another group only where it fits none of this one, so that these change nothing.

    Args:
      ious: of proposals, the best first, with objects.
      groups: see ``groups_of``.
      crowd: objects that mark a group of things; none of them is to be found.

    Returns:
      for each of ``GROUPS`` that has an object, and each object that is no crowd, an integer whose
      bits say at which thresholds it is found; None if it is not of the group.
    """
    matches = greedy_matches(ious, ~groups | crowd, crowd)
    numbers = np.arange(groups.shape[1])
    found = (matches[..., None] == numbers).any(axis=2)
    bits = packed(found)
    return {
        name: [
            int(value) if is_in else None
            for value, is_in in zip(bits[place][~crowd], groups[place][~crowd], strict=True)
        ]
        for place, name in enumerate(GROUPS)
        if (groups[place] & ~crowd).any()
    }


def average_recalls(found: Sequence[Mapping[str, Sequence[int | None]]]) -> Measures:
    """Recalls in [0, 1]: means over thresholds and over all objects of a group, of all images.

    ``AR`` is of all objects, ``AR_small`` and so on of a size, ``AR_rare`` and so on of a
    frequency.

    Args:
      found: of each image, what ``found_objects`` gives; of an image that was skipped, nothing.
    """
    names = [name for name in GROUPS if any(name in image for image in found)]
    right, objects = np.zeros((2, len(names), len(found)))
    for number, image in enumerate(found):
        for place, name in enumerate(names):
            bits = np.array([value for value in image.get(name, ()) if value is not None], int)
            right[place, number] = unpacked(bits).sum()
            objects[place, number] = len(bits)

    def weighted(weights: Float[np.ndarray, "n"]) -> dict[str, float]:
        counts = len(IOU_THRESHOLDS) * (objects @ weights)
        return {
            "AR" if name == "all" else f"AR_{name}": float(hits / count) if count else math.nan
            for name, hits, count in zip(names, right @ weights, counts, strict=True)
        }

    return weighted


def ranked(
    ranking: str, records: Sequence[Mapping[str, Any]], seed: int
) -> list[Mapping[str, Any]]:
    """Proposals, the best first; of equal ones the earlier.

    Args:
      ranking: "mean" of predicted IoU and stability, "predicted_iou", or "random".
      records: of the generator of automatic masks.
      seed: of "random".
    """
    if ranking == "random":
        order = np.random.default_rng(seed).permutation(len(records))
    else:
        scores = np.array([record["predicted_iou"] for record in records], np.float64)
        if ranking == "mean":
            # An empty mask has no stability.
            stabilities = np.array([record["stability_score"] for record in records], np.float64)
            scores = (scores + np.nan_to_num(stabilities)) / 2
        order = np.argsort(-scores, kind="stable")
    return [records[index] for index in order.tolist()]
