"""Sizes, calls and arithmetic that the TPU kernels share."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

# Columns and rows of 32-bit numbers in a vector register.
LANES = 128
SUBLANES = 8
# On-chip memory (VMEM) of a kernel: inputs fetched for the next step, and some blocks of logits.
VMEM_LIMIT_BYTES = 100 * 2**20
# Image tokens per step of the grid: more of them hide each other's latency better.
_BLOCKS = (2048, 1024, 512, 256, LANES)


def tile_size(num_tokens: int) -> int:
    """Tokens of a kernel's step: the largest of ``_BLOCKS`` that divides ``num_tokens``."""
    return next(block for block in _BLOCKS if num_tokens % block == 0)


def whole(*shape: int) -> pl.BlockSpec:
    """The same whole array in every step."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def wholes(arrays: Iterable[jax.Array]) -> tuple[pl.BlockSpec, ...]:
    """``whole`` of each of some arrays."""
    return tuple(whole(*x.shape) for x in arrays)


def fused_call(
    kernel: Callable[..., None],
    inputs: Any,
    in_specs: Any,
    outputs: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    *,
    grid: tuple[int, ...],
    flops: int,
    transcendentals: int = 0,
    scratch: Sequence[Any] = (),
    last_axis: str = "arbitrary",
    interpret: Any,
    name: str,
) -> Sequence[jax.Array]:
    """Outputs of a kernel that runs once for each step of a grid.

    Steps along the last axis of the grid follow one another, unless that is said to be "parallel";
    the others may be any core's.

    Args:
      kernel: ``kernel(inputs, outputs, *scratch)`` of references, the inputs in their tree.
      inputs: a tree of arrays.
      in_specs: their blocks, in the same tree.
      outputs: shapes and blocks.
      grid: steps.
      flops, transcendentals: of all steps, for the compiler's schedule and for cost reports.
      scratch: shapes of memory that steps share.
      last_axis: "arbitrary" or "parallel".
      interpret: whether to run it without a TPU, slowly; or parameters of the simulator.
      name: of the kernel.
    """
    leaves, tree = jax.tree.flatten(inputs)
    shapes = [shape for shape, _ in outputs]

    def on_refs(*refs):
        num_in, num_out = len(leaves), len(shapes)
        kernel(
            jax.tree.unflatten(tree, refs[:num_in]),
            refs[num_in : num_in + num_out],
            *refs[num_in + num_out :],
        )

    return pl.pallas_call(
        on_refs,
        grid=grid,
        in_specs=jax.tree.leaves(in_specs, is_leaf=lambda x: isinstance(x, pl.BlockSpec)),
        out_specs=[spec for _, spec in outputs],
        out_shape=shapes,
        scratch_shapes=list(scratch),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(*("parallel",) * (len(grid) - 1), last_axis),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=transcendentals,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*leaves, *shapes)),
        ),
        interpret=interpret,
        name=name,
    )(*leaves)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def kernel_gelu(x: jax.Array, rounded_to: DTypeLike) -> jax.Array:
    """The exact GELU in float32, to 1e-7 of its input; value and slope share what they can.

    Where it will be rounded to half precision, to 3e-5 and its slope to 2e-4, for half of the
    instructions: a hundredth of what rounding does to a value of 1.

    Source: Abramowitz and Stegun 1964, 7.1.26, for the normal distribution's tail.
    """
    return _gelu_and_slope(x, rounded_to)[0]


def _gelu_and_slope(x, rounded_to):
    if rounded_to == jnp.float32:
        t = 1.0 / (1.0 + _TAIL_RATE * jnp.abs(x))
        bell = jnp.exp(-0.5 * jnp.square(x))
        polynomial = jnp.zeros_like(x)
        for coefficient in _TAIL[::-1]:
            polynomial = (polynomial + coefficient) * t
        tail = polynomial * bell
        below = jnp.where(x < 0, tail, 1.0 - tail)
    else:
        # Beyond x = 8 the result is 0 or 1, and the polynomial would change its direction.
        square = jnp.minimum(jnp.square(x), 64.0)
        bell = jnp.exp(-0.5 * square)
        polynomial = (_LOGIT[2] * square + _LOGIT[1]) * square + _LOGIT[0]
        below = 0.5 * jnp.tanh(polynomial * x) + 0.5
    return x * below, below + x * bell * np.float32((2 * np.pi) ** -0.5)


# Coefficients of half the complementary error function of x / sqrt(2).
_TAIL_RATE = np.float32(0.3275911 * 0.5**0.5)
_TAIL = 0.5 * np.array([0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429])
_TAIL = _TAIL.astype(np.float32)
# Coefficients of logit(normal CDF(x)) / (2 x), fitted for the least error of GELU.
_LOGIT = np.array([0.797507841, 3.70056829e-2, -3.51522488e-4], np.float32)

kernel_gelu.defvjp(_gelu_and_slope, lambda _, slope, d_out: (d_out * slope,))
