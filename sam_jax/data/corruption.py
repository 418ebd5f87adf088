"""Counting what the data loader had to skip, and stopping when it is too much."""

import collections
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sam_jax.data.samples import NoObjectError, SkippedSampleError
from sam_jax.data.tally import Tally
from sam_jax.data.transforms import FILTERS, DroppedMask
from sam_jax.errors import UserError

_log = logging.getLogger(__name__)
# Every occurrence is logged up to here, then only the 32nd, 64th, 128th, ...
_LOG_EVERY_UP_TO = 16
_NUM_EXAMPLES = 5
# Names of skipped samples that are kept for each reason.
_MOST_NAMES = 100
# A source without a usable sample among so many stops the run, however large it is.
_MOST_WITHOUT_USE = 10_000


class TooManyCorruptSamplesError(UserError):
    """Too much of the data is unusable: training on the rest would be a mistake."""


class NoObjectsError(UserError):
    """A data set has no mask that can be used."""


class SkippedNames(dict[str, dict[str, int]]):
    """Names of skipped samples by reason, and how often each was skipped; the first so many."""

    def add(self, reason: str, name: str, times: int = 1) -> None:
        """Counts a sample, if it is known or there is room."""
        names = self.setdefault(reason, {})
        if name in names or len(names) < _MOST_NAMES:
            names[name] = names.get(name, 0) + times

    def update_from(self, other: Mapping[str, Mapping[str, int]]) -> None:
        """Adds all that another one holds, as far as there is room."""
        for reason, names in other.items():
            for name, times in names.items():
                self.add(reason, name, times)


@dataclass
class CorruptionLog:
    """Counts of what has been skipped so far, by reason.

    Samples without an object are counted apart: they are not damage.

    Attributes:
      max_corrupt_rate: the tolerated fraction of corrupt samples.
      grace: how many samples must have been seen before the rate is judged. As many corrupt samples
        in a row always stop the run, so that storage that fails late is noticed early.
      source_sizes: the number of samples of each source. One that has been gone through about twice
        without a usable sample stops the run.
      num_seen: samples so far, good or not.
      corrupt: skipped samples by reason.
      without_object: skipped samples that are in order but have no mask to use, by reason.
      dropped_masks: masks left out of good samples, by reason.
      remarks: what else was decided or changed about good samples, by reason.
      names: of skipped samples, in order or not, by reason.
    """

    max_corrupt_rate: float
    grace: int
    source_sizes: Sequence[int] = ()
    num_seen: int = 0
    corrupt: Tally = field(default_factory=Tally)
    without_object: Tally = field(default_factory=Tally)
    dropped_masks: Tally = field(default_factory=Tally)
    remarks: Tally = field(default_factory=Tally)
    names: SkippedNames = field(default_factory=SkippedNames)
    _num_in_a_row: int = 0
    # Samples of a source since its last good one. A run that is continued starts anew.
    _num_without_use: collections.Counter[int] = field(default_factory=collections.Counter)
    # (source, reason) of remarks already logged. A run that is continued logs them again.
    _remarked: set[tuple[int, str]] = field(default_factory=set)
    _examples: collections.deque[str] = field(
        default_factory=lambda: collections.deque(maxlen=_NUM_EXAMPLES)
    )

    def record_good(
        self,
        name: str,
        dropped: Iterable[DroppedMask] = (),
        remarks: Iterable[tuple[str, str]] = (),
        source: int = 0,
    ) -> None:
        """Counts a sample that was used, and the masks it lost.

        Args:
          name: the sample, for the log.
          dropped: from `TrainTransform.with_report`.
          remarks: from `samples.all_remarks`. The first of each reason is logged for each source,
            since they may be true of all samples.
          source: which of `source_sizes` it is of.
        """
        self.num_seen += 1
        self._num_in_a_row = 0
        self._num_without_use[source] = 0
        for mask in dropped:
            if mask.reason in FILTERS:
                self.dropped_masks.add(mask.reason)
            else:
                _count(self.dropped_masks, "mask", mask.reason, f"{name}: {mask.detail}")

        for reason, detail in remarks:
            example = f"{name}: {detail}" if detail else name
            self.remarks.add(reason, example)
            if (source, reason) not in self._remarked:
                self._remarked.add((source, reason))
                _log.warning("%s: %s; said once for each data set, counted on", example, reason)

    def record_skipped(self, error: SkippedSampleError, source: int = 0) -> None:
        """Counts a sample that was skipped.

        Raises:
          TooManyCorruptSamplesError: it is corrupt, and one too many.
          NoObjectsError: the source has had no usable sample for too long.
        """
        self.num_seen += 1
        self._num_without_use[source] += 1
        self.names.add(error.reason, error.name)
        if isinstance(error, NoObjectError):
            self._num_in_a_row = 0
            _count(self.without_object, "sample skipped", error.reason, str(error))
        else:
            self._num_in_a_row += 1
            self._examples.append(str(error))
            _count(self.corrupt, "sample skipped", error.reason, str(error))
            self._judge_corrupt()
        self._judge_use(source)

    def _judge_corrupt(self) -> None:
        num_corrupt = self.corrupt.total()
        too_many = (
            self.num_seen >= self.grace and num_corrupt > self.max_corrupt_rate * self.num_seen
        )
        if too_many or self._num_in_a_row >= self.grace:
            raise TooManyCorruptSamplesError(
                f"{num_corrupt} of {self.num_seen} samples are corrupt "
                f"(tolerated: {self.max_corrupt_rate:.1%}; the last "
                f"{self._num_in_a_row} in a row). By reason:"
                f"{self._report()}\nLatest:\n  " + "\n  ".join(self._examples)
            )

    def _judge_use(self, source: int) -> None:
        if not self.source_sizes:
            return
        limit = max(self.grace, min(2 * self.source_sizes[source], _MOST_WITHOUT_USE))
        if self._num_without_use[source] >= limit:
            raise NoObjectsError(
                f"of the last {limit} samples read from data source {source} (counted from 0) "
                f"none had a mask that can be used. Skipped so far:{self._report()}\n"
                "Check the folder, and the keys that leave masks out"
            )

    def _report(self) -> str:
        return "".join(f"\n  {line}" for line in self.lines())

    def lines(self) -> list[str]:
        """All counts, a line for each reason with an example."""
        return [
            *(f"samples: {line}" for line in self.corrupt.lines()),
            *(f"samples without an object: {line}" for line in self.without_object.lines()),
            *(f"masks of samples in use: {line}" for line in self.dropped_masks.lines()),
            *(f"samples in use: {line}" for line in self.remarks.lines()),
        ]

    def get_state(self) -> dict[str, Any]:
        """The counts, JSON-serialisable."""
        return {
            "num_seen": self.num_seen,
            "corrupt_counts": dict(self.corrupt.counts),
            "without_object_counts": dict(self.without_object.counts),
            "dropped_mask_counts": dict(self.dropped_masks.counts),
            "remark_counts": dict(self.remarks.counts),
            "examples_by_reason": [
                dict(tally.examples)
                for tally in (self.corrupt, self.without_object, self.dropped_masks, self.remarks)
            ],
            "skipped_names": {reason: dict(names) for reason, names in self.names.items()},
            "num_in_a_row": self._num_in_a_row,
            "examples": list(self._examples),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what `get_state` returned."""
        self.num_seen = state["num_seen"]
        # Runs begun before these were counted have none of them.
        without_object = state.get("without_object_counts", {})
        remarks = state.get("remark_counts", {})
        examples = state.get("examples_by_reason", [{}, {}, {}, {}])
        counts = (state["corrupt_counts"], without_object, state["dropped_mask_counts"], remarks)
        self.corrupt, self.without_object, self.dropped_masks, self.remarks = (
            Tally(collections.Counter(count), dict(example))
            for count, example in zip(counts, examples, strict=True)
        )
        self.names = SkippedNames()
        self.names.update_from(state.get("skipped_names", {}))
        self._num_in_a_row = state["num_in_a_row"]
        self._examples = collections.deque(state["examples"], maxlen=_NUM_EXAMPLES)


def sum_of_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of one log that counted what several have."""
    total = CorruptionLog(max_corrupt_rate=1.0, grace=0)
    for state in states:
        part = CorruptionLog(max_corrupt_rate=1.0, grace=0)
        part.set_state(state)
        total.num_seen += part.num_seen
        total.corrupt.update(part.corrupt)
        total.without_object.update(part.without_object)
        total.dropped_masks.update(part.dropped_masks)
        total.remarks.update(part.remarks)
        total.names.update_from(part.names)
    return total.get_state()


def _count(tally: Tally, what: str, reason: str, text: str) -> None:
    tally.add(reason, text)
    count = tally.counts[reason]
    if count <= _LOG_EVERY_UP_TO or count & (count - 1) == 0:
        _log.warning("%s (%s, no. %d): %s", what, reason, count, text)
