"""Steps that are not finite change nothing, and end a run of nothing else, with the reason."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.checkpoint import CheckpointConfig, restore_variables
from sam_jax.configuration import from_mapping
from sam_jax.errors import ConfigError
from sam_jax.sharding import ShardingConfig
from sam_jax.training import loop
from sam_jax.training.compiled_step import CompiledStep, compile_step
from sam_jax.training.experiment import TrainConfig
from sam_jax.training.optimizer import OptimizerConfig
from sam_jax.training.skipped_steps import DivergedError
from sam_jax.training.task import ItemizedTask
from tests.unit.test_training_task import MeanColor, Pixels

NUM_STEPS = 12


class InRounds(MeanColor):
    """The same error in two rounds, the second of a part that a bad pixel alone makes infinite."""

    def loss_sums(self, parallel: Any, param_specs: Any) -> Any:
        parts_of = self.loss_parts(parallel, param_specs)

        def sums(params: Any, constants: Any, batch: Mapping[str, Any], key: Any) -> Any:
            parts = parts_of(params, constants, batch, key)
            # A gradient of its own, infinite at zero, where the loss is not.
            root = jnp.sum(jnp.sqrt(jnp.abs(params["color"] * batch["pixels"][:, 0, 0])))
            loss = jnp.sum(parts["near"]) + jnp.sum(parts["far"]) + 1e-6 * root
            return loss, {"loss": loss}

        return sums

    def loss_parts(self, parallel: Any, param_specs: Any) -> Any:
        def parts(params: Any, constants: Any, batch: Mapping[str, Any], key: Any) -> Any:
            error = jnp.square(batch["pixels"] - params["color"]).sum(axis=(2, 3))
            nothing = jnp.zeros_like(error)
            far = jnp.where(error > 1e6, jnp.inf, 0.0)
            return {"near": jnp.stack([error, nothing]), "far": jnp.stack([nothing, far])}

        return parts


class Spoiled(Pixels):
    """Pixels with a value of their own in the sixth image of some batches."""

    def __init__(self, spoiled: range, value: float):
        super().__init__()
        self.spoiled, self.value = spoiled, value

    def __next__(self) -> dict[str, np.ndarray]:
        batch = super().__next__()
        if self.position in self.spoiled:
            batch["pixels"][5, 0, 0] = self.value
        return batch | {"sample_names": np.array([f"photo_{i}.jpg" for i in range(8)])}


@pytest.fixture(scope="module")
def program() -> CompiledStep:
    task = InRounds()
    assert isinstance(task, ItemizedTask)
    return compile_step(
        task,
        num_steps=NUM_STEPS,
        seed=0,
        ema_decay=0.5,
        optimizer_config=OptimizerConfig(
            peak_learning_rate=0.1, warmup_steps=1, accumulate_steps=2
        ),
        sharding_config=ShardingConfig(data=2),
        devices=jax.devices()[:2],
    )


def train(workdir: Path, program: CompiledStep, data: Pixels, **options: Any) -> Any:
    return loop.train(
        workdir=workdir,
        compiled_step=program,
        config=TrainConfig(NUM_STEPS, log_every=3, eval_every=0, ema_decay=0.5, **options),
        batch_size=8,
        data_iterator=data,
        checkpoint_config=CheckpointConfig(every_steps=100),
        evaluators={},
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e4, 0.0])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(
    program: CompiledStep, value: float
) -> None:
    """Loss and gradient, only the loss (1e4), or only the gradient (0)."""
    state = program.new_state(jax.random.key(0))
    good, bad = Spoiled(range(0), 0), Spoiled(range(1, 2), value)
    state, metrics = program.step(state, program.global_batch(next(good)))
    assert float(metrics["skipped"]) == 0
    before = jax.tree.map(np.array, state)
    state, metrics = program.step(state, program.global_batch(next(bad)))
    assert float(metrics["skipped"]) == 1
    assert bool(np.isfinite(metrics["loss"])) == (value == 0)
    assert bool(np.isfinite(metrics["gradient_norm"])) == (value == 1e4)
    assert int(state.step) == int(before.step) + 1
    jax.tree.map(np.testing.assert_array_equal, state.replace(step=before.step), before)


def test_some_steps_are_skipped_counted_and_named(
    program: CompiledStep, tmp_path: Path, capsys: Any
) -> None:
    # Batches are counted from 1; the first is read to see that it can be.
    state = train(tmp_path, program, Spoiled(range(5, 8), np.nan), max_skipped_steps=4)
    # Adam has counted the others.
    assert int(state.opt_state[1].count) == NUM_STEPS - 3
    said = " ".join(capsys.readouterr().err.split())
    assert "step 5 is skipped: the loss is nan, the norm of its gradient nan" in said
    assert re.search(r"step 6/12 error \S+ 2 steps skipped", said)
    assert re.search(r"step 9/12 error \S+ 1 steps skipped", said)
    written = (tmp_path / "skipped_steps.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    assert [line["step"] for line in lines] == [5, 6, 7]
    assert lines[0]["loss"] == "nan"
    assert lines[0]["samples"] == [f"photo_{i}.jpg" for i in range(8)]
    assert np.isfinite(restore_variables(tmp_path)["params"]["color"]).all()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, r"the loss of 1 of 8 images is not finite \(2 rounds\):\n  photo_5.jpg: near in "),
        (1e4, r"1 of 8 images .*\n  photo_5.jpg: far in round 2$"),
        (0.0, r"the loss is finite, and its gradient is not, by\n  color: 3 of 3 values$"),
    ],
)
def test_too_many_in_a_row_end_the_run_with_the_reason(
    program: CompiledStep, tmp_path: Path, value: float, words: str
) -> None:
    with pytest.raises(DivergedError, match=words) as caught:
        train(tmp_path, program, Spoiled(range(5, 99), value), max_skipped_steps=3)
    # Steps 5, 6 and 7; nothing of them was kept.
    assert "3 steps in a row were skipped, the last of them step 7: " in str(caught.value)
    assert "are still those after step 4" in str(caught.value)


def test_parameters_that_are_not_finite_are_named(
    program: CompiledStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {"params": {"color": jnp.array([1.0, jnp.inf, jnp.nan])}, "constants": {}}
    monkeypatch.setattr(InRounds, "load", lambda *_: bad)
    with pytest.raises(DivergedError, match=r"before the step:\n  color: 2 of 3 values"):
        train(tmp_path, program, Spoiled(range(0), 0), init_from="x", max_skipped_steps=1)


def test_one_skipped_step_is_the_least_that_can_be_too_many() -> None:
    with pytest.raises(ConfigError, match="max_skipped_steps must be at least 1, got 0"):
        from_mapping(TrainConfig, {"num_steps": 3, "max_skipped_steps": 0}, "train")
