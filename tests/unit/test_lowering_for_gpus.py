"""Programs for NVIDIA GPUs, lowered on a machine without one: what they call, and what not."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from sam_jax.ops.attention import GRID_ATTENTION, Implementation, grid_attention
from sam_jax.ops.dispatch import Target, tracing_for
from sam_jax.training.experiment import Experiment, read_config

FORWARD, BACKWARD = "@__cudnn$fmhaSoftmax(", "@__cudnn$fmhaSoftmaxBackward("


@contextlib.contextmanager
def a_gpu_of(capability: tuple[int, int]) -> Iterator[None]:
    """Programs are lowered as on a machine with such a GPU; JAX asks for its own otherwise."""
    place = "jax._src.cudnn.fused_attention_stablehlo"
    asked = {
        f"{place}.check_cudnn_version": lambda: 91200,
        f"{place}.check_compute_capability": (
            lambda least: capability >= tuple(map(int, least.split(".")))
        ),
        f"{place}.is_cuda_compute_capability_equal": (
            lambda which: capability == tuple(map(int, which.split(".")))
        ),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in asked.items():
            stack.enter_context(mock.patch(name, answer))
        target = Target("gpu", capability)
        stack.enter_context(mock.patch.object(Target, "of", return_value=target))
        stack.enter_context(tracing_for(target))
        yield


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [(12, 64), (16, 64), (16, 80)], ids=["vit_b", "vit_l", "vit_h"]
)
@pytest.mark.parametrize("grid", [(64, 64), (14, 14)], ids=["everywhere", "windows"])
def test_a_gpus_program_is_lowered_without_one(
    capability: tuple[int, int], heads: int, head_dim: int, grid: tuple[int, int]
) -> None:
    """Forward and backward by cuDNN where it is chosen; a TPU's kernel could not be lowered."""
    qkv = jax.ShapeDtypeStruct((1, *grid, 3 * heads * head_dim), jnp.bfloat16)
    tables = [jax.ShapeDtypeStruct((2 * side - 1, head_dim), jnp.float32) for side in grid]

    def loss(qkv: Any, *tables: Any) -> Any:
        return jnp.sum(grid_attention(qkv, *tables, heads)).astype(jnp.float32)

    with a_gpu_of(capability):
        chosen = GRID_ATTENTION.choose(qkv, *tables, heads).name
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(qkv, *tables)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    by_cudnn = chosen == "cudnn"
    assert by_cudnn == (grid == (14, 14) or capability == (9, 0))
    for target in (FORWARD, BACKWARD):
        assert (target in text) == by_cudnn
    assert "tpu_custom_call" not in text


@pytest.mark.parametrize("implementation", ["window_kernel", "flash_kernel"])
def test_a_tpu_kernel_in_a_gpus_program_would_be_found(implementation: Implementation) -> None:
    grid = (14, 14) if implementation == "window_kernel" else (64, 64)
    with tracing_for(Target("tpu", described=True)):
        traced = jax.jit(
            lambda qkv: grid_attention(qkv, None, None, 12, implementation=implementation)
        ).trace(jax.ShapeDtypeStruct((1, *grid, 3 * 12 * 64), jnp.bfloat16))
    # The second where another test has loaded Pallas for GPUs.
    said = "Cannot lower pallas_call|for platform tpu cannot be used for gpu lowering"
    with pytest.raises(ValueError, match=said):
        traced.lower(lowering_platforms=("cuda",))


def test_a_whole_training_step_is_lowered() -> None:
    """Both blocks of the encoder by cuDNN in both passes, and no other kernel."""
    config = str(Path(__file__).parents[1] / "e2e" / "tiny_run.py")
    with a_gpu_of((9, 0)):
        experiment = Experiment.of(
            read_config(
                config, ["model.dtype=bfloat16", "prompts.num_corrections=0", "data.max_masks=2"]
            )
        )
        program = experiment.compiled_step(jax.devices()[:1])
        traced = program.step.trace(program.placed_state, program.placed_batch(2))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert {call: text.count(call) for call in (FORWARD, BACKWARD)} == {FORWARD: 2, BACKWARD: 2}
    assert text.count("custom_call @") == 4
