"""Seconds of compiled functions and of calls."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times and memory of a measured function.

    Attributes:
      seconds: duration of each call after the warm-up.
      compile_seconds: tracing and compiling, None where nothing is compiled.
      planned_bytes: memory of one device that the compiler sets aside for arguments, results and
        what lies between, None if it does not say.
      peak_bytes: most memory in use on a device so far, None if the backend does not say.
    """

    seconds: Sequence[float]
    compile_seconds: float | None = None
    planned_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def best(self) -> float:
        """The fastest call: what the hardware does when nothing else disturbs it."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle of all calls."""
        return statistics.median(self.seconds)


def time_calls(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of ``repeats`` calls, each until its result is there, after one that warms up."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def compile_for(jitted: Any, *args: Any) -> tuple[Any, float]:
    """The function compiled for these arguments, and the seconds it took."""
    start = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    return compiled, time.perf_counter() - start


def time_compiled(
    compiled: Any, call: Callable[[], Any], *, compile_seconds: float, repeats: int
) -> Timing:
    """Timing of ``call``, which runs ``compiled`` once."""
    seconds = time_calls(call, repeats)
    planned = compiled.memory_analysis()
    stats = jax.devices()[0].memory_stats()
    return Timing(
        seconds,
        compile_seconds,
        planned
        and planned.argument_size_in_bytes
        + planned.output_size_in_bytes
        - planned.alias_size_in_bytes
        + planned.temp_size_in_bytes,
        stats and stats.get("peak_bytes_in_use"),
    )
