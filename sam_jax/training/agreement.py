"""The agreement of all processes on a signal: they must stop after the same step."""

import signal
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

# Between agreements, as schedulers kill what has not saved within seconds.
_SECONDS_BETWEEN = 3.0
# An agreement waits for the step before it, so short steps have one as seldom as that.
_MOST_STEPS_BETWEEN = 10


class StopAgreement:
    """The signal that any of the processes got, known to all of them at the same step.

    They exchange what they got every few seconds. How many steps that is follows from the longest
    that the first process has seen since the last time, which it tells with the signals: all must
    count alike.

    Args:
      first_step: done before.
    """

    def __init__(self, first_step: int):
        self._next_step = first_step + 1
        self._time, self._longest_seconds = time.monotonic(), 0.0

    def agreed(self, step: int, received: Sequence[int], *, is_due: bool) -> int:
        """The signal to stop for after a step, 0 for none.

        Args:
          step: its number; all processes must ask for every step.
          received: signals that this process got.
          is_due: whether to agree at this step in any case; the same in all processes.
        """
        mine = max(received, default=0, key=lambda number: number == signal.SIGINT)
        if jax.process_count() == 1:
            return int(mine)
        now = time.monotonic()
        self._longest_seconds, self._time = max(self._longest_seconds, now - self._time), now
        if step < self._next_step and not is_due:
            return 0
        told = np.array([mine, self._longest_seconds], np.float32)
        of_all = multihost_utils.process_allgather(told).reshape(-1, 2)
        steps = _SECONDS_BETWEEN / max(float(of_all[0, 1]), 1e-3)
        self._longest_seconds = 0.0
        self._next_step = step + max(1, min(int(steps), _MOST_STEPS_BETWEEN))
        signals = of_all[:, 0].astype(int)
        return int(signal.SIGINT) if signal.SIGINT in signals else int(signals.max())
