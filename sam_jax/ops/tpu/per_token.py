"""Turns a function of an object's image tokens into TPU kernels, forward and backward.

A decoder's layer does little arithmetic for each number it touches: compiled as separate products
and sums, it would bring the image tokens of all objects, 2 MB each, through the chip's memory
dozens of times. Here a function of some image tokens of one object becomes a kernel that reads and
writes them once. Its gradient is a kernel, too: JAX differentiates the function inside of it, and
nothing between input and output is ever stored.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sam_jax.arrays import Array, Float, Int, Shaped
from sam_jax.ops.tpu.kernel import LANES, fused_call, tile_size, wholes


@dataclasses.dataclass(frozen=True)
class TokenFunction:
    """A function of some image tokens of one object.

    Attributes:
      apply: ``apply(weights, per_object, tokens, extras)``: tuples of matrices, ``tokens``
        [block, d], and ``Extras``. Returns a matrix with tokens on its first axis, or on its last.
      out_rows: None if tokens come first in the result; else how many rows it has.
      name: of the kernels.
      flops_per_token: of one token, forward.
    """

    apply: Callable[..., Array]
    out_rows: int | None
    name: str
    flops_per_token: int


class Extras(NamedTuple):
    """Further inputs of a function of tokens, which have no gradient.

    Attributes:
      constants: matrices.
      positions: encodings of the tokens [block, d], or None.
      seed: of dropout [1, 1].
      first: index of the first of the tokens.
    """

    constants: tuple[Array, ...]
    positions: Array | None
    seed: Array
    first: Array


def supports(num_tokens: int, dim: int) -> bool:
    """True if image tokens and their channels fill whole registers."""
    return num_tokens % LANES == 0 and dim % LANES == 0


def per_token(
    function: TokenFunction,
    weights: tuple[Float[Array, "_ _"], ...],
    per_object: tuple[Float[Array, "objects _ _"], ...],
    tokens: Float[Array, "objects tokens d"],
    *,
    constants: tuple[Float[Array, "_ _"], ...] = (),
    positions: Float[Array, "tokens d"] | None = None,
    seeds: Int[Array, " objects"] | None = None,
    out_dtype: Any,
    interpret: Any,
) -> Shaped[Array, "objects _ _"]:
    """``function`` of all tokens of all objects; differentiable in weights, per_object and tokens.

    Args:
      function: what to do.
      weights: matrices that are the same for all objects.
      per_object: matrices of each object.
      tokens: of each object.
      constants: matrices that are the same for all objects, and have no gradient.
      positions: encodings of the tokens.
      seeds: of dropout.
      out_dtype: type of the result.
      interpret: whether to run it without a TPU, slowly.
    """
    objects = tokens.shape[0]
    seeds = jnp.zeros(objects, jnp.int32) if seeds is None else seeds
    extras = (
        constants,
        () if positions is None else (positions,),
        jnp.broadcast_to(seeds[:, None, None], (objects, 1, LANES)),
    )
    static = _Static(function, jnp.dtype(out_dtype), interpret)
    return _apply(static, weights, per_object, tokens, extras)


@dataclasses.dataclass(frozen=True)
class _Static:
    """Constants that the kernels are compiled with."""

    function: TokenFunction
    out_dtype: Any
    interpret: Any


def each_object(shape: tuple[int, ...]) -> pl.BlockSpec:
    """The whole array of an object, in every step that works on the object."""
    return pl.BlockSpec((1, *shape), lambda i, j: (i, 0, 0))


def each_block(tokens: Float[Array, "objects tokens d"]) -> pl.BlockSpec:
    """The image tokens of a step."""
    return pl.BlockSpec((1, tile_size(tokens.shape[1]), tokens.shape[2]), lambda i, j: (i, j, 0))


def _input_specs(weights, per_object, tokens, extras):
    """Block specs of the inputs, in a tree like theirs."""
    constants, positions, seeds = extras
    of_object = each_object(seeds.shape[1:])
    rows = pl.BlockSpec((tile_size(tokens.shape[1]), tokens.shape[2]), lambda i, j: (j, 0))
    return (
        wholes(weights),
        tuple(each_object(x.shape[1:]) for x in per_object),
        each_block(tokens),
        (wholes(constants), (rows,) * len(positions), of_object),
    )


def _output(static: _Static, tokens: Array):
    objects, num_tokens, dim = tokens.shape
    rows = static.function.out_rows
    if rows is None:
        return jax.ShapeDtypeStruct((objects, num_tokens, dim), static.out_dtype), each_block(
            tokens
        )
    spec = pl.BlockSpec((1, rows, tile_size(tokens.shape[1])), lambda i, j: (i, 0, j))
    return jax.ShapeDtypeStruct((objects, rows, num_tokens), static.out_dtype), spec


def _call(static: _Static, kernel, inputs, in_specs, outputs, *, passes: int, name: str):
    """``kernel`` of references to trees of inputs and outputs, for each block of each object."""
    tokens = inputs[2]
    objects, num_tokens, _ = tokens.shape
    return fused_call(
        kernel,
        inputs,
        in_specs,
        outputs,
        grid=(objects, num_tokens // tile_size(num_tokens)),
        flops=passes * static.function.flops_per_token * objects * num_tokens,
        interpret=static.interpret,
        name=name,
    )


def _values(inputs):
    """Values behind the kernel's references to the inputs of ``per_token``."""
    weights, per_object, tokens, (constants, positions, seeds) = inputs
    extras = Extras(
        tuple(ref[...] for ref in constants),
        positions[0][...] if positions else None,
        seeds[0, :, 0:1],
        pl.program_id(1) * tokens.shape[1],
    )
    return (
        tuple(ref[...] for ref in weights),
        tuple(ref[0] for ref in per_object),
        tokens[0],
        extras,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(static: _Static, weights, per_object, tokens, extras):
    inputs = (weights, per_object, tokens, extras)

    def kernel(inputs, outputs):
        (out,) = outputs
        out[0] = static.function.apply(*_values(inputs)).astype(out.dtype)

    return _call(
        static,
        kernel,
        inputs,
        _input_specs(*inputs),
        [_output(static, tokens)],
        passes=1,
        name=static.function.name,
    )[0]


def _apply_forward(static, *inputs):
    return _apply(static, *inputs), inputs


def _apply_backward(static, inputs, d_out):
    weights, per_object, tokens, _ = inputs

    def kernel(inputs, outputs):
        *inputs, d_out = inputs
        *d_sums, d_tokens = outputs
        *differentiable, extras = _values(inputs)
        out, pull = jax.vjp(lambda *x: static.function.apply(*x, extras), *differentiable)
        *found, d_tokens[0] = jax.tree.leaves(pull(d_out[0].astype(out.dtype)))

        @pl.when(pl.program_id(1) == 0)
        def _():
            for ref in d_sums:
                ref[...] = jnp.zeros_like(ref)

        for ref, gradient in zip(d_sums, found, strict=True):
            ref[0] += gradient.astype(jnp.float32)

    # Each object has its own part of the weights' gradients: so none waits for another, and a
    # chip's cores can work on different ones.
    sums = [(tokens.shape[0], *x.shape[-2:]) for x in (*weights, *per_object)]
    *d_sums, d_tokens = _call(
        static,
        kernel,
        (*inputs, d_out),
        (*_input_specs(*inputs), _output(static, tokens)[1]),
        [(jax.ShapeDtypeStruct(shape, jnp.float32), each_object(shape[1:])) for shape in sums]
        + [(jax.ShapeDtypeStruct(tokens.shape, tokens.dtype), each_block(tokens))],
        passes=3,
        name=f"{static.function.name}_backward",
    )
    d_weights = [jnp.sum(d, axis=0) for d in d_sums[: len(weights)]]
    d_own = d_sums[len(weights) :]
    return (
        tuple(d.astype(x.dtype) for d, x in zip(d_weights, weights, strict=True)),
        tuple(d.astype(x.dtype) for d, x in zip(d_own, per_object, strict=True)),
        d_tokens,
        None,
    )


_apply.defvjp(_apply_forward, _apply_backward)
