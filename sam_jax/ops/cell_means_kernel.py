"""A TPU kernel for tokens that look at the cells of their object, forward and backward.

Where tokens are brought through the projections of the cells (``models.token_attention``), keys are
the cells with their positions and values the cells themselves: an object's 2 MB are read once and
used twice. Logits lie on their side, cells in the lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sam_jax.arrays import Array, Float
from sam_jax.ops.cell_kernel import each_block, each_object
from sam_jax.ops.tpu_kernel import (
    LANES,
    SUBLANES,
    VMEM_LIMIT_BYTES,
    WORTH_KEEPING,
    block_of,
    product,
)


def supports(num_cells: int, num_rows: int, dim: int) -> bool:
    """Whether cells, rows and channels fill whole registers."""
    return num_cells % LANES == 0 and num_rows % (2 * SUBLANES) == 0 and dim % LANES == 0


def cell_means(
    rows: Float[Array, "objects f d"],
    cells: Float[Array, "objects cells d"],
    positions: Float[Array, "cells d"],
    *,
    interpret: bool,
) -> tuple[Float[Array, "objects f d"], Float[Array, "objects cells d"]]:
    """Means of cells, weighed by the softmax of their products with each row; and the cells.

    What follows should use these cells: then the kernel adds up their gradients, which would take
    more time by themselves.

    Args:
      rows: what asks; logits are ``rows . (cells + positions)``.
      cells: of each object.
      positions: encodings of the cells, without a gradient.
      interpret: whether to run it without a TPU, slowly.
    """
    return _means(interpret, rows, cells, positions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _means(interpret, rows, cells, positions):
    return _forward(interpret, rows, cells, positions)[0], cells


def _forward(interpret, rows, cells, positions):
    objects, num_rows, dim = rows.shape
    return pl.pallas_call(
        _forward_kernel,
        grid=(objects, cells.shape[1] // block_of(cells.shape[1])),
        in_specs=_input_specs(rows, cells, positions),
        out_specs=[each_object((num_rows, dim)), each_object((num_rows, LANES))],
        out_shape=[
            jax.ShapeDtypeStruct(rows.shape, rows.dtype),
            jax.ShapeDtypeStruct((objects, num_rows, LANES), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((num_rows, LANES), jnp.float32),
            pltpu.VMEM((num_rows, LANES), jnp.float32),
            pltpu.VMEM((num_rows, dim), jnp.float32),
        ],
        compiler_params=_compiler_params(),
        cost_estimate=_cost(rows, cells, products=2),
        interpret=interpret,
        name="cell_means",
    )(rows, cells, positions)


def _means_forward(interpret, rows, cells, positions):
    found = _forward(interpret, rows, cells, positions)
    means, log_sums = checkpoint_name(found, WORTH_KEEPING)
    return (means, cells), (rows, cells, positions, means, log_sums)


def _means_backward(interpret, residuals, cotangents):
    d_means, d_cells = cotangents
    rows, cells, positions, means, log_sums = residuals
    # What softmax's gradient subtracts: the mean of the weights' gradients.
    offsets = jnp.sum(d_means.astype(jnp.float32) * means.astype(jnp.float32), axis=-1)
    offsets = jnp.broadcast_to(offsets[..., None], log_sums.shape)
    num_rows, dim = rows.shape[1:]
    d_rows, d_cells = pl.pallas_call(
        _backward_kernel,
        grid=(rows.shape[0], cells.shape[1] // block_of(cells.shape[1])),
        in_specs=[
            *_input_specs(rows, cells, positions),
            each_object((num_rows, LANES)),
            each_object((num_rows, LANES)),
            each_object((num_rows, dim)),
            each_block(cells),
        ],
        out_specs=[
            each_object((num_rows, dim)),
            each_block(cells),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(rows.shape, jnp.float32),
            jax.ShapeDtypeStruct(cells.shape, cells.dtype),
        ],
        compiler_params=_compiler_params(),
        cost_estimate=_cost(rows, cells, products=5),
        interpret=interpret,
        name="cell_means_backward",
    )(rows, cells, positions, log_sums, offsets, d_means, d_cells)
    return d_rows.astype(rows.dtype), d_cells, None


_means.defvjp(_means_forward, _means_backward)


def _input_specs(rows, cells, positions):
    of_step = pl.BlockSpec((block_of(cells.shape[1]), cells.shape[2]), lambda i, j: (j, 0))
    return [each_object(rows.shape[1:]), each_block(cells), of_step]


def _compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
    )


def _cost(rows: Array, cells: Array, products: int) -> pl.CostEstimate:
    logits = rows.shape[0] * rows.shape[1] * cells.shape[1]
    return pl.CostEstimate(
        flops=2 * products * logits * cells.shape[2],
        transcendentals=logits,
        bytes_accessed=cells.size * cells.dtype.itemsize * (1 if products == 2 else 2),
    )


def _forward_kernel(rows, cells, positions, means, log_sums, largest, total, weighed):
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        largest[...] = jnp.full_like(largest, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        weighed[...] = jnp.zeros_like(weighed)

    values = cells[0]
    logits = product(rows[0], values + positions[...], (1, 1))
    before = largest[:, :1]
    now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    shrink = jnp.exp(before - now)
    weights = jnp.exp(logits - now)
    sums = shrink * total[:, :1] + jnp.sum(weights, axis=1, keepdims=True)
    largest[...] = jnp.broadcast_to(now, largest.shape)
    total[...] = jnp.broadcast_to(sums, total.shape)
    weighed[...] = shrink * weighed[...] + product(weights.astype(values.dtype), values, (1, 0))

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        means[0] = (weighed[...] / total[:, :1]).astype(means.dtype)
        log_sums[0] = largest[...] + jnp.log(total[...])


def _backward_kernel(rows, cells, positions, log_sums, offsets, d_means, d_after, d_rows, d_cells):
    @pl.when(pl.program_id(1) == 0)
    def _():
        d_rows[...] = jnp.zeros_like(d_rows)

    values = cells[0]
    keys = values + positions[...]
    weights = jnp.exp(product(rows[0], keys, (1, 1)) - log_sums[0, :, :1])
    d_weights = product(d_means[0], values, (1, 1))
    d_logits = (weights * (d_weights - offsets[0, :, :1])).astype(values.dtype)
    d_rows[0] += product(d_logits, keys, (1, 0))
    d_cell = d_after[0].astype(jnp.float32)
    d_cell += product(weights.astype(values.dtype), d_means[0], (0, 0))
    d_cells[0] = (d_cell + product(d_logits, rows[0], (0, 0))).astype(d_cells.dtype)
