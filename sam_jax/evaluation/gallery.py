"""The few masks of an evaluation that are worth a picture, chosen while the masks stream by."""

import dataclasses
import statistics

import numpy as np

from sam_jax.arrays import UInt8
from sam_jax.evaluation.clicks import keyed_number
from sam_jax.evaluation.protocols.protocol import Outcome
from sam_jax.visualize import Example, example_sheet

# The typical masks are those nearest to the median among so many drawn at random.
_NUM_CANDIDATES = 16


class Gallery:
    """The worst, the most typical and the best outcomes by one measure, no image twice in a sort.

    Only what may still be shown is kept in memory. Ties are broken by the masks' names, so the
    choice does not depend on the order in which they come.

    Args:
      measure: which IoU ranks the outcomes; others are ignored.
      num_examples: how many of each sort.
    """

    def __init__(self, measure: str, num_examples: int):
        self._measure = measure
        self._num_examples = num_examples
        self._ious: list[float] = []
        self._worst = _Lowest(num_examples)
        self._best = _Lowest(num_examples)
        self._drawn = _Lowest(_NUM_CANDIDATES if num_examples else 0)

    def offer(self, outcome: Outcome) -> None:
        """Looks at an outcome and keeps it if it is among the chosen so far."""
        if self._measure not in outcome.ious:
            return
        iou = outcome.ious[self._measure]
        self._ious.append(iou)
        self._worst.offer(iou, iou, outcome)
        self._best.offer(-iou, iou, outcome)
        self._drawn.offer(keyed_number(outcome.target.key), iou, outcome)

    def picture(self) -> UInt8[np.ndarray, "_ _ 3"] | None:
        """The chosen ones with prompt, prediction and ground truth; None if there are none."""
        if not self._worst.entries:
            return None
        median = statistics.median(self._ious)
        typical = sorted(self._drawn.entries, key=lambda entry: abs(entry.iou - median))
        sorts = {
            "worst": self._worst.entries,
            "typical": typical[: self._num_examples],
            "best": self._best.entries[::-1],
        }
        examples = [
            dataclasses.replace(entry.example, caption=f"{sort}\n{entry.example.caption}")
            for sort, entries in sorts.items()
            for entry in entries
        ]
        title = f"{self._measure}: IoU of {len(self._ious):,} masks, median {median:.1%}"
        return example_sheet(examples, title=title)


@dataclasses.dataclass(frozen=True)
class _Entry:
    score: float | int
    key: str
    iou: float
    image: tuple[str, str]
    example: Example


class _Lowest:
    """The outcomes with the lowest scores, in ascending order, at most one of each image."""

    def __init__(self, size: int):
        self._size = size
        self.entries: list[_Entry] = []

    def offer(self, score: float | int, iou: float, outcome: Outcome) -> None:
        target = outcome.target
        rank = (score, target.key)
        if len(self.entries) == self._size and (
            not self.entries or rank > (self.entries[-1].score, self.entries[-1].key)
        ):
            return
        image = (target.image.dataset, target.image.name)
        entry = _Entry(score, target.key, iou, image, _example(outcome, iou))
        kept: dict[tuple[str, str], _Entry] = {}
        for candidate in sorted([*self.entries, entry], key=lambda e: (e.score, e.key)):
            kept.setdefault(candidate.image, candidate)
        self.entries = list(kept.values())[: self._size]


def _example(outcome: Outcome, iou: float) -> Example:
    target = outcome.target
    return Example(
        image=target.image.pixels,
        # A copy, or all other masks of the image would be kept with it.
        ground_truth=target.ground_truth.copy(),
        prediction=outcome.prediction,
        caption=f"IoU {iou:.1%}\n{target.image.dataset}",
        point_coords=np.array([click[:2] for click in outcome.clicks], int).reshape(-1, 2),
        point_labels=np.array([click.is_foreground for click in outcome.clicks], int),
        box_xyxy=None if outcome.clicks else target.box_xyxy,
    )
