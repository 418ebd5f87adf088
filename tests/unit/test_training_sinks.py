"""What takes a run's numbers and pictures."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sam_jax.errors import ConfigError
from sam_jax.training.sinks import FileSink, TensorBoardSink, WandbSink

ROOT = Path(__file__).parents[2]
PICTURE = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)


def lines(workdir: Path) -> list[Any]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_numbers_are_lines_and_pictures_are_files(tmp_path: Path) -> None:
    sink = FileSink(tmp_path)
    sink.write_numbers(3, {"train/loss": 0.5, "train/update_norm": math.nan})
    sink.flush()
    assert lines(tmp_path) == [{"step": 3, "train/loss": 0.5, "train/update_norm": None}]
    sink.write_picture(3, "eval/a b/ex:amples", PICTURE)
    sink.close()
    (path,) = (tmp_path / "pictures").rglob("*.*")
    assert path.relative_to(tmp_path).as_posix() == "pictures/3/eval_a b_ex_amples.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), PICTURE)


def test_a_line_that_was_cut_off_does_not_take_the_next_one_with_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2}\n{"step": 2, "a"')
    sink = FileSink(tmp_path)
    sink.write_numbers(2, {"a": 3.0})
    sink.close()
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last) == {"step": 2, "a": 3.0}


def test_what_is_flushed_is_on_the_disk(tmp_path: Path) -> None:
    """A run that goes on from a checkpoint does not make again what came before it."""
    sink = TensorBoardSink(tmp_path, first_step=0)
    for step in (1, 2, 3):
        sink.write_numbers(step, {f"figure/{n}": n / 3 for n in range(9)})
        sink.flush()
        found = EventAccumulator(str(tmp_path / "tensorboard"))
        found.Reload()
        assert [len(found.Scalars(f"figure/{n}")) for n in range(9)] == [step] * 9
    sink.close()


def test_tensorboard_needs_no_pytorch(tmp_path: Path) -> None:
    """In a process of its own, with a package of that name: other tests import the real one."""
    (tmp_path / "torch.py").write_text("Tensor = ()\n")
    program = f"""
import pathlib, sys
import numpy as np
from sam_jax.training.sinks import TensorBoardSink
sink = TensorBoardSink(pathlib.Path({str(tmp_path)!r}), first_step=0)
sink.write_numbers(1, {{"loss": 0.5}})
sink.write_picture(1, "picture", np.zeros((4, 5, 3), np.uint8))
sink.close()
print("torch" in sys.modules)
import torch
print(torch.Tensor)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == ["False", "()"]
    assert list(tmp_path.glob("tensorboard/events*"))


class StubRun:
    """What a run of wandb is asked for."""

    def __init__(self, **options: Any):
        self.options = options
        self.id = options["id"] or "abc123"
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.is_finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[StubRun]:
    started: list[StubRun] = []

    def init(**options: Any) -> StubRun:
        started.append(StubRun(**options))
        return started[-1]

    module = SimpleNamespace(init=init, Image=lambda array: ("image", array.shape))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return started


def test_wandb_has_one_run_however_often_it_is_started(runs: list[StubRun], tmp_path: Path) -> None:
    for _ in range(2):
        sink = WandbSink(tmp_path, "team/sam", {"train": {"num_steps": 3}})
        sink.write_numbers(7, {"train/loss": 1.0})
        sink.write_picture(7, "eval/x", PICTURE)
        sink.flush()
        sink.close()
    first, second = runs
    assert (first.options["id"], second.options["id"]) == (None, "abc123")
    assert first.options["entity"] == "team"
    assert first.options["project"] == "sam"
    assert first.options["config"] == {"train": {"num_steps": 3}}
    assert first.logged == [
        {"step": 7, "train/loss": 1.0},
        {"step": 7, "eval/x": ("image", PICTURE.shape)},
    ]
    assert ("*", "step") in first.metrics
    assert second.is_finished


def test_wandb_itself_keeps_a_run_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's own calls, which the stand-in for it cannot know."""
    pytest.importorskip("wandb", reason="W&B needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):
        sink = WandbSink(tmp_path, "sam", {"train": {"num_steps": 3}})
        sink.write_numbers(7, {"train/loss": 1.0})
        sink.write_picture(7, "eval/x", PICTURE)
        sink.close()
    run_id = (tmp_path / "wandb_run.txt").read_text().strip()
    kept = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert kept
    assert {path.name for path in kept} == {f"run-{run_id}.wandb"}
    (picture,) = {path.name for path in tmp_path.rglob("*.png")}
    assert picture.startswith("x_")


def test_without_its_package_wandb_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"train.wandb = 'sam' needs .* pip install"):
        WandbSink(tmp_path, "sam", None)
