"""The best model of a run, and the end of a run that gets no better."""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sam_jax.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    restore_variables,
    save_variables,
)
from sam_jax.configuration import from_mapping
from sam_jax.errors import ConfigError
from sam_jax.training import loop
from sam_jax.training.best import Evaluated, Watch
from sam_jax.training.experiment import TrainConfig
from tests.unit.test_training_task import MeanColor, Pixels, toy_step

# Of the parameters that a run starts from.
KEY = jax.random.key(TrainConfig(1).seed)


class Report:
    """Figures that were decided before."""

    pictures: Mapping[str, np.ndarray] = {}

    def __init__(self, value: float):
        self._value = value

    def as_flat_dict(self) -> dict[str, float]:
        return {"mean/box": self._value}


class Scores:
    """An evaluator whose figures come from a list, one for each call."""

    def __init__(self, *values: float):
        self._values = iter(values)

    def __call__(self, variables: dict) -> Report:
        return Report(next(self._values))


def train(
    workdir: Path,
    scores: Scores,
    num_steps: int = 8,
    patience: int | None = 2,
    save_every: int = 2,
    watch: str | None = "val/mean/box",
    **options: Any,
) -> Any:
    return loop.train(
        workdir=workdir,
        compiled_step=toy_step(MeanColor(), 8),
        config=TrainConfig(
            num_steps,
            log_every=10,
            eval_every=1,
            watch=watch,
            patience=patience,
            **options,
        ),
        batch_size=8,
        data_iterator=Pixels(),
        checkpoint_config=CheckpointConfig(every_steps=save_every),
        evaluators={"val": scores},
        sections={"what": "a toy"},
    )


def kept(workdir: Path) -> tuple[int, np.ndarray]:
    (step,) = (int(path.name) for path in (workdir / "best" / "checkpoints").iterdir())
    return step, restore_variables(workdir / "best")["params"]["color"]


def test_a_run_that_gets_no_better_ends_and_keeps_its_best(tmp_path: Path, capsys: Any) -> None:
    state = train(tmp_path, Scores(0.2, 0.5, 0.5, 0.1))
    said = " ".join(capsys.readouterr().err.split())
    assert "stopping at step 4 of 8: in 2 evaluations nothing was better" in said
    assert "val/mean/box was best at step 2: 0.5000" in said
    step, color = kept(tmp_path)
    assert step == 2
    assert int(state.step) == 4
    assert not np.array_equal(color, state.params["color"])
    # The last one is there, too; and the folder of the best is as a run's.
    np.testing.assert_array_equal(
        restore_variables(tmp_path)["params"]["color"], state.params["color"]
    )
    assert json.loads((tmp_path / "best" / "config.json").read_text()) == {"what": "a toy"}
    # The same command has nothing left to do, a more patient one goes on.
    assert int(train(tmp_path, Scores()).step) == 4
    assert "the run was over at step 4" in " ".join(capsys.readouterr().err.split())
    assert int(train(tmp_path, Scores(0.6, 0.1, 0.1), patience=3, num_steps=7).step) == 7
    assert kept(tmp_path)[0] == 5


@pytest.mark.parametrize(
    "killed_at",
    # After the checkpoint of the step and before its evaluation; where there is no checkpoint.
    [6, 5],
)
def test_a_run_that_was_killed_judges_as_one_that_was_not(tmp_path: Path, killed_at: int) -> None:
    values = (0.1, 0.4, 0.3, 0.6, 0.2, 0.5)
    straight = train(tmp_path / "straight", Scores(*values))
    killed = tmp_path / "killed"
    with pytest.raises(StopIteration):
        train(killed, Scores(*values[: killed_at - 1]))
    again = train(killed, Scores(*values[killed_at - 1 :]))
    assert int(straight.step) == int(again.step) == 6
    for run in (tmp_path / "straight", killed):
        assert kept(run)[0] == 4
    np.testing.assert_array_equal(kept(killed)[1], kept(tmp_path / "straight")[1])
    files = [path / "evaluations.json" for path in (tmp_path / "straight", killed)]
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.parametrize("watch", ["val/mean/box", None])
@pytest.mark.parametrize("num_steps", [8, 4])
def test_an_evaluation_before_which_a_run_was_stopped_is_made_and_recorded(
    tmp_path: Path, watch: str | None, num_steps: int
) -> None:
    """Between the checkpoint of a step and its evaluation; of the last step as well."""
    values = [step / 10 for step in range(1, num_steps + 1)]
    start = functools.partial(train, tmp_path, num_steps=num_steps, patience=None, watch=watch)
    with pytest.raises(StopIteration):
        start(Scores(*values[:3]))
    assert int(start(Scores(*values[3:])).step) == num_steps
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    found = [(x["step"], x["eval/val/mean/box"]) for x in lines if "eval/val/mean/box" in x]
    assert found == list(enumerate(values, start=1))
    # Then there is nothing left to do.
    start(Scores())


@pytest.mark.parametrize(
    "options",
    [{"num_steps": 0}, {"log_every": 0}, {"eval_every": -1}, {"max_skipped_steps": 0}],
)
def test_lengths_of_nothing_are_refused(options: dict[str, int]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=rf"config\.train: {name} must be at least"):
        from_mapping(TrainConfig, {"num_steps": 3} | options, "train")


@pytest.mark.parametrize("name", ["every_steps", "keep", "keep_period"])
def test_checkpoints_that_would_not_be_kept_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.checkpoint: {name} must be at least 1, got 0"):
        from_mapping(CheckpointConfig, {name: 0}, "checkpoint")


def test_of_losses_the_smallest_is_the_best(tmp_path: Path) -> None:
    watch = Watch(tmp_path, "val/mean/loss", 2, 0)
    for step, value in ((1, 1.5), (2, 1.2), (3, math.nan), (4, 1.3)):
        watch.see(step, {"val/mean/loss": value}, lambda: {"params": {"color": np.zeros(3)}})
    assert watch.best == Evaluated(2, 1.2)
    assert watch.is_over


def watch_of(workdir: Path, first_step: int = 0, patience: int | None = None) -> Watch:
    return Watch(workdir, "val/mean/box", patience, first_step)


def see(watch: Watch, *evaluated: tuple[int, float]) -> list[int]:
    """Steps of models that were asked for, to be kept."""
    asked: list[int] = []

    def variables(step: int) -> dict[str, Any]:
        asked.append(step)
        return {"params": {"step": np.float32(step)}, "constants": {}}

    for step, value in evaluated:
        watch.see(step, {"val/mean/box": value}, functools.partial(variables, step))
    return asked


def test_a_run_is_judged_by_what_it_starts_from(tmp_path: Path, capsys: Any) -> None:
    # Of a run with other weights that was killed before its first checkpoint.
    other = {"params": {"color": np.zeros(3, np.float32)}, "constants": {}}
    save_variables(tmp_path / "run" / "best", other)
    state = train(tmp_path / "run", Scores(0.9, 0.5, 0.6), num_steps=5, eval_before=True)
    assert int(state.step) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "val/mean/box was best at step 0: 0.9000" in said
    kept = json.loads((tmp_path / "run" / "evaluations.json").read_text())
    assert [one["step"] for one in kept["evaluations"]] == [0, 1, 2]
    found = restore_variables(tmp_path / "run" / "best", 0)["params"]["color"]
    np.testing.assert_array_equal(found, toy_step(MeanColor(), 8).new_state(KEY).params["color"])
    assert np.all(found)
    # Continued, it is not evaluated before again.
    assert int(train(tmp_path / "run", Scores(0.95), 3, patience=3, eval_before=True).step) == 3


def test_a_better_model_of_later_steps_is_not_given_up(tmp_path: Path) -> None:
    assert see(watch_of(tmp_path), (1, 0.1), (2, 0.3), (3, 0.8)) == [1, 2, 3]
    # Killed, and continued from step 1: what follows is no better until it is there again.
    watch = watch_of(tmp_path, first_step=1)
    assert watch.best == Evaluated(1, 0.1)
    assert see(watch, (2, 0.3), (3, 0.8), (4, 0.9)) == [4]
    assert watch.best == Evaluated(4, 0.9)


def test_figures_that_are_no_numbers_are_the_worst(tmp_path: Path) -> None:
    watch = watch_of(tmp_path, patience=2)
    assert see(watch, (1, math.nan), (2, 0.1), (3, math.nan)) == [1, 2]
    assert not watch.is_over
    again = watch_of(tmp_path, first_step=3, patience=2)
    assert see(again, (4, 0.1)) == []
    assert again.is_over


def test_another_figure_starts_anew(tmp_path: Path) -> None:
    see(watch_of(tmp_path), (1, 0.5))
    other = Watch(tmp_path, "val/mean/center_1", None, 1)
    assert other.best is None
    (tmp_path / "evaluations.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"evaluations\.json is damaged"):
        watch_of(tmp_path, first_step=1)


def test_the_best_is_no_run_that_goes_on(tmp_path: Path) -> None:
    train(tmp_path, Scores(0.2, 0.5, 0.1), num_steps=3)
    with pytest.raises(CheckpointError, match=r"best holds weights without .*init_from=.*best to"):
        train(tmp_path / "best", Scores(0.2), num_steps=9)


def test_names_that_are_none_are_refused(tmp_path: Path) -> None:
    watch = watch_of(tmp_path)
    with pytest.raises(ConfigError, match=r"evaluation 'val', which config\.evals has not"):
        watch.check_names({"test": None})
    with pytest.raises(ConfigError, match="no figure of the evaluations; there are val/mean/point"):
        watch.see(1, {"val/mean/point": 0.5}, dict)
    for values, message in (
        ({"patience": 3}, "patience = 3 needs a figure to watch"),
        ({"patience": 0, "watch": "val/x"}, "at least one evaluation"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_mapping(TrainConfig, {"num_steps": 1, **values}, "train")
