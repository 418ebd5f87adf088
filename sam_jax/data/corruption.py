"""Counting what the data loader had to skip, and stopping when it is too much."""

import collections
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sam_jax.data.samples import CorruptSampleError
from sam_jax.data.transforms import DroppedMask
from sam_jax.errors import UserError

_log = logging.getLogger(__name__)
# Every occurrence is logged up to here, then only the 32nd, 64th, 128th, ...
_LOG_EVERY_UP_TO = 16
_NUM_EXAMPLES = 5
# Masks dropped for these reasons are the recipe's filters at work, not damage.
_FILTERS = frozenset({"too large", "too small"})


class TooManyCorruptSamplesError(UserError):
    """So much of the data is unusable that training on the rest is a mistake."""


@dataclass
class CorruptionLog:
    """What has been skipped so far, by reason.

    Attributes:
        max_corrupt_rate: the tolerated fraction of corrupt samples.
        grace: how many samples must have been seen before the rate is
            judged. As many corrupt samples in a row always stop the run, so
            that storage that fails late is noticed early.
        num_seen: samples so far, good and corrupt.
        corrupt_counts: skipped samples by reason.
        dropped_mask_counts: masks left out of good samples by reason.
        remark_counts: good samples by what was decided about them, see
            `samples.remarks`.
    """

    max_corrupt_rate: float
    grace: int
    num_seen: int = 0
    corrupt_counts: collections.Counter = field(default_factory=collections.Counter)
    dropped_mask_counts: collections.Counter = field(default_factory=collections.Counter)
    remark_counts: collections.Counter = field(default_factory=collections.Counter)
    _num_in_a_row: int = 0
    _examples: collections.deque = field(
        default_factory=lambda: collections.deque(maxlen=_NUM_EXAMPLES)
    )

    def record_good(
        self, name: str, dropped: Iterable[DroppedMask] = (), remarks: Iterable[str] = ()
    ) -> None:
        """Counts a sample that was used, and the masks it lost.

        Args:
            name: the sample, for the log.
            dropped: from `TrainTransform.with_report`.
            remarks: of each, the first is logged.
        """
        self.num_seen += 1
        self._num_in_a_row = 0
        for mask in dropped:
            self.dropped_mask_counts[mask.reason] += 1
            if mask.reason not in _FILTERS:
                count = self.dropped_mask_counts[mask.reason]
                _warn("mask", mask.reason, count, f"{name}: {mask.detail}")

        for remark in remarks:
            self.remark_counts[remark] += 1
            if self.remark_counts[remark] == 1:
                _log.warning("%s: %s; said once, counted on", name, remark)

    def record_corrupt(self, error: CorruptSampleError) -> None:
        """Counts a sample that was skipped.

        Raises:
            TooManyCorruptSamplesError: that is one too many.
        """
        self.num_seen += 1
        self._num_in_a_row += 1
        self.corrupt_counts[error.reason] += 1
        self._examples.append(str(error))
        _warn("sample", error.reason, self.corrupt_counts[error.reason], str(error))
        num_corrupt = self.corrupt_counts.total()
        too_many = (
            self.num_seen >= self.grace and num_corrupt > self.max_corrupt_rate * self.num_seen
        )
        if too_many or self._num_in_a_row >= self.grace:
            raise TooManyCorruptSamplesError(
                f"{num_corrupt} of {self.num_seen} samples are corrupt "
                f"(tolerated: {self.max_corrupt_rate:.1%}; the last "
                f"{self._num_in_a_row} in a row). By reason: "
                f"{dict(self.corrupt_counts)}. Latest:\n  " + "\n  ".join(self._examples)
            )

    def get_state(self) -> dict[str, Any]:
        """The counts, JSON-serialisable."""
        return {
            "num_seen": self.num_seen,
            "corrupt_counts": dict(self.corrupt_counts),
            "dropped_mask_counts": dict(self.dropped_mask_counts),
            "remark_counts": dict(self.remark_counts),
            "num_in_a_row": self._num_in_a_row,
            "examples": list(self._examples),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what `get_state` returned."""
        self.num_seen = state["num_seen"]
        self.corrupt_counts = collections.Counter(state["corrupt_counts"])
        self.dropped_mask_counts = collections.Counter(state["dropped_mask_counts"])
        self.remark_counts = collections.Counter(state.get("remark_counts", {}))
        self._num_in_a_row = state["num_in_a_row"]
        self._examples = collections.deque(state["examples"], maxlen=_NUM_EXAMPLES)


def sum_of_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of one log that counted what several have."""
    total = CorruptionLog(max_corrupt_rate=1.0, grace=0)
    for state in states:
        total.num_seen += state["num_seen"]
        total.corrupt_counts.update(state["corrupt_counts"])
        total.dropped_mask_counts.update(state["dropped_mask_counts"])
        total.remark_counts.update(state.get("remark_counts", {}))
    return total.get_state()


def _warn(what: str, reason: str, count: int, text: str) -> None:
    if count <= _LOG_EVERY_UP_TO or count & (count - 1) == 0:
        _log.warning("skipped %s (%s, no. %d): %s", what, reason, count, text)
