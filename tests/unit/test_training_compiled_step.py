"""A compiled training step: what travels between devices, and that it does what one device does."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sam_jax import hlo
from sam_jax.data.pipeline import train_iterator
from sam_jax.errors import ConfigError
from sam_jax.parallel import all_gathered
from sam_jax.training.compiled_step import CompiledStep
from sam_jax.training.experiment import Experiment, read_config
from sam_jax.training.state import TrainState
from tests.e2e.tiny_run import ONE_ROUND
from tests.golden.tiny import random_variables

CONFIG = str(Path(__file__).parents[1] / "e2e" / "tiny_run.py")
BATCH_SIZE, MAX_MASKS = 8, 4


def experiment(*settings: str) -> Experiment:
    return Experiment.of(read_config(CONFIG, (f"data.max_masks={MAX_MASKS}", *settings)))


def build(*settings: str) -> CompiledStep:
    return experiment(*settings).compiled_step()


def compiled(program: CompiledStep) -> Any:
    """The compiled step; its machine code may be slow, since only what comes before it is read."""
    batch = program.placed_batch(BATCH_SIZE)
    return program.step.lower(program.placed_state, batch).compile(
        compiler_options={"xla_backend_optimization_level": 0}
    )


def nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


DECAY = 0.6


class Compiled(NamedTuple):
    """A step on devices that share images."""

    program: CompiledStep
    step: Any


@pytest.fixture(scope="module")
def shared() -> Compiled:
    """Devices of every kind: different images, pieces of the state, parts of an image."""
    axes = ("sharding.data=2", "sharding.fsdp=2", "sharding.tensor=2")
    program = build(*axes, f"train.ema_decay={DECAY}")
    return Compiled(program, compiled(program))


def test_only_gradients_travel_where_all_devices_have_all_weights() -> None:
    # An average lies where the parameters do, so nothing of it travels.
    program = build("sharding.data=8", *ONE_ROUND, f"train.ema_decay={DECAY}")
    assert program.task.prompts.num_rounds == 1
    found = hlo.collectives(compiled(program).as_text())
    assert not [c for c in found if c.kind == "all-gather" and c.num_bytes > 1024]
    assert_gradients_travel_once(program, found)


def test_only_weights_and_gradients_travel_where_all_is_shared(shared: Compiled) -> None:
    """Weights are gathered a kernel at a time, and images stay where they are."""
    program = shared.program
    params = program.state_shapes.params
    blocks = [params["image_encoder"][f"block_{index:02d}"] for index in range(2)]
    largest = max(map(nbytes, jax.tree.leaves(blocks)))
    tokens = math.prod(program.task.model.config.image_encoder.grid) * 16 * 4
    found = hlo.collectives(shared.step.as_text())
    gathered = [c for c in found if c.kind == "all-gather" and c.num_bytes > 1024]
    assert gathered
    for collective in gathered:
        # Neither all parameters nor the tokens of the batch.
        assert collective.num_bytes <= largest < min(nbytes(params), BATCH_SIZE * tokens)
    # Four kernels of each of two blocks; for the forward and at most once more for the backward
    # pass, and the table of positions.
    assert sum(c.count for c in gathered) <= 2 * 2 * 4 + 2
    assert_gradients_travel_once(program, found)


def assert_gradients_travel_once(program: CompiledStep, found: Sequence[hlo.Collective]) -> None:
    """Gradients once, with what is reported, and nothing else of size."""
    params = program.state_shapes.params
    summed = sum(c.num_bytes * c.count for c in found if c.kind == "all-reduce")
    # A CPU's compiler leaves those of the later rounds, which are the decoder's alone, inside their
    # loop.
    of_round = nbytes((params["mask_decoder"], params["prompt_encoder"]))
    num_later_rounds = program.task.prompts.num_rounds - 1
    assert summed <= 1.1 * (nbytes(params) + num_later_rounds * of_round)
    for kind in ("all-to-all", "collective-permute", "ragged-all-to-all"):
        # Random numbers at most.
        assert all(c.num_bytes <= 1024 for c in found if c.kind == kind), kind


def test_what_is_on_a_device() -> None:
    """Moments and averages lie where their parameters do, in a quarter of their size."""
    program = build("sharding.data=2", "sharding.fsdp=4", "train.ema_decay=0.99")
    shardings = program.state_shardings
    moments = shardings.opt_state[1]
    assert moments.mu == moments.nu == shardings.params == shardings.ema_params
    for tree in (program.placed_state.params, program.placed_state.ema_params):
        kernel = tree["image_encoder"]["block_00"]["mlp"]["dense_0"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) == (4, 64)
    batch = program.placed_batch(BATCH_SIZE)
    assert {x.sharding.shard_shape(x.shape)[0] for x in jax.tree.leaves(batch)} == {1}


NUM_STEPS = 3


class History(NamedTuple):
    """Parameters and metrics after each of some steps, and the last state where it lies."""

    params: list[Any]
    metrics: list[dict[str, float]]
    state: TrainState


def train(program: CompiledStep, step: Any) -> History:
    data = train_iterator(experiment().data)
    # Without an initialiser to compile; runs of tests/e2e compare what that gives.
    state = program.state_from(random_variables(program.task.model.config))
    # Copies, as a step takes the memory of what it is given.
    history = History([jax.tree.map(np.array, state.params)], [], state)
    for _ in range(NUM_STEPS):
        fields = next(data)
        fields = {name: fields[name] for name in program.task.batch_spec(1)}
        state, metrics = step(state, jax.device_put(fields, program.batch_sharding))
        history.params.append(jax.tree.map(np.array, state.params))
        history.metrics.append({name: float(value) for name, value in metrics.items()})
    data.close()
    return history._replace(state=state)


@pytest.fixture(scope="module")
def on_eight(shared: Compiled) -> History:
    return train(*shared)


def test_devices_that_share_images_do_what_one_does(on_eight: History) -> None:
    kernel = on_eight.state.params["image_encoder"]["block_00"]["mlp"]["dense_0"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 32)
    program = experiment(f"train.ema_decay={DECAY}").compiled_step(jax.devices()[:1])
    on_one = train(program, compiled(program))
    for ours, theirs in zip(on_eight.metrics, on_one.metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "focal", "dice", "iou_mse", "gradient_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        # Adam makes whole steps of gradients that are rounding.
        assert ours["update_norm"] == pytest.approx(theirs["update_norm"], rel=1e-3)


def test_an_average_is_the_sum_that_its_decay_says(on_eight: History) -> None:
    """d^n p_0 + (1 - d) (d^(n - 1) p_1 + ... + p_n), in the places of the parameters."""
    weights = [DECAY**NUM_STEPS, *((1 - DECAY) * DECAY**k for k in reversed(range(NUM_STEPS)))]
    assert sum(weights) == pytest.approx(1)
    expected = jax.tree.map(
        lambda *params: sum(w * p for w, p in zip(weights, params, strict=True)), *on_eight.params
    )
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7),
        on_eight.state.ema_params,
        expected,
    )
    jax.tree.map(
        lambda average, trained: average.sharding == trained.sharding or pytest.fail("elsewhere"),
        on_eight.state.ema_params,
        on_eight.state.params,
    )
    moved = [
        not np.array_equal(*pair)
        for pair in zip(
            jax.tree.leaves(on_eight.state.ema_params),
            jax.tree.leaves(on_eight.params[-1]),
            strict=True,
        )
    ]
    assert np.mean(moved) > 0.9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_split_weights_are_summed_in_the_type_asked_for(dtype: str) -> None:
    """Each of four devices adds 1 + 2^-9, of which bfloat16 keeps 1; the weight's type stays."""
    program = build("sharding.data=2", "sharding.fsdp=4", f"sharding.reduce_dtype={dtype}")
    parallel = program.parallel
    assert parallel.reduce_dtype == dtype
    axis = parallel.weights_axis
    shards = PartitionSpec(axis)

    def gradient_of_shard(shard: jax.Array) -> jax.Array:
        return jax.grad(
            lambda x: jnp.sum((1 + 2.0**-9) * all_gathered(x, axis, 0, parallel.reduce_dtype))
        )(shard)

    found = parallel.on_each_device(gradient_of_shard, [shards], shards)(jnp.ones((8, 3)))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, 4.0 if dtype == "bfloat16" else 4 + 2.0**-7)


def test_a_type_that_gradients_are_not_summed_in_is_refused() -> None:
    with pytest.raises(ConfigError, match="reduce_dtype must be 'float32' or 'bfloat16', got 'b"):
        build("sharding.reduce_dtype=bf16")


def test_masks_that_cannot_be_shared_are_refused() -> None:
    program = build("sharding.data=4", "sharding.tensor=2", "data.max_masks=3")
    with pytest.raises(ConfigError, match="max_masks = 3 does not divide by the 2 devices"):
        program.step.lower(program.placed_state, program.placed_batch(BATCH_SIZE))
