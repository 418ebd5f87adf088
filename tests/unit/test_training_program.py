"""What travels between devices in a compiled training step, and what must not."""

import math
from pathlib import Path

import jax
import pytest

from sam_jax import hlo
from sam_jax.training.program import TrainProgram
from sam_jax.training.recipe import Recipe, read_config

CONFIG = str(Path(__file__).parents[1] / "e2e" / "tiny_run.py")
BATCH_SIZE, MAX_MASKS = 8, 4
# One correction and two rounds of masks alone.
NUM_LATER_ROUNDS = 3


def build(*settings: str) -> TrainProgram:
    return Recipe.of(read_config(CONFIG, settings)).program()


def transfers(program: TrainProgram) -> list[hlo.Collective]:
    batch = program.placed_batch(BATCH_SIZE, MAX_MASKS)
    # Who sends what is settled before machine code is made, which may be bad.
    compiled = program.step.lower(program.placed_state, batch).compile(
        compiler_options={"xla_backend_optimization_level": 0}
    )
    return hlo.collectives(compiled.as_text())


def nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "axes",
    [{"data": 8, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 4, "tensor": 1}],
    ids=["data-parallel", "fsdp"],
)
def test_only_weights_and_their_gradients_travel(axes: dict[str, int]) -> None:
    """Weights are gathered a kernel at a time, gradients summed, and images stay where they are."""
    program = build(*(f"sharding.{axis}={size}" for axis, size in axes.items()))
    params = program.state_shapes.params
    blocks = [params["image_encoder"][f"block_{index:02d}"] for index in range(2)]
    largest = max(map(nbytes, jax.tree.leaves(blocks)))
    tokens = math.prod(program.model.config.image_encoder.grid) * 16 * 4
    found = transfers(program)
    by_kind = {kind: [c for c in found if c.kind == kind] for kind in hlo.COLLECTIVES}

    gathered = [c for c in by_kind["all-gather"] if c.num_bytes > 1024]
    assert bool(gathered) == (axes["fsdp"] > 1)
    for collective in gathered:
        # Neither all parameters nor the tokens of the batch.
        assert collective.num_bytes <= largest < min(nbytes(params), BATCH_SIZE * tokens)
    # Four kernels of each of two blocks; for the forward and at most once more for the backward
    # pass, and the table of positions.
    assert sum(c.count for c in gathered) <= 2 * 2 * 4 + 2

    summed = sum(c.num_bytes * c.count for c in by_kind["all-reduce"])
    # Gradients once, with what is reported. A CPU's compiler leaves those of the later rounds,
    # which are the decoder's alone, inside their loop.
    rounds = nbytes((params["mask_decoder"], params["prompt_encoder"]))
    assert summed <= 1.1 * (nbytes(params) + NUM_LATER_ROUNDS * rounds)
    for kind in ("all-to-all", "collective-permute", "ragged-all-to-all"):
        # Random numbers at most.
        assert all(c.num_bytes <= 1024 for c in by_kind[kind]), kind


def test_what_is_on_a_device() -> None:
    """Moments lie where their parameters do, in a quarter of their size."""
    program = build("sharding.data=2", "sharding.fsdp=4")
    shardings = program.state_shardings
    moments = shardings.opt_state[1]
    assert moments.mu == moments.nu == shardings.params
    kernel = program.placed_state.params["image_encoder"]["block_00"]["mlp"]["dense_0"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 64)
    batch = program.placed_batch(BATCH_SIZE, MAX_MASKS)
    assert {x.sharding.shard_shape(x.shape)[0] for x in jax.tree.leaves(batch)} == {1}
