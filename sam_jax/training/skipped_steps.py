"""Steps that were skipped, as their loss or gradient is not finite, and the end of too many."""

import collections
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from sam_jax import places
from sam_jax.data.pipeline import SAMPLE_NAMES
from sam_jax.errors import UserError
from sam_jax.hosts import is_first

SKIPPED_STEPS = "skipped_steps.jsonl"

_NAME_BYTES = 256


class DivergedError(UserError):
    """Step after step has a loss or a gradient that is not finite."""


class _Step(NamedTuple):
    number: int
    metrics: Mapping[str, jax.Array]
    batch: Mapping[str, np.ndarray]


# (step, its batch, the names of its samples) -> lines.
Diagnose = Callable[[int, Mapping[str, np.ndarray], Sequence[str]], list[str]]


class SkippedSteps:
    """Counts and records skipped steps, and ends a run that skips too many in a row.

    A step is looked at when the next one has begun, so that devices need not wait for the host;
    after one that was skipped, each is waited for, and so is each where one is too many.

    Args:
      workdir: where they are recorded, a line of JSON for each: step, loss, gradient_norm, samples.
      limit: so many in a row are too many.
      say: takes a line for each.
    """

    def __init__(self, workdir: Path, limit: int, say: Callable[[str], None]):
        self._path = workdir / SKIPPED_STEPS
        self._limit = limit
        self._say = say
        self._in_a_row = 0
        self._pending: collections.deque[_Step] = collections.deque()

    def watch(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        batch: Mapping[str, np.ndarray],
        diagnose: Diagnose,
    ) -> None:
        """Looks at the step before this one, or at this one if there is reason to.

        Args:
          step: its number, from 1.
          metrics: of the step, perhaps still being computed.
          batch: its images, this process's share.
          diagnose: finds out why a step was skipped, from the parameters as they are now.

        Raises:
          DivergedError: if as many as ``limit`` in a row were skipped.
        """
        self._pending.append(_Step(step, metrics, batch))
        if len(self._pending) > 1:
            self._look_at(self._pending.popleft(), diagnose)
        if self._pending and (self._in_a_row or self._limit == 1):
            self.finish(diagnose)

    def finish(self, diagnose: Diagnose) -> None:
        """Looks at all steps so far, and waits for them; see ``watch``."""
        while self._pending:
            self._look_at(self._pending.popleft(), diagnose)

    def _look_at(self, step: _Step, diagnose: Diagnose) -> None:
        if not float(step.metrics["skipped"]):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        loss, norm = (float(step.metrics[name]) for name in ("loss", "gradient_norm"))
        samples = _names_of_all(step.batch)
        what = f"the loss is {loss:.4g}, the norm of its gradient {norm:.4g}"
        self._say(f"step {step.number} is skipped: {what}; its samples are in {self._path}")
        if is_first():
            # Python's own spelling of these numbers is no JSON.
            record = {"step": step.number, "loss": str(loss), "gradient_norm": str(norm)}
            places.append_line(self._path, json.dumps(record | {"samples": samples}))
        # The one after the last may have moved the parameters on.
        if self._in_a_row >= self._limit and not self._pending:
            try:
                lines = diagnose(step.number, step.batch, samples)
            # Whatever it is, that the run has diverged must be said.
            except Exception as error:
                lines = [f"why could not be found out: {error}"]
            raise DivergedError(
                f"{self._in_a_row} steps in a row were skipped, the last of them step "
                f"{step.number}: {what}. The parameters are still those after step "
                f"{step.number - self._in_a_row}. In step {step.number}\n" + "\n".join(lines)
            )


def _names_of_all(batch: Mapping[str, Any]) -> list[str]:
    """Names of the samples of all processes, in their order."""
    size = len(next(iter(batch.values())))
    names = list(batch.get(SAMPLE_NAMES, ["a sample without a name"] * size))
    if jax.process_count() == 1:
        return [str(name) for name in names]
    encoded = np.zeros((size, _NAME_BYTES), np.uint8)
    for row, name in zip(encoded, names, strict=True):
        # The end of a path tells more than its beginning.
        code = np.frombuffer(str(name).encode("utf-8", "replace")[-_NAME_BYTES:], np.uint8)
        row[: len(code)] = code
    gathered = multihost_utils.process_allgather(encoded).reshape(-1, _NAME_BYTES)
    return [row.tobytes().rstrip(b"\0").decode("utf-8", "replace") for row in gathered]
