"""Programs as users start them, and what they leave behind."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e import tiny_run

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("tiny_run.py")
# What is compiled sooner, for tests that ask no more of a run than that it trains.
PRETRAINING = Path(__file__).with_name("tiny_pretraining.py")
# A few steps of a tiny model: compiling them well would take longer than running them.
COMPILED_QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
# For runs of segmentation of which no more is asked than that they train.
ONE_ROUND = tuple(f"--config.{setting}" for setting in tiny_run.ONE_ROUND)

# How long a test waits for one thing, on a machine that is busy with others.
WAIT_SECONDS = 300
# How many it may wait for. Each says what it was, so pytest must not end the test before.
MOST_WAITS = 8
runner_limit = pytest.mark.timeout((MOST_WAITS + 1) * WAIT_SECONDS)


class Program:
    """A command in the background, which ends with its ``with`` block at the latest."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self._folder = tempfile.TemporaryDirectory(prefix="output-")
        self._log = Path(self._folder.name) / "log"
        self._command = command
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                env=os.environ | dict(environment or {}),
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    @property
    def output(self) -> str:
        """Output that it has printed so far."""
        return self._log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Number of its process."""
        return self._process.pid

    @property
    def children(self) -> list[int]:
        """Processes that it has started, where the system tells."""
        # By the threads that started them.
        found = []
        for path in Path(f"/proc/{self.pid}/task").glob("*/children"):
            # A thread may end in between.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += [int(pid) for pid in path.read_text().split()]
        return found

    def wait_for_end_of(self, pid: int) -> None:
        """Waits until a process that it had started is gone."""
        deadline = time.monotonic() + WAIT_SECONDS
        while is_running(pid):
            if time.monotonic() > deadline:
                pytest.fail(f"process {pid} is still there; it was started by {self}")
            self.nap(0.05)

    def nap(self, seconds: float) -> None:
        """Lets it run for a while."""
        time.sleep(seconds)

    def wait_until(
        self,
        what: str,
        is_so: Callable[[], bool],
        seconds: float = WAIT_SECONDS,
        naps: float = 0.02,
    ) -> None:
        """Waits while it runs; fails, with what it printed, if it ends or time is up before."""
        deadline = time.monotonic() + seconds
        while not is_so():
            has_ended = self._process.poll() is not None
            if has_ended and not is_so():
                pytest.fail(f"{self} ended with {self._process.returncode} before {what}")
            if time.monotonic() > deadline:
                pytest.fail(f"{self} has not come to {what} in {seconds} seconds")
            time.sleep(naps)

    def wait_for_line(self, start: str) -> None:
        """Waits until it prints a line that starts so."""
        self.wait_until(f"a line {start!r}", lambda: f"\n{start}" in f"\n{self.output}")

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        self._process.send_signal(number)

    def end(self, code: int = 0, seconds: float = WAIT_SECONDS) -> str:
        """Output of the program, once it has ended by itself with this code."""
        self._wait_for_end(seconds)
        assert self._process.returncode == code, f"{self} ended with {self._process.returncode}"
        return self.output

    def fail(self, seconds: float = WAIT_SECONDS) -> str:
        """Output of the program, once it has ended by itself with any code that says it failed."""
        self._wait_for_end(seconds)
        assert self._process.returncode != 0, f"{self} ended well"
        return self.output

    def _wait_for_end(self, seconds: float) -> None:
        self.wait_until("its end", lambda: self._process.poll() is not None, seconds)

    def __str__(self) -> str:
        return f"{' '.join(self._command)}\n{self.output}\nwhich"


def is_running(pid: int) -> bool:
    """True unless a process has ended; one that nobody has asked about is still listed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def start(program: str, *flags: str, devices: int = 1, config: Path | str = CONFIG) -> Program:
    """A program of the repository with a tiny config, on a CPU that poses as so many devices."""
    environment = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {COMPILED_QUICKLY}",
        "PYTHONPATH": str(ROOT),
        # A run that is started again compiles nothing again.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    command = [str(ROOT / program), "--config", str(config), *flags]
    if any(flag.startswith("--process=") for flag in flags):
        environment["JAX_SHARE_BINARY_BETWEEN_HOSTS"] = "true"
        command.insert(0, str(Path(__file__).with_name("of_several.py")))
    return Program([sys.executable, *command], environment)


def run(program: str, *flags: str, devices: int = 1, config: Path | str = CONFIG) -> str:
    """Output of a program, once it has ended well."""
    with start(program, *flags, devices=devices, config=config) as process:
        return process.end()


def saved_steps(workdir: Path) -> list[int]:
    """Steps of which a run has a checkpoint."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def logged(workdir: Path) -> dict[str, dict[int, float]]:
    """Values that a run wrote to TensorBoard, by tag and step."""
    events = EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }
