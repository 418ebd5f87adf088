"""Turns what each object's maps say of cells into TPU kernels, forward and backward.

Maps are a few numbers for each cell of an object, such as the logits of its mask; cells are wide.
Made by separate products, sums and norms, and added to the image that all objects share, the cells
of all objects, 2 MB each, would pass through the chip's memory several times. Here they are written
once. Backwards they are read once: the kernel makes its hidden numbers again, which are few, and
adds up what all objects say of the image's cells before it lets go of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sam_jax.arrays import Array, Bool, Float
from sam_jax.ops.tpu_kernel import LANES, SUBLANES, block_of, call_on_trees


@dataclasses.dataclass(frozen=True)
class MapFunction:
    """What is made of some cells of one object.

    Attributes:
      apply: ``apply(weights, maps, is_valid)``: a tuple of matrices, ``maps`` [rows, block], and
        whether the object has maps [1, 1]. Returns ``[block, d]`` in float32.
      name: of the kernels.
      flops_per_cell: of one cell, forward.
    """

    apply: Callable[..., Array]
    name: str
    flops_per_cell: int


def supports(num_cells: int, dim: int, channels: int) -> bool:
    """Whether cells, their channels and those in between fill whole registers."""
    return num_cells % LANES == 0 and dim % LANES == 0 and channels % (2 * SUBLANES) == 0


def add_of_maps(
    function: MapFunction,
    weights: tuple[Float[Array, "_ _"], ...],
    maps: Float[Array, "b p rows cells"],
    shared: Float[Array, "b cells d"],
    maps_valid: Bool[Array, "b p"],
    *,
    interpret: bool,
) -> Float[Array, "b p cells d"]:
    """Cells that an image's objects share, plus ``function`` of each object's maps.

    Differentiable in weights, maps and shared cells.

    Args:
      function: what is made of maps.
      weights: matrices that are the same for all objects.
      maps: of each object.
      shared: cells of each image.
      maps_valid: which objects have maps.
      interpret: whether to run it without a TPU, slowly.
    """
    valid = jnp.broadcast_to(
        maps_valid.astype(jnp.int32)[..., None, None], (*maps_valid.shape, 1, LANES)
    )
    return _add(_Static(function, interpret), weights, maps, shared, valid)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What the kernels know when they are compiled."""

    function: MapFunction
    interpret: bool


def _call(static: _Static, kernel: Any, inputs: Any, specs: Any, outputs: Any, *, passes: int):
    """``kernel`` of references, for each object, for each block of cells, for each image.

    Objects come last, so that an image's cells stay where they are until all have been there.
    """
    b, p, _, num_cells = inputs[1].shape
    return call_on_trees(
        kernel,
        inputs,
        specs,
        outputs,
        grid=(b, num_cells // block_of(num_cells), p),
        flops=passes * static.function.flops_per_cell * b * p * num_cells,
        interpret=static.interpret,
        name=static.function.name + ("_backward" if passes > 1 else ""),
    )


def _same(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda i, j, k: (0, 0))


def _of_maps(maps: Array) -> pl.BlockSpec:
    return pl.BlockSpec(
        (1, 1, maps.shape[2], block_of(maps.shape[3])), lambda i, j, k: (i, k, 0, j)
    )


def _of_validity() -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, 1, LANES), lambda i, j, k: (i, k, 0, 0))


def _of_shared(maps: Array, dim: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, block_of(maps.shape[3]), dim), lambda i, j, k: (i, j, 0))


def _of_cells(maps: Array, dim: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, block_of(maps.shape[3]), dim), lambda i, j, k: (i, k, j, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add(static: _Static, weights, maps, shared, valid):
    b, p, _, num_cells = maps.shape
    dim = shared.shape[-1]

    def kernel(inputs, outputs):
        weights, maps, shared, valid = inputs
        (out,) = outputs
        is_valid = valid[0, 0, :, 0:1] != 0
        made = static.function.apply(tuple(ref[...] for ref in weights), maps[0, 0], is_valid)
        out[0, 0] = (shared[0].astype(jnp.float32) + made).astype(out.dtype)

    (out,) = _call(
        static,
        kernel,
        (weights, maps, shared, valid),
        (tuple(map(_same, weights)), _of_maps(maps), _of_shared(maps, dim), _of_validity()),
        [(jax.ShapeDtypeStruct((b, p, num_cells, dim), shared.dtype), _of_cells(maps, dim))],
        passes=1,
    )
    return out


def _add_forward(static, *inputs):
    return _add(static, *inputs), inputs


def _add_backward(static, inputs, d_out):
    weights, maps, shared, valid = inputs
    dim = shared.shape[-1]

    def kernel(inputs, outputs):
        weights, maps, valid, d_out = inputs
        *d_weights, d_maps, d_shared = outputs
        is_valid = valid[0, 0, :, 0:1] != 0
        pull = jax.vjp(
            lambda weights, maps: static.function.apply(weights, maps, is_valid),
            tuple(ref[...] for ref in weights),
            maps[0, 0],
        )[1]
        d_cells = d_out[0, 0].astype(jnp.float32)
        found, d_maps[0, 0] = pull(d_cells)

        @pl.when(pl.program_id(2) == 0)
        def _():
            for ref in (*d_weights, d_shared):
                ref[...] = jnp.zeros_like(ref)

        for ref, gradient in zip(d_weights, found, strict=True):
            ref[0, 0] += gradient.astype(jnp.float32)
        d_shared[0] += d_cells

    # Each block of cells has its own part of the weights' gradients, so that none waits for others.
    blocks = (maps.shape[0], maps.shape[-1] // block_of(maps.shape[3]))
    sums = [
        (
            jax.ShapeDtypeStruct((*blocks, *x.shape), jnp.float32),
            pl.BlockSpec((1, 1, *x.shape), lambda i, j, k: (i, j, 0, 0)),
        )
        for x in weights
    ]
    *d_weights, d_maps, d_shared = _call(
        static,
        kernel,
        (weights, maps, valid, d_out),
        (tuple(map(_same, weights)), _of_maps(maps), _of_validity(), _of_cells(maps, dim)),
        [
            *sums,
            (jax.ShapeDtypeStruct(maps.shape, maps.dtype), _of_maps(maps)),
            (jax.ShapeDtypeStruct(shared.shape, jnp.float32), _of_shared(maps, dim)),
        ],
        passes=3,
    )
    totals = [
        jnp.sum(d, axis=(0, 1)).astype(x.dtype) for d, x in zip(d_weights, weights, strict=True)
    ]
    return tuple(totals), d_maps, d_shared.astype(shared.dtype), None


_add.defvjp(_add_forward, _add_backward)
