"""Whole runs of train.py and eval.py: killed and resumed, sharded, evaluated."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from sam_jax.checkpoint import restore_variables
from tests.e2e.programs import logged, run, start

EMA = "--config.train.ema_decay=0.7"


def assert_same_parameters(first: Path, second: Path) -> None:
    trained = [restore_variables(run, ema=False) for run in (first, second)]
    averaged = [restore_variables(run) for run in (first, second)]
    for found in (trained, averaged):
        jax.tree.map(np.testing.assert_array_equal, *found)
    ours, theirs = (jax.tree.leaves(found[0]["params"]) for found in (trained, averaged))
    assert any(not np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory) -> Path:
    """Ten steps without interruption on one device, parameters averaged."""
    workdir = tmp_path_factory.mktemp("straight")
    run("train.py", "--workdir", str(workdir), EMA)
    return workdir


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start`, whose processes end with the test at the latest."""
    processes = []

    def start_and_remember(*flags: str) -> subprocess.Popen[str]:
        processes.append(start(*flags))
        return processes[-1]

    yield start_and_remember
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


def test_killed_runs_end_up_bit_for_bit_where_a_straight_one_does(started, straight_run, tmp_path):
    """SIGKILL after the second and after a later checkpoint, at whatever the run is doing then."""
    for checkpoints_to_wait_for in (2, 5):
        process = started("train.py", "--workdir", str(tmp_path), EMA)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            steps = [int(p.name) for p in (tmp_path / "checkpoints").glob("*") if p.name.isdigit()]
            if steps and max(steps) >= checkpoints_to_wait_for:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, f"finished before it was killed: {output}"
    output = run("train.py", "--workdir", str(tmp_path), EMA)
    assert "continuing from the checkpoint of step" in output
    assert_same_parameters(straight_run, tmp_path)


def test_an_interrupted_run_saves_where_it_is(started, tmp_path):
    flags = ("--workdir", str(tmp_path), "--config.checkpoint.every_steps=1000")
    process = started("train.py", *flags, "--config.train.num_steps=100000")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "the same command continues" in output
    (step,) = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert step >= 5


@pytest.mark.parametrize(
    "flags",
    [
        ("--config.sharding.data=8",),
        ("--config.sharding.data=2", "--config.sharding.fsdp=4"),
    ],
    ids=["data-parallel", "fsdp"],
)
def test_eight_devices_agree_with_one(straight_run, tmp_path, flags):
    run("train.py", "--workdir", str(tmp_path), *flags, devices=8)
    one, eight = logged(straight_run), logged(tmp_path)
    # A pixel whose logit rounds to the other side of zero moves a click, so runs part for good
    # sooner or later; the first five steps have had no time for it.
    for tag in ("train/loss", "train/gradient_norm", "train/iou_round_01"):
        assert eight[tag][5] == pytest.approx(one[tag][5], rel=5e-3, abs=1e-3), tag


def test_eval_reproduces_the_numbers_of_the_training_loop(straight_run, tmp_path):
    run("eval.py", "--checkpoint", str(straight_run), "--out", str(tmp_path))
    report = json.loads((tmp_path / "shapes" / "report.json").read_text())
    in_loop = {
        tag.removeprefix("eval/shapes/"): values[10]
        for tag, values in logged(straight_run).items()
        if tag.startswith("eval/shapes/")
    }
    assert in_loop
    assert report["datasets"]["synthetic"]["miou"]["box"] == pytest.approx(
        in_loop["synthetic/box"], abs=1e-6
    )
    assert report["mean"]["center_2"] == pytest.approx(in_loop["mean/center_2"], abs=1e-6)


def test_a_typo_in_a_flag_is_named(started, tmp_path):
    process = started("train.py", "--workdir", str(tmp_path), "--config.train.num_stepz=3")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "num_stepz" in output
    assert "num_steps" in output


def test_a_missing_checkpoint_is_named(started, tmp_path):
    process = started("eval.py", "--checkpoint", str(tmp_path / "nothing"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "does not exist" in output
    assert "Traceback" not in output
