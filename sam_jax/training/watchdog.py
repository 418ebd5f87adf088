"""A watchdog: an end, with a message, for a run that waits for what does not come."""

import contextlib
import dataclasses
import faulthandler
import threading
import time
from collections.abc import Iterator

import jax

from sam_jax.errors import TRY_AGAIN, end_now

# A process that uses this share of a core is at work.
_WORKING_RATE = 0.1
_LONGEST_NAP_SECONDS = 5.0


@dataclasses.dataclass
class Activity:
    """Occupation of the main thread.

    Attributes:
      what: as in "waiting for data".
      may_work: whether the time that this process computes does not count.
      since: when it began, or computed last, on the monotonic clock.
      looked_at: when it was looked at last.
      cpu_seconds: processor time of this process until then.
    """

    what: str
    may_work: bool
    since: float
    looked_at: float
    cpu_seconds: float

    @classmethod
    def now(cls, what: str, may_work: bool) -> "Activity":
        """One that begins."""
        now = time.monotonic()
        return cls(what, may_work, now, now, time.process_time())

    def seconds_stuck(self, now: float, cpu_seconds: float) -> float:
        """Seconds for which it has been waited for."""
        worked, elapsed = cpu_seconds - self.cpu_seconds, now - self.looked_at
        if self.may_work and worked > _WORKING_RATE * elapsed:
            self.since = now
        self.looked_at, self.cpu_seconds = now, cpu_seconds
        return now - self.since


class Watchdog:
    """Ends the process if one thing takes too long, whatever the main thread hangs in.

    No exception reaches a thread that waits for storage or for another host, so a thread of its own
    looks at the clock, prints what every thread is at, and ends the process.

    Args:
      limit_seconds: how long a thing may take; None for ever.
    """

    def __init__(self, limit_seconds: float | None):
        self._limit = limit_seconds
        self._activity: Activity | None = None
        self._is_closed = threading.Event()
        if limit_seconds is not None:
            nap = min(limit_seconds / 10, _LONGEST_NAP_SECONDS)
            threading.Thread(target=self._watch, args=(nap,), name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def during(self, what: str, *, may_work: bool = False) -> Iterator[None]:
        """A block that must not take longer.

        Args:
          what: is done, as in "waiting for data".
          may_work: whether it may take as long as it likes while this process computes.
        """
        outer = self._activity
        self._activity = Activity.now(what, may_work)
        try:
            yield
        finally:
            self._activity = outer

    def close(self) -> None:
        """Stops watching."""
        self._is_closed.set()

    def _watch(self, nap: float) -> None:
        assert self._limit is not None
        while not self._is_closed.wait(nap):
            activity = self._activity
            if activity is None:
                continue
            seconds = activity.seconds_stuck(time.monotonic(), time.process_time())
            if seconds > self._limit:
                faulthandler.dump_traceback(all_threads=True)
                end_now(
                    f"process {jax.process_index()} of {jax.process_count()} has been "
                    f"{activity.what} for {seconds:.0f} seconds; above is where each "
                    "of its threads was. Storage that does not answer or another host that is "
                    "frozen does that. If so long is in order, train.max_stall_seconds is the "
                    "limit. The same command continues from the newest checkpoint",
                    TRY_AGAIN,
                )
