"""Runs of two processes over the loopback, as runs of two hosts are."""

import contextlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from sam_jax.checkpoint import restore_variables
from tests.e2e.programs import logged, run, start

SHARDED = ("--config.sharding.data=2", "--config.sharding.fsdp=4", "--config.train.log_every=1")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def two_processes(*flags: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Both with half of the eight devices; they end with the block at the latest."""
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    processes = [
        start("train.py", coordinator, f"--process={index}/2", *flags, devices=4)
        for index in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def outputs_of(processes: list[subprocess.Popen[str]], timeout: float) -> list[str]:
    """What both print until they end, read at the same time, as neither may wait for a reader."""
    outputs = [""] * len(processes)

    def read(index: int) -> None:
        outputs[index] = processes[index].communicate(timeout=timeout)[0]

    readers = [threading.Thread(target=read, args=(i,)) for i in range(len(processes))]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return outputs


def run_two_processes(*flags: str) -> list[str]:
    with two_processes(*flags) as processes:
        outputs = outputs_of(processes, timeout=600)
        assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs


@pytest.fixture(scope="module")
def one_process_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps on eight devices of one process."""
    workdir = tmp_path_factory.mktemp("one")
    run("train.py", "--workdir", str(workdir), *SHARDED, devices=8)
    return workdir


def assert_close_parameters(first: Path, second: Path, step: int) -> None:
    """All but biases of keys: softmax does not see them, so Adam makes steps of their rounding."""
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(restore_variables(first, step)),
        jax.tree.leaves(restore_variables(second, step)),
        strict=True,
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("k_proj/bias"):
            continue
        if name.endswith("qkv/bias"):
            ours, theirs = (np.delete(np.reshape(x, (3, -1)), 1, axis=0) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=name)


def test_two_processes_do_what_one_does_and_another_number_continues(
    one_process_run: Path, tmp_path: Path
) -> None:
    flags = ("--workdir", str(tmp_path), *SHARDED)
    first, second = run_two_processes(*flags, "--config.train.num_steps=5")
    assert "8 cpu device(s) of 2 process(es), data 2 x fsdp 4 x tensor 1" in first
    assert "step 5/5" in first
    # The other one has nothing to say.
    assert "step" not in second
    assert "data 2" not in second

    output = run("train.py", *flags, devices=8)
    assert "continuing from the checkpoint of step 5" in output
    two, one = logged(tmp_path), logged(one_process_run)
    for tag in ("train/loss", "train/gradient_norm", "train/iou_round_01"):
        steps = sorted(one[tag])
        assert steps == sorted(two[tag])
        np.testing.assert_allclose(
            [two[tag][s] for s in steps], [one[tag][s] for s in steps], rtol=1e-5, err_msg=tag
        )
    assert_close_parameters(tmp_path, one_process_run, 10)


def test_one_killed_process_ends_the_other_and_both_resume(tmp_path: Path) -> None:
    flags = ("--workdir", str(tmp_path), *SHARDED)
    with two_processes(*flags, "--config.train.num_steps=100000") as (first, second):
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith("step 3/"):
                break
        second.send_signal(signal.SIGKILL)
        start_of_wait = time.monotonic()
        output = outputs_of([first], timeout=60)[0]
        assert time.monotonic() - start_of_wait < 60
        assert first.returncode != 0
        assert "another" in output, output
        assert "Traceback" not in output

    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    output, _ = run_two_processes(*flags, f"--config.train.num_steps={max(steps) + 2}")
    assert f"continuing from the checkpoint of step {max(steps)}" in output
    assert f"step {max(steps) + 2}/{max(steps) + 2}" in output


def test_an_interrupted_process_stops_both_where_they_are(tmp_path: Path) -> None:
    flags = ("--workdir", str(tmp_path), *SHARDED, "--config.checkpoint.every_steps=100000")
    with two_processes(*flags, "--config.train.num_steps=100000") as processes:
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            if line.startswith("step 3/"):
                break
        processes[1].send_signal(signal.SIGTERM)
        outputs = outputs_of(processes, timeout=120)
        assert [process.returncode for process in processes] == [130, 130], outputs
    assert "the same command continues" in outputs[0]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--coordinator=127.0.0.1:1",), "come together"),
        (("--coordinator=127.0.0.1:1", "--process=2/2"), "expected I/N"),
        (("--distributed",), "the other processes were not found"),
    ],
)
def test_what_is_missing_is_named(flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with start("train.py", "--workdir", str(tmp_path), *flags) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert message in output
    assert "Traceback" not in output
