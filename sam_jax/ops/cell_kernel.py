"""Turns what is done to each cell of each object into TPU kernels, forward and backward.

A decoder's layer does little arithmetic for each number it touches: compiled as separate products
and sums, it would bring the cells of all objects, 2 MB each, through the chip's memory dozens of
times. Here a function of some cells of one object becomes a kernel that reads and writes them once.
Its gradient is a kernel, too: JAX differentiates the function inside of it, and nothing between
input and output is ever stored.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sam_jax.arrays import Array, Float, Int, Shaped
from sam_jax.ops.tpu_kernel import LANES, block_of, call_on_trees


@dataclasses.dataclass(frozen=True)
class CellFunction:
    """What is done to some cells of one object.

    Attributes:
      apply: ``apply(weights, own, cells, given)``: tuples of matrices, ``cells`` [block, d], and a
        ``Given``. Returns a matrix with cells on its first axis, or on its last.
      out_rows: None if cells come first in the result; else how many rows it has.
      name: of the kernels.
      flops_per_cell: of one cell, forward.
    """

    apply: Callable[..., Array]
    out_rows: int | None
    name: str
    flops_per_cell: int


class Given(NamedTuple):
    """What a function of cells gets besides, without a gradient.

    Attributes:
      constants: matrices.
      positions: encodings of the cells [block, d], or None.
      seed: of dropout [1, 1].
      first: index of the first of the cells.
    """

    constants: tuple[Array, ...]
    positions: Array | None
    seed: Array
    first: Array


def supports(num_cells: int, dim: int) -> bool:
    """Whether cells and their channels fill whole registers."""
    return num_cells % LANES == 0 and dim % LANES == 0


def over_cells(
    function: CellFunction,
    weights: tuple[Float[Array, "_ _"], ...],
    own: tuple[Float[Array, "objects _ _"], ...],
    cells: Float[Array, "objects cells d"],
    *,
    constants: tuple[Float[Array, "_ _"], ...] = (),
    positions: Float[Array, "cells d"] | None = None,
    seeds: Int[Array, " objects"] | None = None,
    out_dtype: Any,
    interpret: bool,
) -> Shaped[Array, "objects _ _"]:
    """``function`` of all cells of all objects; differentiable in weights, own and cells.

    Args:
      function: what to do.
      weights: matrices that are the same for all objects.
      own: matrices of each object.
      cells: of each object.
      constants: matrices that are the same for all objects, and have no gradient.
      positions: encodings of the cells.
      seeds: of dropout.
      out_dtype: type of the result.
      interpret: whether to run it without a TPU, slowly.
    """
    objects = cells.shape[0]
    seeds = jnp.zeros(objects, jnp.int32) if seeds is None else seeds
    given = (
        constants,
        () if positions is None else (positions,),
        jnp.broadcast_to(seeds[:, None, None], (objects, 1, LANES)),
    )
    static = _Static(function, jnp.dtype(out_dtype), interpret)
    return _apply(static, weights, own, cells, given)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What the kernels know when they are compiled."""

    function: CellFunction
    out_dtype: Any
    interpret: bool


def each_object(shape: tuple[int, ...]) -> pl.BlockSpec:
    """All of an object's own array in every step that works on the object."""
    return pl.BlockSpec((1, *shape), lambda i, j: (i, 0, 0))


def each_block(cells: Float[Array, "objects cells d"]) -> pl.BlockSpec:
    """The cells of a step."""
    return pl.BlockSpec((1, block_of(cells.shape[1]), cells.shape[2]), lambda i, j: (i, j, 0))


def _same(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda i, j: (0, 0))


def _input_specs(weights, own, cells, given):
    """In the tree of the inputs."""
    constants, positions, seeds = given
    of_object = each_object(seeds.shape[1:])
    rows = pl.BlockSpec((block_of(cells.shape[1]), cells.shape[2]), lambda i, j: (j, 0))
    return (
        tuple(_same(x) for x in weights),
        tuple(each_object(x.shape[1:]) for x in own),
        each_block(cells),
        (tuple(_same(x) for x in constants), (rows,) * len(positions), of_object),
    )


def _output(static: _Static, cells: Array):
    objects, num_cells, dim = cells.shape
    rows = static.function.out_rows
    if rows is None:
        return jax.ShapeDtypeStruct((objects, num_cells, dim), static.out_dtype), each_block(cells)
    spec = pl.BlockSpec((1, rows, block_of(cells.shape[1])), lambda i, j: (i, 0, j))
    return jax.ShapeDtypeStruct((objects, rows, num_cells), static.out_dtype), spec


def _call(static: _Static, kernel, inputs, in_specs, outputs, *, passes: int, name: str):
    """``kernel`` of references to trees of inputs and outputs, for each block of each object."""
    cells = inputs[2]
    objects, num_cells, _ = cells.shape
    return call_on_trees(
        kernel,
        inputs,
        in_specs,
        outputs,
        grid=(objects, num_cells // block_of(num_cells)),
        flops=passes * static.function.flops_per_cell * objects * num_cells,
        interpret=static.interpret,
        name=name,
    )


def _values(inputs):
    """Of references to the inputs of ``over_cells``."""
    weights, own, cells, (constants, positions, seeds) = inputs
    given = Given(
        tuple(ref[...] for ref in constants),
        positions[0][...] if positions else None,
        seeds[0, :, 0:1],
        pl.program_id(1) * cells.shape[1],
    )
    return tuple(ref[...] for ref in weights), tuple(ref[0] for ref in own), cells[0], given


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(static: _Static, weights, own, cells, given):
    inputs = (weights, own, cells, given)

    def kernel(inputs, outputs):
        (out,) = outputs
        out[0] = static.function.apply(*_values(inputs)).astype(out.dtype)

    return _call(
        static,
        kernel,
        inputs,
        _input_specs(*inputs),
        [_output(static, cells)],
        passes=1,
        name=static.function.name,
    )[0]


def _apply_forward(static, *inputs):
    return _apply(static, *inputs), inputs


def _apply_backward(static, inputs, d_out):
    weights, own, cells, _ = inputs

    def kernel(inputs, outputs):
        *inputs, d_out = inputs
        *d_sums, d_cells = outputs
        *differentiable, given = _values(inputs)
        out, pull = jax.vjp(lambda *x: static.function.apply(*x, given), *differentiable)
        *found, d_cells[0] = jax.tree.leaves(pull(d_out[0].astype(out.dtype)))

        @pl.when(pl.program_id(1) == 0)
        def _():
            for ref in d_sums:
                ref[...] = jnp.zeros_like(ref)

        for ref, gradient in zip(d_sums, found, strict=True):
            ref[0] += gradient.astype(jnp.float32)

    # Each object has its own part of the weights' gradients: so none waits for another, and a
    # chip's cores can work on different ones.
    sums = [(cells.shape[0], *x.shape[-2:]) for x in (*weights, *own)]
    *d_sums, d_cells = _call(
        static,
        kernel,
        (*inputs, d_out),
        (*_input_specs(*inputs), _output(static, cells)[1]),
        [(jax.ShapeDtypeStruct(shape, jnp.float32), each_object(shape[1:])) for shape in sums]
        + [(jax.ShapeDtypeStruct(cells.shape, cells.dtype), each_block(cells))],
        passes=3,
        name=f"{static.function.name}_backward",
    )
    d_weights = [jnp.sum(d, axis=0) for d in d_sums[: len(weights)]]
    d_own = d_sums[len(weights) :]
    return (
        tuple(d.astype(x.dtype) for d, x in zip(d_weights, weights, strict=True)),
        tuple(d.astype(x.dtype) for d, x in zip(d_own, own, strict=True)),
        d_cells,
        None,
    )


_apply.defvjp(_apply_forward, _apply_backward)
