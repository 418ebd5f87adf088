"""Trained parameters: chosen, and the only ones that gradients, moments and averages are of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.checkpoint import CheckpointConfig, CheckpointError, restore_variables
from sam_jax.errors import ConfigError
from sam_jax.sharding import ShardingConfig
from sam_jax.trained_parameters import part_at, select_trained, with_part
from sam_jax.training import loop
from sam_jax.training.compiled_step import CompiledStep, compile_step
from sam_jax.training.experiment import TrainConfig
from sam_jax.training.optimizer import OptimizerConfig, build_optimizer
from sam_jax.training.state import init_state
from sam_jax.training.step import build_train_step
from tests.unit.test_training_task import MeanColor, Pixels

PARAMS = {
    "image_encoder": {"block_00": {"kernel": 1, "bias": 2}, "neck": 3},
    "mask_decoder": {"tokens": 4},
}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("all",), PARAMS),
        (("decoder",), {"mask_decoder": {"tokens": 4}}),
        ((r"block_\d+/bias$",), {"image_encoder": {"block_00": {"bias": 2}}}),
        (("decoder", "neck"), {"image_encoder": {"neck": 3}, "mask_decoder": {"tokens": 4}}),
    ],
)
def test_patterns_choose_a_part_of_the_tree(patterns: tuple[str, ...], expected: Any) -> None:
    part = select_trained(PARAMS, patterns)
    assert part == expected
    assert part_at(PARAMS, part) == expected
    assert with_part(PARAMS, jax.tree.map(lambda x: x, part)) == PARAMS


def test_a_part_takes_the_place_of_what_was_there() -> None:
    changed = with_part(PARAMS, {"image_encoder": {"neck": 30}})
    assert changed["image_encoder"] == {"block_00": {"kernel": 1, "bias": 2}, "neck": 30}
    assert PARAMS["image_encoder"]["neck"] == 3
    assert part_at(PARAMS, None) is PARAMS


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("decoder", "blocks"), "'blocks' matches none .* such as image_encoder/block_00/bias"),
        (("lora",), "'lora' matches none .*lora.rank = 0 makes no adapters"),
        (("(",), r"'\(' is no regular expression"),
        ((), "nothing would be trained"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(patterns: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_trained(PARAMS, patterns)


class ColorAndOffset(MeanColor):
    """The mean colour as a sum of two vectors, of which one may be frozen."""

    def init(self, key: Any) -> dict[str, Any]:
        params = {"color": jnp.zeros(3), "offset": jnp.full(3, 0.5)}
        return {"params": params, "constants": {}}

    def loss_sums(self, parallel: Any, param_specs: Any) -> Any:
        def sums(params: Any, constants: Any, batch: Mapping[str, Any], key: Any) -> Any:
            error = batch["pixels"] - params["color"] - params["offset"]
            loss = jnp.sum(jnp.square(error))
            return loss, {"loss": loss}

        return sums


def program_of(*trainable: str, num_steps: int = 4, ema_decay: float = 0.5) -> CompiledStep:
    return compile_step(
        ColorAndOffset(),
        num_steps=num_steps,
        seed=0,
        ema_decay=ema_decay,
        optimizer_config=OptimizerConfig(
            peak_learning_rate=0.1, warmup_steps=1, clip_norm=1.0, accumulate_steps=2
        ),
        sharding_config=ShardingConfig(data=1),
        trainable=trainable,
        devices=jax.devices()[:1],
    )


def train(workdir: Path, program: CompiledStep, num_steps: int) -> Any:
    return loop.train(
        workdir=workdir,
        compiled_step=program,
        config=TrainConfig(num_steps, log_every=10, eval_every=0, ema_decay=0.5),
        batch_size=8,
        data_iterator=Pixels(),
        checkpoint_config=CheckpointConfig(every_steps=2),
        evaluators={},
    )


def test_only_trained_parameters_move_and_take_memory(tmp_path: Path, capsys: Any) -> None:
    program = program_of("color")
    assert list(program.state_shapes.opt_state[1].mu) == ["color"]
    assert list(program.state_shapes.ema_params) == ["color"]
    state = train(tmp_path, program, 4)
    assert "of 0.0 M parameters are trained (3)" in " ".join(capsys.readouterr().err.split())
    np.testing.assert_array_equal(state.params["offset"], 0.5)
    assert np.all(state.params["color"] != 0)
    # The checkpoint is of the whole model all the same, as it is and with its average.
    for ema, variables in ((False, state.variables), (True, state.evaluated_variables)):
        kept = restore_variables(tmp_path, ema=ema)["params"]
        jax.tree.map(np.testing.assert_array_equal, kept, variables["params"])
    average = state.evaluated_variables["params"]["color"]
    assert np.all(average != state.params["color"])


def test_a_run_with_frozen_parameters_continues_exactly(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", program_of("color"), 4)
    train(tmp_path / "halves", program_of("color"), 2)
    again = train(tmp_path / "halves", program_of("color"), 4)
    jax.tree.map(np.testing.assert_array_equal, straight, again)
    # Moments of other parameters are none of these.
    with pytest.raises(CheckpointError, match=r"mu/offset: nothing there, \(3,\) here"):
        train(tmp_path / "halves", program_of("all", num_steps=6), 6)


class Linear(MeanColor):
    """Two products, one after the other."""

    def init(self, key: Any) -> dict[str, Any]:
        params = {"image_encoder": jnp.ones((3, 5)), "mask_decoder": jnp.ones((5, 2))}
        return {"params": params, "constants": {}}

    def loss_sums(self, parallel: Any, param_specs: Any) -> Any:
        def sums(params: Any, constants: Any, batch: Mapping[str, Any], key: Any) -> Any:
            embeddings = jnp.tanh(batch["pixels"] @ params["image_encoder"])
            loss = jnp.sum(embeddings @ params["mask_decoder"])
            return loss, {"loss": loss}

        return sums


@pytest.mark.parametrize(
    ("trainable", "num_products"),
    [
        # Two forward; backward one for each weight, and one from the second layer to the first.
        ("all", 5),
        ("mask_decoder", 3),
        ("image_encoder", 4),
    ],
)
def test_nothing_is_differentiated_that_is_not_trained(trainable: str, num_products: int) -> None:
    task = Linear()
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    trained = select_trained(shapes["params"], (trainable,))
    optimizer = build_optimizer(
        shapes["params"], OptimizerConfig(weight_decay=0.0), 1000, trained=trained
    )
    state = jax.eval_shape(lambda v: init_state(v, optimizer, trained=trained), shapes)
    step = build_train_step(task, optimizer, seed=0, trained=trained)
    jaxpr = jax.make_jaxpr(step)(state, task.batch_spec(2))
    assert str(jaxpr).count("dot_general") == num_products
