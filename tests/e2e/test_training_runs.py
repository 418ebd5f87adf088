"""Whole runs of train.py and eval.py: killed and resumed, on data in buckets, evaluated."""

import json
import resource
import signal
from pathlib import Path

import pytest

from benchmarks import object_store
from tests.e2e import soak
from tests.e2e.programs import (
    ONE_ROUND,
    PRETRAINING,
    Program,
    logged,
    run,
    runner_limit,
    saved_steps,
    start,
)
from tests.unit.data_fixtures import sa1b_files, write_tar

pytestmark = runner_limit

NO_EVALS = "--config.train.eval_every=0"


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tars as SA-1B has them, of 14 images."""
    folder = tmp_path_factory.mktemp("tars")
    for tar in range(2):
        write_tar(folder / f"sa_{tar}.tar", sa1b_files(range(7 * tar, 7 * tar + 7)))
    return folder


@pytest.fixture(scope="module")
def straight(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of pre-training on them from the first step to the last.

    Of pre-training, which is compiled sooner; `python -m tests.e2e.soak` has prompts.
    """
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    flags = ("--workdir", str(workdir), *soak.RARE, NO_EVALS)
    run("train.py", *flags, config=f"{PRETRAINING}:{tars}")
    return workdir


def fill_the_disk(process: Program, workdir: Path) -> None:
    """Lets a run write no file as large as the largest of a checkpoint, which the system refuses.

    It refuses so what a full disk has no room for; to fill one takes the rights to mount it.
    """
    files = [path for path in (workdir / "checkpoints").rglob("*") if path.is_file()]
    largest = max(path.stat().st_size for path in files)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest // 2, resource.RLIM_INFINITY))


def test_killed_and_preempted_runs_end_bit_for_bit_where_a_straight_one_does(
    straight: Path, tars: Path, tmp_path: Path
) -> None:
    """SIGTERM at the start, SIGKILL in a checkpoint, no room on the disk, SIGTERM in the steps.

    A worker reads when the run is killed. `python -m tests.e2e.soak` has kills at any moment.
    """
    workdir, config = tmp_path / "killed", f"{PRETRAINING}:{tars}"
    flags = ("--workdir", str(workdir), *soak.OFTEN, NO_EVALS)
    with start("train.py", *flags, config=config) as process:
        process.wait_for_line("0.0 M parameters on 1 cpu device(s)")
        process.send(signal.SIGTERM)
        output = process.end(75)
    assert "error: stopped by SIGTERM while it started, with nothing to save" in output
    assert saved_steps(workdir) == []

    with start("train.py", *flags, "--config.data.num_workers=1", config=config) as process:
        process.wait_until("a checkpoint", lambda: saved_steps(workdir) != [])
        process.wait_until("a write", lambda: soak.is_writing(workdir), naps=0.0005)
        workers = process.children
        assert len(workers) > 0
        process.send(signal.SIGKILL)
        process.end(-signal.SIGKILL)
        for worker in workers:
            process.wait_for_end_of(worker)
    killed_at = saved_steps(workdir)[-1]

    with start("train.py", *flags, config=config) as process:
        process.wait_for_line(f"continuing from the checkpoint of step {killed_at}")
        fill_the_disk(process, workdir)
        output = process.end(1)
    checkpoints = workdir / "checkpoints"
    assert f"error: a checkpoint could not be written to {checkpoints}: " in output
    again = "Once that is mended, the same command continues"
    assert f"File too large; the newest whole one: step {killed_at}. {again}" in output
    # Threads of Orbax and TensorStore have nothing to add.
    assert "Traceback" not in output
    assert saved_steps(workdir)[-1] == killed_at

    with start("train.py", *flags, config=config) as process:
        process.wait_for_line(f"step {killed_at + 2}/")
        process.send(signal.SIGTERM)
        output = process.end(75)
    assert f"continuing from the checkpoint of step {killed_at}" in output
    assert "by SIGTERM; the same command continues" in output
    stopped_at = saved_steps(workdir)[-1]
    assert stopped_at >= killed_at + 2

    output = run("train.py", *flags, config=config)
    assert f"continuing from the checkpoint of step {stopped_at}" in output
    assert not soak.is_writing(workdir)
    soak.assert_same_end(straight, workdir)


@pytest.mark.filterwarnings(
    # botocore's own.
    "ignore:datetime.datetime.utcnow:DeprecationWarning"
)
def test_a_run_over_dropped_connections_ends_bit_for_bit_where_one_from_a_disk_does(
    straight: Path, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten connections are reset, some as soon as the tars are scanned; samples are counted once."""
    pytest.importorskip("s3fs", reason="buckets need the extra s3")
    pytest.importorskip("moto", reason="the tests' S3 server is moto")
    # For indices of tars in buckets.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ("--workdir", str(tmp_path / "run"), *soak.RARE, NO_EVALS)
    with object_store.serve(tmp_path) as connection:
        object_store.fill("data", {tar.name: tar for tar in tars.glob("*.tar")})
        with start("train.py", *flags, config=f"{PRETRAINING}:s3://data") as process:
            for number in range(5):
                connection.num_drops = 1
                process.wait_until("a drop", lambda n=number: connection.num_dropped > n)
                # So that it is not always the same request, which is given up after some attempts.
                process.nap(0.1)
            process.wait_for_line("step 1/")
            connection.num_drops = 5
            process.end()
        assert connection.num_dropped == 10
    soak.assert_same_end(straight, tmp_path / "run")
    # Ten steps of eight.
    assert soak.data_manifest(tmp_path / "run")["samples_read"] == 80


def test_eval_reproduces_the_numbers_of_the_training_loop(tmp_path: Path) -> None:
    workdir, out = tmp_path / "run", tmp_path / "out"
    output = run("train.py", "--workdir", str(workdir), *soak.RARE, *ONE_ROUND)
    assert "evaluation shapes at step 10" in output

    run("eval.py", "--checkpoint", str(workdir), "--out", str(out))
    report = json.loads((out / "shapes" / "report.json").read_text())
    in_loop = {
        tag.removeprefix("eval/shapes/"): values[10]
        for tag, values in logged(workdir).items()
        if tag.startswith("eval/shapes/")
    }
    assert in_loop
    assert report["datasets"]["synthetic"]["miou"]["box"] == pytest.approx(
        in_loop["synthetic/box"], abs=1e-6
    )
    assert report["mean"]["center_2"] == pytest.approx(in_loop["mean/center_2"], abs=1e-6)


@pytest.mark.parametrize(
    ("program", "flags", "messages"),
    [
        ("train.py", ("--workdir=x", "--config.train.num_stepz=3"), ("num_stepz", "num_steps")),
        ("eval.py", ("--checkpoint=nothing",), ("does not exist",)),
        ("train.py", ("--workdir=x", "--distributed"), ("the other processes were not found",)),
    ],
)
def test_what_is_wrong_is_named_without_a_traceback(program, flags, messages):
    with start(program, *flags) as process:
        output = process.end(1)
    for message in messages:
        assert message in output
    assert "Traceback" not in output
