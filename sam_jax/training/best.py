"""The best model of a run, by a figure of its evaluations, and when a run gets no better.

Beside the run's own checkpoints, ``RUN/best`` is the folder of the best model: like a run's, so
that evaluation, prediction and conversion take it by that name. ``RUN/evaluations.json`` has the
figure of each evaluation, by which a run that is continued knows what one that was not would know.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sam_jax.checkpoint import CheckpointError, save_config, save_variables
from sam_jax.errors import ConfigError
from sam_jax.hosts import is_first

BEST = "best"
EVALUATIONS = "evaluations.json"
# A figure of this name is the better, the smaller it is.
_LOSS = "loss"


class Evaluated(NamedTuple):
    """The figure of one evaluation.

    Attributes:
      step: of the model.
      value: the figure.
    """

    step: int
    value: float


class Watch:
    """The figure that a run is judged by, and what follows from it.

    Nothing is written before the first evaluation.

    Args:
      workdir: of the run.
      figure: name of it: of the evaluation, a slash, and of the figure in its report, as in
        "val/mean/box". The larger the better, but of a loss ("val/mean/loss").
      patience: evaluations without a better figure after which the run is over; None for no end.
      first_step: done before; evaluations of later ones are of a run that was killed, and are made
        again.
      sections: the run's config, for the folder of the best; None keeps none.

    Raises:
      CheckpointError: if the file of a run that is continued is damaged.
    """

    def __init__(
        self,
        workdir: str | Path,
        figure: str,
        patience: int | None,
        first_step: int,
        sections: dict[str, Any] | None = None,
    ):
        self._workdir = Path(workdir)
        self._figure, self._patience, self._sections = figure, patience, sections
        self._evaluated: list[Evaluated] = []
        # What lies in the folder may be of a later step than the run continues from.
        self._kept: Evaluated | None = None
        if first_step:
            self._read(first_step)

    def _read(self, first_step: int) -> None:
        path = self._workdir / EVALUATIONS
        try:
            found = json.loads(path.read_text())
            # Another figure's values are not comparable.
            if found["figure"] != self._figure:
                return
            evaluated = [_evaluated(one) for one in found["evaluations"]]
            kept = _evaluated(found["best"]) if found["best"] else None
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error!r}): it says which model of the run was the best. "
                "Without the file the run goes on, and judges by what comes"
            ) from error
        self._evaluated = [one for one in evaluated if one.step <= first_step]
        self._kept = kept

    @property
    def best(self) -> Evaluated | None:
        """The best evaluation so far, the earliest of equals; None before the first."""
        return max(self._evaluated, key=self._goodness, default=None)

    @property
    def is_over(self) -> bool:
        """True if the figure has not become better for as long as the run is patient."""
        if self._patience is None or self.best is None:
            return False
        return sum(one.step > self.best.step for one in self._evaluated) >= self._patience

    @property
    def summary(self) -> str:
        """The best evaluation in words."""
        assert self.best is not None, "there was no evaluation"
        step, value = self.best
        return f"{self._figure} was best at step {step}: {value:.4f}, in {self._workdir / BEST}"

    def _goodness(self, evaluated: Evaluated) -> float:
        """Order of evaluations, in which a figure that is not a number is the worst."""
        if math.isnan(evaluated.value):
            return -math.inf
        is_loss = self._figure.rpartition("/")[2] == _LOSS
        return -evaluated.value if is_loss else evaluated.value

    def lacks(self, step: int) -> bool:
        """True if the evaluation of a step is missing, whose run was stopped in the midst of it."""
        return all(one.step != step for one in self._evaluated)

    def check_names(self, evaluations: Mapping[str, Any]) -> None:
        """Checks that the figure can be one of these evaluations, before any is made.

        Raises:
          ConfigError: if not.
        """
        name = self._figure.partition("/")[0]
        if name not in evaluations:
            raise ConfigError(
                f"train.watch = {self._figure!r} is a figure of the evaluation {name!r}, which "
                f"config.evals has not; there are {', '.join(evaluations) or 'none'}"
            )

    def see(
        self, step: int, figures: Mapping[str, float], variables: Callable[[], dict[str, Any]]
    ) -> None:
        """Takes note of evaluations, and keeps the model if it is the best.

        With several processes all must call together.

        Args:
          step: of the model.
          figures: of all evaluations of it, by name.
          variables: gives the model's, if they are to be kept.

        Raises:
          ConfigError: if the figure is none of these.
          CheckpointError, OSError: if the model cannot be kept.
        """
        if self._figure not in figures:
            raise ConfigError(
                f"train.watch = {self._figure!r} is no figure of the evaluations; there are "
                f"{', '.join(figures)}"
            )
        found = Evaluated(step, float(figures[self._figure]))
        self._evaluated.append(found)
        is_better = self._kept is None or self._goodness(found) > self._goodness(self._kept)
        if self.best == found and is_better:
            if is_first():
                save_config(self._workdir / BEST, self._sections or {})
            # A run that was killed before its first checkpoint has left what it started from, which
            # need not be what this one starts from.
            replaces = self._kept is None
            self._kept = found
            folder = self._workdir / BEST
            save_variables(folder, variables(), step=step, keep=1, replaces=replaces)
        if is_first():
            self._write()

    def _write(self) -> None:
        content = {
            "figure": self._figure,
            "best": self._kept._asdict() if self._kept else None,
            "evaluations": [one._asdict() for one in self._evaluated],
        }
        unfinished = self._workdir / f".{EVALUATIONS}.unfinished"
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        unfinished.replace(self._workdir / EVALUATIONS)


def _evaluated(entry: Mapping[str, Any]) -> Evaluated:
    return Evaluated(int(entry["step"]), float(entry["value"]))
