"""A run that waits for what does not come ends, and says what it waited for."""

import subprocess
import sys

import pytest

from sam_jax.configuration import from_mapping
from sam_jax.errors import TRY_AGAIN, ConfigError
from sam_jax.training.experiment import TrainConfig
from sam_jax.training.watchdog import Activity

STUCK = """
import threading
from sam_jax.training.watchdog import Watchdog

watchdog = Watchdog(0.2)
with watchdog.during("computing"):
    with watchdog.during("waiting for data"):
        def read_what_never_comes():
            threading.Event().wait()
        read_what_never_comes()
"""


def test_a_process_that_is_stuck_ends_and_says_where() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == TRY_AGAIN == 75
    assert "error: process 0 of 1 has been waiting for data for 0 seconds" in ended.stderr
    assert "in read_what_never_comes" in ended.stderr
    assert "train.max_stall_seconds is the limit" in ended.stderr


def test_what_is_computed_is_not_waited_for() -> None:
    compiling = Activity("compiling", True, since=0.0, looked_at=0.0, cpu_seconds=7.0)
    assert compiling.seconds_stuck(now=10.0, cpu_seconds=15.0) == 0
    assert compiling.seconds_stuck(now=20.0, cpu_seconds=15.5) == 10
    assert compiling.seconds_stuck(now=30.0, cpu_seconds=15.6) == 20
    assert compiling.seconds_stuck(now=40.0, cpu_seconds=19.0) == 0
    saving = Activity("saving", False, since=0.0, looked_at=0.0, cpu_seconds=7.0)
    assert saving.seconds_stuck(now=10.0, cpu_seconds=15.0) == 10


def test_a_limit_of_no_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_stall_seconds must be positive, got 0"):
        from_mapping(TrainConfig, {"num_steps": 3, "max_stall_seconds": 0}, "train")
