"""Sinks of a run's numbers and pictures: files of its own, TensorBoard, Weights & Biases."""

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sam_jax import places
from sam_jax.errors import ConfigError

METRICS = "metrics.jsonl"
# What names of evaluations' figures begin with.
EVALUATION = "eval"
PICTURES = "pictures"
_WANDB_RUN = "wandb_run.txt"
# How old what TensorBoard shows may be.
_FLUSH_SECONDS = 10.0


class Sink(Protocol):
    """Something that takes numbers and pictures as a run makes them."""

    def write_numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """Takes numbers by name."""
        ...

    def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Takes an RGB picture, 8 bits."""
        ...

    def flush(self) -> None:
        """Hands all that was taken to the disk or the network, for when the run is killed."""
        ...

    def close(self) -> None:
        """Ends; nothing is taken any more."""
        ...


class FileSink:
    """Numbers as lines of JSON, pictures as PNG: what ``sam-jax report`` reads.

    A run that goes on from a checkpoint writes some steps again; the later line holds.

    Args:
      workdir: of the run; lines go to ``metrics.jsonl``, pictures to ``pictures/STEP``.
    """

    def __init__(self, workdir: Path):
        self._workdir = workdir

    def write_numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        # JSON has no spelling for what is not finite.
        values = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        places.append_line(self._workdir / METRICS, json.dumps({"step": step, **values}))

    def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        folder = self._workdir / PICTURES / str(step)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{re.sub(r'[^A-Za-z0-9._ -]', '_', name)}.png"
        unfinished = path.with_name(f".{path.name}.unfinished")
        Image.fromarray(picture).save(unfinished, format="PNG")
        unfinished.replace(path)

    def flush(self) -> None:
        """Does nothing: all is written as it comes."""

    def close(self) -> None:
        """Does nothing: nothing is open."""


def evaluations_of(workdir: Path, step: int) -> set[str]:
    """Names of the evaluations of a step that ``metrics.jsonl`` has figures of."""
    names: set[str] = set()
    try:
        lines = (workdir / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return names
    for line in lines:
        # What a killed process left cut off says nothing.
        content = object_of(line) or {}
        if content.get("step") == step:
            paths = [key.split("/") for key in content]
            names |= {path[1] for path in paths if path[0] == EVALUATION and len(path) > 2}
    return names


def object_of(line: str) -> dict[str, Any] | None:
    """The JSON object of a line, an empty one of none; None if it is something else, or cut off."""
    try:
        found = json.loads(line or "{}")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


class TensorBoardSink:
    """TensorBoard's files.

    Args:
      workdir: of the run; they go to ``tensorboard``.
      first_step: done before; what an interrupted run wrote of later ones is superseded.
    """

    def __init__(self, workdir: Path, first_step: int):
        # Absolute, since what stands before a colon would be taken for a scheme.
        self._folder = workdir.absolute() / "tensorboard"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._board = _tensorboardx()
        # Not by its thread, which need not have written by a flush what it was handed before.
        with self._failing():
            self._events: Any = self._board.event_file_writer.EventsWriter(
                str(self._folder / "events"), filename_suffix=f".{os.getpid()}.{first_step}"
            )
        protos = self._board.proto.event_pb2
        starts = protos.SessionLog(status=protos.SessionLog.START)
        self._flushed_at = time.monotonic()
        self._write(first_step + 1, session_log=starts)

    def write_numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._write(step, summary=self._board.summary.scalar(name, value))
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush()

    def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        summary = self._board.summary.image(name, picture, dataformats="HWC")
        self._write(step, summary=summary)

    def flush(self) -> None:
        with self._failing():
            self._events.flush()
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        if self._events is not None:
            events, self._events = self._events, None
            with self._failing():
                events.close()

    def _write(self, step: int, **content: Any) -> None:
        event = self._board.proto.event_pb2.Event(step=step, wall_time=time.time(), **content)
        with self._failing():
            self._events.write_event(event)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """A block in which an error of the disk says what to do."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self._folder} takes no more numbers ({error}). Once that is mended, the same "
                "command continues"
            ) from error


def _tensorboardx() -> ModuleType:
    """Imports tensorboardX without the PyTorch that it would import for tensors to write.

    That takes seconds and memory at the start of every run, where PyTorch happens to be installed.
    """
    is_hidden = "torch" not in sys.modules
    if is_hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tensorboardX.event_file_writer
        import tensorboardX.summary
    finally:
        if is_hidden:
            del sys.modules["torch"]
    return tensorboardX


class WandbSink:
    """A run of Weights & Biases, the same one however often the run is continued.

    Args:
      workdir: of the run; the name that the other side knows it by is kept there.
      project: PROJECT or ENTITY/PROJECT.
      sections: the resolved config.

    Raises:
      ConfigError: if the package is not installed.
    """

    def __init__(self, workdir: Path, project: str, sections: Mapping[str, Any] | None):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"train.wandb = {project!r} needs the package wandb: pip install 'sam-jax[wandb]'"
            ) from error
        self._make_image = wandb.Image
        entity, _, name = project.rpartition("/")
        kept = workdir / _WANDB_RUN
        run_id = kept.read_text().strip() if kept.exists() else None
        self._run: Any = wandb.init(
            entity=entity or None,
            project=name,
            name=workdir.absolute().name,
            id=run_id,
            resume="allow",
            dir=str(workdir),
            config=dict(sections or {}),
        )
        if run_id is None:
            places.write_text(kept, f"{self._run.id}\n")
        # Not its own count of steps, which cannot go back to a checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write_numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self._run.log({"step": step, name: self._make_image(picture)})

    def flush(self) -> None:
        """Does nothing: it sends in a process of its own."""

    def close(self) -> None:
        self._run.finish()
