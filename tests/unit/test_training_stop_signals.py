"""Signals that stop a run: at any moment, with all of it saved, and an exit code of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from sam_jax.checkpoint import CheckpointConfig, restore_variables
from sam_jax.training import loop
from sam_jax.training.agreement import StopAgreement
from sam_jax.training.experiment import TrainConfig
from sam_jax.training.stop_signals import StopSignals
from tests.unit.test_training_best import Report
from tests.unit.test_training_task import MeanColor, Pixels, toy_step

SECONDS = 60


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


class Ends:
    """The end of the process, which only takes note of it, and of what there is in a folder."""

    def __init__(self, workdir: Path | None = None):
        self.was_told = threading.Event()
        self.said: list[tuple[str, int]] = []
        self.saved: list[int] = []
        self._workdir = workdir

    def __call__(self, message: str, exit_code: int) -> None:
        if self._workdir is not None:
            self.saved = checkpoints(self._workdir)
        self.said.append((message, exit_code))
        self.was_told.set()

    def wait(self) -> tuple[str, int]:
        assert self.was_told.wait(SECONDS)
        self.was_told.clear()
        return self.said.pop(0)


@contextlib.contextmanager
def caught(workdir: Path | None = None) -> Iterator[tuple[StopSignals, Ends]]:
    """Signals of this process."""
    ends = Ends(workdir)
    with contextlib.closing(StopSignals(catches=True, end=ends)) as signals:
        yield signals, ends


def send(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


# A mutex that its owner locks again: no signal brings a thread back from that.
BLOCKED = """
import ctypes
from sam_jax.training.stop_signals import StopSignals

signals = StopSignals(catches=True)
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
print("ready", flush=True)
lock(mutex)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_process_that_waits_in_foreign_code_ends_at_once(
    number: signal.Signals, code: int
) -> None:
    """As in XLA's compiler, where Python's handlers do not run."""
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == code
    assert said == (
        f"error: stopped by {number.name} while it started, with nothing to save; the same "
        "command continues\n"
    )


def test_a_process_that_nobody_reads_ends_all_the_same() -> None:
    """As ``train.py 2>&1 | tee log``, where Ctrl-C ends tee first."""
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=SECONDS) == 75


def catches(pid: int, number: signal.Signals) -> bool:
    """True once a process has a handler of a signal, as the system says."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_run_is_stopped_while_it_imports() -> None:
    """JAX and the others take seconds, on some file systems minutes."""
    program = Path(__file__).parents[2] / "train.py"
    with subprocess.Popen([sys.executable, str(program)], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + SECONDS
        while not catches(process.pid, signal.SIGTERM) and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, said
    assert said.startswith(b"error: stopped by SIGTERM while it started")


def test_what_is_collected_waits_and_a_second_one_does_not() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with caught() as (signals, ends):
        signals.collect()
        send()
        send(signal.SIGINT)
        assert signals.received == [signal.SIGTERM, signal.SIGINT]
        assert not ends.was_told.wait(0.1)
        send()
        message, code = ends.wait()
        assert message.startswith("stopped at once by a second SIGTERM")
        assert code == 75
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_what_came_before_a_block_without_anything_to_save_ends_it() -> None:
    with caught() as (signals, ends):
        signals.collect()
        send(signal.SIGINT)
        with signals.at_once("while drawing", lambda: None):
            assert ends.wait() == (
                "stopped by SIGINT while drawing; the same command continues",
                130,
            )


def test_whose_handlers_are_others_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    signals = StopSignals()
    signals.collect()
    with signals.at_once("here", lambda: None):
        assert signal.getsignal(signal.SIGTERM) is before


class Interrupted:
    """An evaluator that is sent a signal in its first call, and waits for its end."""

    def __init__(self, ends: Ends):
        self._ends = ends
        self.said: tuple[str, int] | None = None

    def __call__(self, variables: dict) -> Report:
        if self.said is None:
            send()
            self.said = self._ends.wait()
            raise StopIteration
        return Report(float(np.sum(variables["params"]["color"])))


def train(
    workdir: Path, signals: StopSignals | None, evaluate: Any, data: Pixels, **options: Any
) -> Any:
    return loop.train(
        workdir=workdir,
        compiled_step=toy_step(MeanColor(), 8),
        config=TrainConfig(8, log_every=10, **{"eval_every": 4} | options),
        batch_size=8,
        data_iterator=data,
        checkpoint_config=CheckpointConfig(every_steps=100),
        evaluators={"val": evaluate},
        stop_signals=signals,
    )


def test_an_evaluation_is_cut_short_after_its_step_is_saved_and_made_again(tmp_path: Path) -> None:
    """No checkpoint is due there: it is made for the evaluation."""
    with caught(tmp_path) as (signals, ends):
        evaluate = Interrupted(ends)
        with pytest.raises(StopIteration):
            train(tmp_path, signals, evaluate, Pixels())
        where = "in the evaluation of step 4, which is saved"
        # Written to its end when the process ended.
        assert ends.saved == [4]
        assert evaluate.said == (
            f"stopped by SIGTERM {where}; the same command continues",
            75,
        )
    with caught() as (signals, _):
        state = train(tmp_path, signals, evaluate, Pixels())
    assert int(state.step) == 8
    figures = [
        line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "val" in line
    ]
    assert ['"step": 4' in figures[0], '"step": 8' in figures[1]] == [True, True]

    # As a run that was left alone.
    with caught() as (signals, _):
        other = train(tmp_path / "straight", signals, evaluate, Pixels())
    np.testing.assert_array_equal(state.params["color"], other.params["color"])


def test_an_evaluation_before_the_first_step_is_left_at_once(tmp_path: Path) -> None:
    with caught() as (signals, ends):
        evaluate = Interrupted(ends)
        with pytest.raises(StopIteration):
            train(tmp_path, signals, evaluate, Pixels(), eval_before=True)
    assert evaluate.said is not None
    assert "while it started, with nothing to save" in evaluate.said[0]


class Sending(Pixels):
    """Pixels whose batch of a number comes with a signal."""

    def __init__(self, batch: int, number: signal.Signals):
        super().__init__()
        self._batch, self._number = batch, number

    def __next__(self) -> dict[str, np.ndarray]:
        found = super().__next__()
        if self.position == self._batch:
            send(self._number)
        return found


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGTERM, loop.PreemptedError), (signal.SIGINT, loop.TrainingInterruptedError)],
)
def test_steps_are_saved_first(tmp_path: Path, number: signal.Signals, kind: Any) -> None:
    # The fourth is a step that is evaluated, which is owed then.
    for batch in (3, 4):
        with (
            caught() as (signals, ends),
            pytest.raises(kind, match=rf"at step {batch} of 8 by {number.name}; the same") as error,
        ):
            train(tmp_path / str(batch), signals, Interrupted(ends), Sending(batch, number))
        assert error.value.exit_code == (75 if number == signal.SIGTERM else 130)
        assert checkpoints(tmp_path / str(batch)) == [batch]
        restore_variables(tmp_path / str(batch))


def test_a_program_of_somebody_elses_is_stopped_after_a_step(tmp_path: Path) -> None:
    """As a notebook, which gives no signals of its own and keeps its handlers."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(loop.TrainingInterruptedError, match="at step 3 of 8 by SIGINT"):
        train(tmp_path, None, lambda variables: Report(0.0), Sending(3, signal.SIGINT))
    assert checkpoints(tmp_path) == [3]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


class Hosts:
    """Two processes with clocks of their own, as they would agree."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seconds = [0.0, 0.0]
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        clock = SimpleNamespace(monotonic=self._now)
        monkeypatch.setattr("sam_jax.training.agreement.time", clock)
        self.agreements = [StopAgreement(0), StopAgreement(0)]

    def _now(self) -> float:
        return self.seconds[threading.current_thread().name == "1"]

    def step(self, number: int, received: list[list[int]], is_due: bool = False) -> list[int]:
        """What both find after a step, in threads of their own; -1 where they did not exchange.

        One that asked alone would wait for the other for ever.
        """
        barrier = threading.Barrier(2)
        told: dict[int, np.ndarray] = {}

        def exchanged(mine: np.ndarray) -> np.ndarray:
            told[int(threading.current_thread().name)] = mine
            barrier.wait(SECONDS)
            return np.stack([told[0], told[1]])

        self._monkeypatch.setattr(multihost_utils, "process_allgather", exchanged)
        found = [0, 0]

        def ask(process: int) -> None:
            found[process] = self.agreements[process].agreed(
                number, received[process], is_due=is_due
            )

        asking = [threading.Thread(target=ask, args=(n,), name=str(n)) for n in (0, 1)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        return found if told else [-1, -1]


def test_hosts_agree_every_few_seconds_at_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = Hosts(monkeypatch)
    nothing: list[list[int]] = [[], []]

    def agreements(numbers: range, seconds: float) -> list[int]:
        found = []
        for number in numbers:
            # The second one's clock is another, which must not matter.
            hosts.seconds = [hosts.seconds[0] + seconds, hosts.seconds[1] + 7 * seconds]
            if hosts.step(number, nothing)[0] >= 0:
                found.append(number)
        return found

    # The first step is compiled; short steps have an exchange as seldom as every ten.
    assert agreements(range(1, 2), 60.0) == [1]
    assert agreements(range(2, 40), 0.01) == [2, 12, 22, 32]
    # Long ones every three seconds, or each.
    assert agreements(range(40, 60), 1.0) == [42, 45, 48, 51, 54, 57]
    assert agreements(range(60, 64), 20.0) == [60, 61, 62, 63]
    agreements(range(64, 67), 0.1)
    # One was preempted, which both know at the next exchange, or where a checkpoint is due.
    preempted = [[], [int(signal.SIGTERM)]]
    assert hosts.step(67, preempted) == [-1, -1]
    assert hosts.step(68, preempted, is_due=True) == [signal.SIGTERM] * 2
    both = [[int(signal.SIGINT)], [int(signal.SIGTERM)]]
    assert hosts.step(69, both, is_due=True) == [signal.SIGINT] * 2
