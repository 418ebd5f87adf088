"""Copies of a run in a bucket: what is there at any moment, and that a run continues from it."""

import contextlib
import functools
import itertools
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import object_store
from sam_jax import buckets
from sam_jax.buckets import BucketError, BucketPath, UnreachableBucketError
from sam_jax.checkpoint import CheckpointConfig, restore_variables
from sam_jax.configuration import from_mapping
from sam_jax.errors import ConfigError
from sam_jax.training import checkpoint_copies, loop
from sam_jax.training.checkpoint_copies import CheckpointCopies, CopyError
from sam_jax.training.experiment import TrainConfig
from sam_jax.training.loop import PreemptedError
from sam_jax.training.stop_signals import StopSignals
from tests.unit.test_training_best import Report
from tests.unit.test_training_stop_signals import caught, checkpoints, send
from tests.unit.test_training_task import MeanColor, Pixels, toy_step

pytest.importorskip("s3fs", reason="buckets need the extra s3")
pytest.importorskip("moto", reason="the tests' S3 server is moto")
pytestmark = pytest.mark.filterwarnings(
    # botocore's own.
    "ignore:datetime.datetime.utcnow:DeprecationWarning"
)
SECONDS = 60
Train = Callable[..., str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object_store.Connection]:
    with object_store.serve(tmp_path_factory.mktemp("settings")) as connection:
        object_store.fill("runs", {"neighbour": b"of another"})
        yield connection


@pytest.fixture
def connection(
    server: object_store.Connection, monkeypatch: pytest.MonkeyPatch
) -> Iterator[object_store.Connection]:
    monkeypatch.setattr(buckets, "_FIRST_WAIT_SECONDS", 0.002)
    monkeypatch.setattr(buckets, "_ATTEMPTS", 4)
    monkeypatch.setattr(checkpoint_copies, "_LOOK_SECONDS", 0.01)
    yield server
    server.delay_seconds, server.num_drops, server.is_down = 0.0, 0, False


@pytest.fixture
def url(connection: object_store.Connection, request: pytest.FixtureRequest) -> BucketPath:
    return BucketPath(f"s3://runs/{request.node.name}")


@pytest.fixture(scope="module")
def step() -> Any:
    return toy_step(MeanColor(), 8)


@pytest.fixture
def train(tmp_path: Path, url: BucketPath, step: Any, capsys: Any) -> Train:
    def train(
        num_steps: int,
        *,
        workdir: Path = tmp_path / "run",
        every_steps: int = 1,
        watch: str | None = None,
        at_evaluation: Callable[[int], None] = lambda step: None,
        signals: StopSignals | None = None,
        **options: Any,
    ) -> str:
        """Trains up to a step, and gives what is said."""
        num_evaluations = itertools.count(1)

        def evaluate(variables: dict) -> Report:
            at_evaluation(next(num_evaluations))
            # Follows from the parameters, and goes up and down.
            return Report(float(np.sin(40 * np.sum(variables["params"]["color"]))))

        try:
            loop.train(
                workdir=workdir,
                compiled_step=step,
                config=TrainConfig(num_steps, log_every=4, eval_every=every_steps, watch=watch),
                batch_size=8,
                data_iterator=Pixels(),
                checkpoint_config=CheckpointConfig(
                    every_steps=every_steps, **{"keep": 2, "copy_to": str(url)} | options
                ),
                evaluators={"val": evaluate},
                sections={"what": "a toy"},
                stop_signals=signals,
            )
        except PreemptedError as error:
            sys.stderr.write(str(error))
        return " ".join(capsys.readouterr().err.split())

    return train


def in_bucket(url: BucketPath) -> list[int]:
    """Steps of the whole checkpoints."""
    return sorted(checkpoint_copies._whole_among(url.sizes_below(), "checkpoints"))


def color(workdir: Path) -> np.ndarray:
    return restore_variables(workdir)["params"]["color"]


def test_a_run_continues_where_its_folder_is_gone(
    train: Train, url: BucketPath, tmp_path: Path
) -> None:
    run, alone = tmp_path / "run", tmp_path / "alone"
    train = functools.partial(train, watch="val/mean/box")
    assert f"{url} has no whole checkpoint to copy back" in train(4)
    assert in_bucket(url) == checkpoints(run) == [3, 4]
    here = {name: stamp.size for name, stamp in checkpoint_copies._files(run).items()}
    # Best models have digests there, by which one tells that they are whole.
    there = url.sizes_below()
    (added,) = there.keys() - here.keys()
    assert added.startswith("best/checkpoints/")
    assert added.endswith("/digests.json")
    assert here.items() <= there.items()

    shutil.rmtree(run)
    said = train(8)
    assert f"checkpoint of step 4 were copied back from {url} to {run}" in said
    assert "continuing from the checkpoint of step 4" in said
    assert re.search(f"the checkpoint of step 8 is in {url}, copied in . s$", said)
    # Step 3 was not there to be removed.
    assert in_bucket(url) == checkpoints(run) == [7, 8]
    train(8, workdir=alone, copy_to=None)
    for folder in ("", "best"):
        np.testing.assert_array_equal(color(run / folder), color(alone / folder))
    assert (run / "evaluations.json").read_text() == (alone / "evaluations.json").read_text()
    assert (run / "metrics.jsonl").read_text().count("eval/val") == 8
    # The other end has them, too; of the best models only one.
    shutil.rmtree(run)
    assert "nothing is left to do" in train(8)
    np.testing.assert_array_equal(color(run / "best"), color(alone / "best"))
    best = checkpoint_copies._steps_among(url.sizes_below(), "best/checkpoints")
    assert sorted(best) == checkpoints(run / "best")


def test_checkpoints_that_are_kept_for_good_stay(
    train: Train, url: BucketPath, tmp_path: Path
) -> None:
    for num_steps in (2, 3, 5):
        train(num_steps, keep=1, keep_period=2)
        shutil.rmtree(tmp_path / "run")
    assert in_bucket(url) == [2, 4, 5]


@pytest.mark.parametrize("cut_at", ["digests.json"])
def test_a_copy_that_is_cut_short_leaves_the_one_before(
    train: Train, url: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_at: str
) -> None:
    train(2, every_steps=2)
    with monkeypatch.context() as patched:
        ask = BucketPath._ask

        def cut(path: BucketPath, request: str, *arguments: Any, **options: Any) -> Any:
            name = path.relative_to(url).as_posix()
            if request.startswith("p") and name.startswith(f"checkpoints/4/{cut_at}"):
                raise BucketError("cut")
            return ask(path, request, *arguments, **options)

        patched.setattr(BucketPath, "_ask", cut)
        said = train(4, every_steps=2)
    assert f"could not be copied to {url}: cut. The same command" in said
    assert any(name.startswith("checkpoints/4/") for name in url.sizes_below())
    assert in_bucket(url) == [2]
    kept = tmp_path / "kept"
    (tmp_path / "run").rename(kept)
    assert "checkpoint of step 2 were copied back" in train(4, every_steps=2)
    assert in_bucket(url) == [2, 4]
    np.testing.assert_array_equal(color(tmp_path / "run"), color(kept))
    # Of the other checkpoint of step 4 there is nothing left.
    assert {name for name in url.sizes_below() if name.startswith("checkpoints/4/")} == {
        name
        for name in checkpoint_copies._files(tmp_path / "run")
        if name.startswith("checkpoints/4/")
    }


def test_a_bucket_that_fails_is_said_and_the_run_goes_on(
    train: Train, url: BucketPath, tmp_path: Path, connection: object_store.Connection
) -> None:
    def fail(step: int) -> None:
        connection.is_down = step >= 2
        if step == 2:
            buckets.disconnect()

    said = train(4, at_evaluation=fail)
    assert "evaluation val at step 4" in said
    assert re.search(
        rf"could not be copied to {url}: s3://\S+ could not be \w+, tried 4 times: .*The same "
        rf"command, where {tmp_path}/run is, copies what is missing",
        said,
    )
    connection.is_down = False
    assert max(in_bucket(url), default=0) < 4
    said = train(4)
    assert "nothing is left to do" in said
    assert f"the checkpoint of step 4 is in {url}" in said
    assert in_bucket(url) == [3, 4]


def test_connections_may_drop(
    train: Train,
    url: BucketPath,
    tmp_path: Path,
    connection: object_store.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # They may all be of one request.
    monkeypatch.setattr(buckets, "_ATTEMPTS", 15)
    dropped = connection.num_dropped

    def drop(step: int) -> None:
        connection.num_drops = 3

    assert "could not be" not in train(3, at_evaluation=drop, keep=8)
    shutil.rmtree(tmp_path / "run")
    connection.num_drops = 5
    assert "checkpoint of step 3 were copied back" in train(4, keep=8)
    assert connection.num_dropped - dropped > 8
    assert in_bucket(url) == [1, 2, 3, 4]
    shutil.rmtree(tmp_path / "run")
    assert "checkpoint of step 4 were copied back" in train(4)


def test_a_folder_with_checkpoints_is_used_as_it_is(
    train: Train, url: BucketPath, tmp_path: Path
) -> None:
    run, behind = tmp_path / "run", tmp_path / "behind"
    train(2)
    shutil.copytree(run, behind)
    assert f"{run} has checkpoints and is used as it is, not its copy 0.0 M" in train(4)
    said = train(3, workdir=behind)
    assert f"{url} has a newer checkpoint, of step 4, from which another --workdir" in said
    assert "continuing from the checkpoint of step 2" in said
    # Nobody knows who made those that are newer.
    assert in_bucket(url) == [2, 3, 4]
    other = tmp_path / "other"
    train(1, workdir=other, copy_to=None)
    with pytest.raises(CopyError, match=rf"'{url}' holds another run than .*other: their starts"):
        train(4, workdir=other)


def test_damaged_copies_are_passed_over(
    train: Train, url: BucketPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(2)
    shutil.rmtree(tmp_path / "run")

    def damage(step: int) -> None:
        sizes = url.sizes_below()
        names = [name for name in sizes if name.startswith(f"checkpoints/{step}/model/")]
        largest = max(names, key=lambda name: sizes[name])
        (url / largest).write_bytes(b"?" * sizes[largest])

    damage(2)
    said = train(3)
    assert re.search(r"step 2 in \S+ is damaged: model/\S+ has other bytes than were writ", said)
    assert "continuing from the checkpoint of step 1" in said
    assert in_bucket(url) == [2, 3]
    shutil.rmtree(tmp_path / "run")
    for step in (2, 3):
        damage(step)
    with pytest.raises(CopyError, match=f"no checkpoint in {url} can be read"):
        train(4)
    # A folder that the run would be started anew in.
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_is_stopped_waits_for_the_copy(
    train: Train, url: BucketPath, tmp_path: Path, connection: object_store.Connection
) -> None:
    with contextlib.closing(StopSignals(catches=True)) as signals:

        def stop(step: int) -> None:
            connection.delay_seconds = 0.05
            if step == 2:
                signals.received.append(signal.SIGTERM)

        said = train(8, at_evaluation=stop, signals=signals)
    assert "stopped at step 3 of 8 by SIGTERM; the same command continues" in said
    assert f"waiting for the last copy to {url}, up to 600 s (checkpoint.copy_seconds)" in said
    assert f"the checkpoint of step 3 is in {url}" in said
    assert max(in_bucket(url)) == 3


def test_the_wait_for_the_copy_has_an_end(
    train: Train, url: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_over = threading.Event()
    monkeypatch.setattr(BucketPath, "upload", lambda path, file: is_over.wait(SECONDS))
    said = train(2, copy_seconds=1.5)
    assert "was not finished in 2 s: nothing was copied since this start. The same comm" in said
    assert in_bucket(url) == []
    is_over.set()


def test_an_evaluation_that_is_stopped_waits_for_the_copy(
    train: Train, url: BucketPath, tmp_path: Path
) -> None:
    there = []
    with caught() as (signals, ends):

        def stop(step: int) -> None:
            if step == 2:
                send()
                assert ends.wait()[1] == 75
                there.append(in_bucket(url))
                raise StopIteration

        with pytest.raises(StopIteration):
            train(8, at_evaluation=stop, signals=signals)
    assert there == [[1, 2]]


@pytest.mark.parametrize(
    ("copy_to", "error", "words"),
    [
        ("s3://nobodys/run", CopyError, "'s3://nobodys/run': there is no such bucket; make it"),
        ("runs/x", BucketError, "'runs/x' is no URL of a bucket's folder, as s3://BUCKET/NAME"),
        ("file:///tmp/x", BucketError, "no URL of a bucket's folder"),
        ("s3://", BucketError, "no URL of a bucket's folder"),
        ("s4://runs/x", BucketError, "s4:// is no kind of bucket that fsspec knows"),
        ("s3://not+a+name/x", BucketError, "cannot be the name of an object: .*bucket name"),
        ("gs://runs/x", BucketError, r"pip install 'sam-jax\[gs\]'"),
    ],
)
def test_what_cannot_be_copied_to_is_said_before_the_first_step(
    train: Train, tmp_path: Path, copy_to: str, error: type[Exception], words: str, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(error, match=words):
        train(2, copy_to=copy_to)
    assert not (tmp_path / "run").exists()


def test_access_is_asked_for_before_the_first_step(
    train: Train, url: BucketPath, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patched.delenv(name)
        buckets.disconnect()
        with pytest.raises(BucketError, match=r"may not be written: NoCredentials.*AWS_PROFILE"):
            train(2)
    buckets.disconnect()
    connection.is_down = True
    with pytest.raises(UnreachableBucketError, match="could not be written, tried 4") as raised:
        train(2)
    assert raised.value.exit_code == 75


def test_any_kind_of_bucket_will_do(train: Train, tmp_path: Path) -> None:
    where = BucketPath("memory://anything/run")
    train(2, copy_to=str(where))
    assert in_bucket(where) == [1, 2]
    shutil.rmtree(tmp_path / "run")
    assert "checkpoint of step 2 were copied back" in train(3, copy_to=str(where))


def test_only_the_first_process_copies_and_the_others_learn_of_errors(
    url: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanged = []

    def gathered(value: Any) -> list[Any]:
        exchanged.append(value)
        return [[len(exchanged) > 2, [("no bucket", 75)]], value]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoint_copies, "is_first", lambda: False)
    monkeypatch.setattr(checkpoint_copies, "gathered", gathered)
    monkeypatch.setattr(checkpoint_copies, "_EXCHANGE_SECONDS", 0.0)
    copies = CheckpointCopies(tmp_path, CheckpointConfig(copy_to=str(url)), print)
    with pytest.raises(CopyError, match="no bucket") as raised:
        copies.bring_back()
    assert raised.value.exit_code == 75
    assert len(exchanged) == 3
    copies.request(1)
    copies.wait()
    assert url.sizes_below() == {}


def test_the_wait_is_positive() -> None:
    with pytest.raises(ConfigError, match="copy_seconds must be at least 1, got 0"):
        from_mapping(CheckpointConfig, {"copy_seconds": 0}, "checkpoint")
