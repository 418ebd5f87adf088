"""The training loop in this process: where a run starts from. Whole runs are in tests/e2e."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sam_jax.checkpoint import CheckpointConfig, restore_variables
from sam_jax.data.pipeline import InputWorkerError, train_iterator
from sam_jax.training import loop
from sam_jax.training.compiled_step import CompiledStep
from sam_jax.training.experiment import Experiment
from sam_jax.weights.files import WeightsError
from sam_jax.weights.load import save
from sam_jax.weights.names import NamesError
from tests.golden.tiny import TINY, random_variables
from tests.unit.test_training_step import recipe_of


def without_learning(experiment: Experiment) -> CompiledStep:
    """The step of an experiment, but that it only counts: the real one takes long to compile."""
    real = experiment.compiled_step(jax.devices()[:2])
    batch = real.placed_batch(experiment.data.batch_size)
    _, metrics = jax.eval_shape(real.step, real.placed_state, batch)
    zeros = jax.device_put(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), metrics))
    return dataclasses.replace(
        real, step=lambda state, batch: (state.replace(step=state.step + 1), zeros)
    )


def train(workdir: Path, experiment: Experiment) -> Any:
    data = train_iterator(experiment.data)
    try:
        return loop.train(
            workdir=workdir,
            compiled_step=without_learning(experiment),
            config=experiment.train,
            batch_size=experiment.data.batch_size,
            data_iterator=data,
            checkpoint_config=CheckpointConfig(),
            evaluators={},
        )
    finally:
        data.close()


def starting_from(path: Path, *settings: str) -> Experiment:
    fixed = ("train.num_steps=1", "train.log_every=1")
    return recipe_of(f"train.init_from={path}", *fixed, *settings)


def test_a_new_run_starts_from_weights_and_a_continued_one_from_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, workdir = tmp_path / "weights", tmp_path / "run"
    experiment = starting_from(weights, "train.ema_decay=0.7")
    variables = random_variables(experiment.task.model.config)
    save(weights, experiment.task.model.config, variables, "orbax")
    state = train(workdir, experiment)
    assert "starting from the weights in" in capsys.readouterr().err
    assert int(state.step) == 1
    for tree in (
        state.variables,
        state.evaluated_variables,
        restore_variables(workdir, ema=False),
        restore_variables(workdir),
    ):
        jax.tree.map(
            lambda ours, given: np.testing.assert_allclose(ours, given, rtol=1e-6), tree, variables
        )

    # What the run started from is not asked for again.
    shutil.rmtree(weights)
    assert int(train(workdir, experiment).step) == 1
    said = capsys.readouterr().err
    assert "continuing from the checkpoint of step 1" in said
    assert "starting from" not in said


def test_weights_that_do_not_fit_or_are_not_there_are_named(tmp_path: Path) -> None:
    save(tmp_path / "other", TINY, random_variables(TINY), "orbax")
    with pytest.raises(NamesError, match="not of the model that the config describes"):
        train(tmp_path / "run", starting_from(tmp_path / "other"))
    with pytest.raises(WeightsError, match="nothing does not exist"):
        train(tmp_path / "run", starting_from(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            jax.errors.JaxRuntimeError("UNKNOWN: Connection closed by peer\nmore"),
            75,
            "cannot go on, most likely as another one ended: UNKNOWN: Connection closed by peer\n",
        ),
        (OSError(28, "No space left on device"), 1, "ends, and so will the others: [Errno 28]"),
        (InputWorkerError("-9"), 75, "so will the others: a worker process"),
        (ZeroDivisionError("a fault"), 1, "ZeroDivisionError: a fault\n"),
    ],
)
def test_a_process_that_fails_alone_does_not_wait_for_the_others(
    error: Exception,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not even for their end: JAX would, for minutes."""
    ended: list[tuple[str, int]] = []

    def end_now(message: str, exit_code: int) -> None:
        ended.append((message, exit_code))
        raise SystemExit

    monkeypatch.setattr(loop, "end_now", end_now)
    with pytest.raises(SystemExit):
        loop._end_alone(error, "runs/x")
    ((message, exit_code),) = ended
    assert exit_code == code
    assert words in message + capsys.readouterr().err
    assert message.endswith("continues from the newest checkpoint in runs/x.")
