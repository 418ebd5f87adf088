"""Counts of matched pixels of an edge map at each threshold, against all annotators."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sam_jax.arrays import Bool, Float
from sam_jax.evaluation.edges.matching import EdgePixels
from sam_jax.evaluation.edges.thinning import thin


class MatchCounts(NamedTuple):
    """Counts of an edge map at rising thresholds; see ``scores.EdgeCounts``."""

    recalled: list[int]
    predicted: list[int]
    confirmed: list[int]


class AnnotatedImage:
    """An image's annotators, ready to be matched with any number of edge maps.

    Args:
      boundaries: of each annotator.
      max_distance_rate: how far apart matched pixels may lie, as a rate of the image's diagonal.
    """

    def __init__(self, boundaries: Sequence[Bool[np.ndarray, "h w"]], max_distance_rate: float):
        self._max_distance_px = max_distance_rate * math.hypot(*boundaries[0].shape)
        self._annotations = [EdgePixels(marked, self._max_distance_px) for marked in boundaries]

    @property
    def num_annotated(self) -> int:
        """Marked pixels of all annotators."""
        return sum(map(len, self._annotations))

    def count(
        self, edges: Float[np.ndarray, "h w"], thresholds: Float[np.ndarray, "t"]
    ) -> MatchCounts:
        """Matches each annotator with what is left of the map at each threshold, thinned.

        A predicted pixel is confirmed if it is matched with a pixel of any annotator.

        Args:
          edges: strengths; an edge is what reaches the threshold.
          thresholds: rising.
        """
        counts = MatchCounts([], [], [])
        before, num_before = None, -1
        for threshold in thresholds:
            is_edge = edges >= threshold
            num_edges = int(np.count_nonzero(is_edge))
            # Rising thresholds only ever take pixels away.
            if before is None or num_edges != num_before:
                before, num_before = self._match(thin(is_edge)), num_edges
            for values, value in zip(counts, before, strict=True):
                values.append(value)
        return counts

    def _match(self, lines: np.ndarray) -> tuple[int, int, int]:
        pixels = EdgePixels(lines, self._max_distance_px)
        is_confirmed = np.zeros(len(pixels), bool)
        recalled = 0
        for annotation in self._annotations:
            is_matched = pixels.match(annotation) >= 0
            recalled += int(np.count_nonzero(is_matched))
            is_confirmed |= is_matched
        return recalled, len(pixels), int(np.count_nonzero(is_confirmed))


def image_record(
    name: str,
    annotated: AnnotatedImage,
    maps: Mapping[str, Mapping[str, Float[np.ndarray, "h w"]]],
    thresholds: Float[np.ndarray, "t"],
) -> dict[str, Any]:
    """The record of an image: counts of its edge maps, by their source and suppression.

    Args:
      name: the image's.
      annotated: its annotators.
      maps: strengths, by source and suppression.
      thresholds: see ``AnnotatedImage.count``.
    """
    return {
        "image": name,
        "annotated": annotated.num_annotated,
        "maps": {
            source: {
                suppression: annotated.count(edges, thresholds)._asdict()
                for suppression, edges in by_suppression.items()
            }
            for source, by_suppression in maps.items()
        },
    }


def unusable_record(name: str, reason: Exception) -> dict[str, Any]:
    """The record of an image that cannot be used."""
    return {"image": name, "unusable": str(reason)}
