"""Averaged parameters in checkpoints: kept, started, dropped. Whole runs are in tests/e2e."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.checkpoint import CheckpointConfig, Checkpointer, restore_variables
from sam_jax.data.pipeline import TrainIterator, train_iterator
from sam_jax.training import loop
from sam_jax.training.recipe import Recipe, read_config
from sam_jax.training.state import TrainState

CONFIG = str(Path(__file__).parents[1] / "e2e" / "tiny_run.py")
STEP = 3


@pytest.fixture
def data() -> Iterator[TrainIterator]:
    iterator = train_iterator(Recipe.of(read_config(CONFIG)).data)
    yield iterator
    iterator.close()


def example(*, averaged: bool) -> TrainState:
    return TrainState(
        step=jnp.asarray(STEP, jnp.int32),
        params={"kernel": jnp.arange(6.0).reshape(2, 3)},
        constants={"table": jnp.ones(2)},
        opt_state={"mu": jnp.zeros((2, 3))},
        ema_params={"kernel": jnp.full((2, 3), 7.0)} if averaged else None,
    )


def saved(state: Any, workdir: Path, data: TrainIterator) -> Checkpointer:
    checkpointer = Checkpointer(workdir, CheckpointConfig())
    checkpointer.save(state, data)
    checkpointer.close()
    return Checkpointer(workdir, CheckpointConfig())


def placed(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(first: Any, second: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_an_average_comes_back_and_is_what_evaluation_reads(
    tmp_path: Path, data: TrainIterator
) -> None:
    state = example(averaged=True)
    checkpointer = saved(state, tmp_path, data)
    assert checkpointer.latest_has_ema
    assert_same(checkpointer.restore(placed(state), data), state)
    checkpointer.close()
    assert_same(restore_variables(tmp_path), state.evaluated_variables)
    assert_same(restore_variables(tmp_path)["params"], state.ema_params)
    assert_same(restore_variables(tmp_path, ema=False), state.variables)


def test_an_average_that_was_not_kept_starts_as_the_parameters(
    tmp_path: Path, data: TrainIterator
) -> None:
    state = example(averaged=False)
    checkpointer = saved(state, tmp_path, data)
    assert not checkpointer.latest_has_ema
    restored = checkpointer.restore(placed(example(averaged=True)), data)
    checkpointer.close()
    assert_same(restored.ema_params, state.params)
    # A step takes the memory of both.
    places = [x["kernel"].unsafe_buffer_pointer() for x in (restored.params, restored.ema_params)]
    assert places[0] != places[1]
    assert_same(restore_variables(tmp_path), state.variables)


def test_an_average_that_is_not_wanted_is_left(tmp_path: Path, data: TrainIterator) -> None:
    checkpointer = saved(example(averaged=True), tmp_path, data)
    restored = checkpointer.restore(placed(example(averaged=False)), data)
    checkpointer.close()
    assert restored.ema_params is None
    assert_same(restored, example(averaged=False))


@pytest.mark.parametrize(
    ("before", "now", "word"),
    [
        (0.0, 0.9, "the average starts from its parameters"),
        (0.9, 0.0, "its averaged parameters are dropped"),
        (0.9, 0.5, None),
    ],
)
def test_a_run_says_what_becomes_of_the_average(
    before: float, now: float, word: str | None, tmp_path: Path, data: TrainIterator, capsys: Any
) -> None:
    """Of a run that has done all its steps, so that none is compiled."""

    def recipe(decay: float) -> Recipe:
        settings = (f"train.num_steps={STEP}", "train.eval_every=0", f"train.ema_decay={decay}")
        return Recipe.of(read_config(CONFIG, settings))

    state = recipe(before).program(jax.devices()[:1]).new_state(jax.random.key(0))
    saved(dataclasses.replace(state, step=state.step + STEP), tmp_path, data).close()
    after = loop.train(
        workdir=tmp_path,
        recipe=recipe(now),
        data_iterator=data,
        checkpoint_config=CheckpointConfig(),
        evaluators={},
    )
    said = capsys.readouterr().err
    assert "continuing from the checkpoint of step 3" in said
    assert ("averaged" in said) == (word is not None)
    assert word is None or word in said
    if now:
        assert_same(after.ema_params, state.params)
    else:
        assert after.ema_params is None


def test_an_average_needs_something_to_average() -> None:
    with pytest.raises(Exception, match="ema_decay must be at least 0 and less than 1, got 1"):
        Recipe.of(read_config(CONFIG, ["train.ema_decay=1.0"]))
