"""Reports of a training run: a progress bar, lines on the console, and what sinks keep."""

import collections
import contextlib
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sam_jax.errors import silence
from sam_jax.hosts import is_first
from sam_jax.training.sinks import (
    EVALUATION,
    METRICS,
    FileSink,
    Sink,
    TensorBoardSink,
    WandbSink,
    evaluations_of,
)

# As evaluations call what they found on average over their data sets.
_OF_MEAN = "mean/"
_MOST_FIGURES = 8


class _LastingConsole(Console):
    """A console of a run that outlives whoever reads it, as ``tee`` that Ctrl-C ends, too."""

    def on_broken_pipe(self) -> None:
        """Is silent from now on, where Rich would end the program before it has saved."""
        self.quiet = True
        silence(sys.stderr)


class Reporter:
    """Reports from the first process, and is silent on the others.

    Nothing is written before ``begin``.

    Args:
      workdir: where the files go.
      num_steps: the run's last step.
      wandb: see ``experiment.TrainConfig``.
    """

    def __init__(self, workdir: str | Path, num_steps: int, wandb: str | None = None):
        self._speaks = is_first()
        self._workdir = Path(workdir)
        self._num_steps = num_steps
        self._wandb = wandb
        self._console = _LastingConsole(stderr=True, quiet=not self._speaks, highlight=False)
        self._sinks: list[Sink] = []
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"),
            console=self._console,
            disable=not (self._speaks and self._console.is_terminal),
            transient=True,
        )
        self._task = self._progress.add_task("training", total=num_steps, news="")

    @property
    def workdir(self) -> Path:
        """Folder of the run's checkpoints, logs and pictures."""
        return self._workdir

    def begin(self, first_step: int = 0, sections: Mapping[str, Any] | None = None) -> None:
        """Opens the files; they may be open already.

        Args:
          first_step: done before; what an interrupted run wrote of later ones is superseded.
          sections: the resolved config.

        Raises:
          ConfigError: if ``wandb`` is asked for and not installed.
        """
        self._progress.start()
        self._progress.update(self._task, completed=first_step)
        if self._speaks and not self._sinks:
            self._workdir.mkdir(parents=True, exist_ok=True)
            if self._wandb:
                self._sinks.append(WandbSink(self._workdir, self._wandb, sections))
            self._sinks.append(FileSink(self._workdir))
            self._sinks.append(TensorBoardSink(self._workdir, first_step))

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        self._console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        self._progress.update(self._task, completed=step)

    def train_metrics(self, step: int, metrics: Mapping[str, float], news: str) -> None:
        """Records a training interval's means, and prints what is news of it."""
        self._write(step, {f"train/{name}": value for name, value in metrics.items()})
        self._progress.update(self._task, news=news)
        self.say(f"step {step}/{self._num_steps}  {news}")

    def evaluation(self, step: int, name: str, report: Any) -> None:
        """Records an evaluator's numbers and pictures, and prints the first of the numbers."""
        numbers = report.as_flat_dict()
        self.say(f"evaluation {name} at step {step}: {_figures(numbers)}")
        self._write(step, {f"{EVALUATION}/{name}/{key}": x for key, x in numbers.items()})
        for sink in self._sinks:
            for title, picture in report.pictures.items():
                sink.write_picture(step, f"eval/{name}/{title}", np.asarray(picture))
        self.flush()

    def flush(self) -> None:
        """Hands all numbers to the disk, so that a run that is killed does not lose them."""
        for sink in self._sinks:
            sink.flush()

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.write_numbers(step, numbers)

    def has_evaluated(self, step: int, names: Collection[str]) -> bool:
        """True if the run's folder has the figures of all of these evaluations of a step."""
        return {*names} <= evaluations_of(self._workdir, step)

    def close(self) -> None:
        """Ends the progress bar and the files."""
        self._progress.stop()
        with contextlib.ExitStack() as stack:
            while self._sinks:
                stack.callback(self._sinks.pop().close)


def _figures(numbers: Mapping[str, float]) -> str:
    """Figures of an evaluation, as one line: means over data sets, where there are any."""
    means = {k.removeprefix(_OF_MEAN): v for k, v in numbers.items() if k.startswith(_OF_MEAN)}
    shown = list((means or numbers).items())
    line = "  ".join(f"{name} {value:.4g}" for name, value in shown[:_MOST_FIGURES])
    num_more = len(shown) - _MOST_FIGURES
    return f"{line}  and {num_more} more in {METRICS}" if num_more > 0 else line


class Profile:
    """A trace of some steps, for xprof.

    Args:
      steps: the first and the last of them; None for none.
      reporter: says where the trace is, and where it may be.
    """

    def __init__(self, steps: tuple[int, int] | None, reporter: Reporter):
        self._steps = steps
        self._reporter = reporter
        self._is_running = False

    def before(self, step: int) -> None:
        """Starts at the first step."""
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(self._reporter.workdir / "profile")
            self._is_running = True

    def after(self, step: int, results: Any) -> None:
        """Ends after the last step, once its results are there."""
        if self._is_running and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends a profile that was begun, also before its last step; says where it is."""
        if self._is_running:
            jax.profiler.stop_trace()
            self._is_running = False
            self._reporter.say(f"a profile is in {self._reporter.workdir / 'profile'}")


class Stopwatch:
    """Seconds spent in named activities since it was last read."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """A context whose time counts as this activity's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[activity] += time.perf_counter() - start

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds in all, and by activity; starts anew."""
        now = time.perf_counter()
        total, seconds = now - self._start, self._seconds
        self._seconds, self._start = collections.defaultdict(float), now
        return total, seconds
