"""A TPU kernel for attention over a whole grid, forward and backward, with relative positions.

Flash attention (Dao et al. 2022) whose logits lie on their side, ``[keys, queries]``. Keys are
taken some whole rows of the grid at a time: a block of logits is ``[rows, columns, queries]``, and
the relative terms, ``[rows, queries]`` and ``[columns, queries]``, are added to it by broadcasts
along the axes that cost a TPU nothing. No bias, no one-hot product, and the softmax sums over the
cheap axis. Terms and logits are float32.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sam_jax.arrays import Array, Float, GridShape
from sam_jax.ops.full_precision import multiply, product
from sam_jax.ops.positional import relative_positions
from sam_jax.ops.tpu.kernel import LANES, SUBLANES, fused_call

# A block of logits of 512 x 512 takes 1 MB, and a handful of its size are alive at once.
_TOKENS_PER_BLOCK = 512
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Blocks into which queries and keys are cut.

    Attributes:
      grid: rows and columns of the tokens.
      rows: rows of keys in a block.
      queries: queries in a block.
    """

    grid: GridShape
    rows: int
    queries: int
    interpret: Any

    @property
    def keys(self) -> int:
        return self.rows * self.grid[1]

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_key_blocks(self) -> int:
        return self.grid[0] // self.rows

    @property
    def num_query_blocks(self) -> int:
        return self.num_tokens // self.queries


def _cut(grid: GridShape, interpret: Any) -> _Blocks | None:
    gh, gw = grid
    tokens = gh * gw
    # A block may be a whole axis of any size; a part of an axis must consist of whole tiles.
    rows = [
        rows
        for rows in range(1, gh + 1)
        if rows == gh or (gh % rows == 0 and rows % SUBLANES == 0 and rows * gw % LANES == 0)
    ]
    queries = [
        size
        for size in range(1, tokens + 1)
        if size == tokens or (tokens % size == 0 and size % LANES == 0)
    ]
    best_rows = min(rows, key=lambda rows: abs(rows * gw - _TOKENS_PER_BLOCK))
    best_queries = min(queries, key=lambda size: abs(size - _TOKENS_PER_BLOCK))
    if gw % SUBLANES or max(best_rows * gw, best_queries) > 2 * _TOKENS_PER_BLOCK:
        return None
    return _Blocks(grid, best_rows, best_queries, interpret)


def supports(grid: GridShape, num_heads: int, head_dim: int) -> bool:
    """True if the kernel can cut the grid: 64 x 64, and most grids of 16-pixel patches."""
    del num_heads, head_dim  # any will do
    return _cut(grid, interpret=False) is not None


def flash_attention(
    qkv: Float[Array, "b gh gw e"],
    table_h: Float[Array, "entries_h c"],
    table_w: Float[Array, "entries_w c"],
    num_heads: int,
    *,
    interpret: Any,
) -> Float[Array, "b gh gw d"]:
    """Attention of all tokens of each grid with each other; see ``ops.attention.grid_attention``.

    Args:
      qkv: projections, e = 3 d: queries of all heads, then keys, then values.
      table_h, table_w: with exactly ``2 gh - 1`` and ``2 gw - 1`` entries.
      num_heads: heads.
      interpret: whether to run it without a TPU, slowly.

    Raises:
      ValueError: if the grid cannot be cut, see ``supports``.
    """
    gh, gw = grid = qkv.shape[1:3]
    blocks = _cut(grid, interpret)
    if blocks is None:
        raise ValueError(f"a grid of {gh} x {gw} tokens cannot be cut into the kernel's blocks")
    q, k, v = rearrange(qkv, "b gh gw (three a c) -> three (b a) gh gw c", three=3, a=num_heads)
    # The relative terms use the unscaled query, as the published model does.
    by_row, by_column = (
        relative_positions(table, size).astype(q.dtype)
        for table, size in ((table_h, gh), (table_w, gw))
    )
    terms_h = jnp.einsum("xhwc,hic->xihw", q, by_row, preferred_element_type=jnp.float32)
    terms_w = jnp.einsum("xhwc,wjc->xjhw", q, by_column, preferred_element_type=jnp.float32)
    q, k, v = (rearrange(x, "x h w c -> x (h w) c") for x in (q, k, v))
    terms_h, terms_w = (rearrange(x, "x i h w -> x i (h w)") for x in (terms_h, terms_w))
    q = multiply(q, q.shape[-1] ** -0.5)
    out = _attend(blocks, q, k, v, terms_h, terms_w)
    return rearrange(out, "(b a) c (h w) -> b h w (a c)", a=num_heads, h=gh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks: _Blocks, q, k, v, terms_h, terms_w):
    """Means of values ``[x, c, queries]``; queries are scaled, terms ``[x, size, queries]``."""
    return _attend_forward(blocks, q, k, v, terms_h, terms_w)[0]


def _attend_forward(blocks, q, k, v, terms_h, terms_w):
    specs = _Specs(blocks, q.shape[-1], queries_axis=1, keys_axis=2)
    out, log_sums = _call(
        blocks,
        _forward_kernel,
        "flash_attention",
        q,
        grid=(q.shape[0], blocks.num_query_blocks, blocks.num_key_blocks),
        inputs=(q, k, v.swapaxes(1, 2), terms_h, terms_w),
        in_specs=(specs.queries, specs.keys, specs.keys_aside, specs.terms_h, specs.terms_w),
        outputs=(
            (specs.queries_aside, q.shape[-1], q.dtype),
            (specs.per_query, 1, jnp.float32),
        ),
        scratch=[(1, blocks.queries), (1, blocks.queries), (q.shape[-1], blocks.queries)],
        products=2,
    )
    return out, (q, k, v, terms_h, terms_w, out, log_sums)


def _attend_backward(blocks, residuals, d_out):
    q, k, v, terms_h, terms_w, out, log_sums = residuals
    gh, gw = blocks.grid
    channels = q.shape[-1]
    means = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=1, keepdims=True)
    d_out = d_out.astype(q.dtype)

    specs = _Specs(blocks, channels, queries_axis=1, keys_axis=2)
    d_q, d_terms_h, d_terms_w = _call(
        blocks,
        _queries_backward_kernel,
        "flash_attention_queries_backward",
        q,
        grid=(q.shape[0], blocks.num_query_blocks, blocks.num_key_blocks),
        inputs=(q, k, k.swapaxes(1, 2), v, d_out, log_sums, means, terms_h, terms_w),
        in_specs=(
            *(specs.queries, specs.keys, specs.keys_aside, specs.keys, specs.queries_aside),
            *(specs.per_query, specs.per_query, specs.terms_h, specs.terms_w),
        ),
        outputs=(
            (specs.queries_aside, channels, q.dtype),
            (specs.terms_h, gh, jnp.float32),
            (specs.terms_w, gw, jnp.float32),
        ),
        scratch=[(channels, blocks.queries), (gw, blocks.queries)],
        products=3,
    )

    specs = _Specs(blocks, channels, queries_axis=2, keys_axis=1)
    d_k, d_v = _call(
        blocks,
        _keys_backward_kernel,
        "flash_attention_keys_backward",
        q,
        grid=(q.shape[0], blocks.num_key_blocks, blocks.num_query_blocks),
        inputs=(q, k, v, d_out.swapaxes(1, 2), d_out, log_sums, means, terms_h, terms_w),
        in_specs=(
            *(specs.queries, specs.keys, specs.keys, specs.queries, specs.queries_aside),
            *(specs.per_query, specs.per_query, specs.terms_h, specs.terms_w),
        ),
        outputs=((specs.keys, None, k.dtype), (specs.keys, None, v.dtype)),
        scratch=[(blocks.keys, channels), (blocks.keys, channels)],
        products=4,
    )
    return d_q.swapaxes(1, 2), d_k, d_v, d_terms_h, d_terms_w


_attend.defvjp(_attend_forward, _attend_backward)


class _Specs:
    """Block specs of the arrays: the part of each that a step of the kernel's grid sees.

    The first axis of every array is images and heads. ``aside``: tokens are the last axis.
    """

    def __init__(self, blocks: _Blocks, channels: int, *, queries_axis: int, keys_axis: int):
        def spec(shape, place):
            return pl.BlockSpec(
                (1, *shape),
                lambda *step: (step[0], *place(step[queries_axis], step[keys_axis])),
            )

        self.queries = spec((blocks.queries, channels), lambda i, j: (i, 0))
        self.queries_aside = spec((channels, blocks.queries), lambda i, j: (0, i))
        self.per_query = spec((1, blocks.queries), lambda i, j: (0, i))
        self.keys = spec((blocks.keys, channels), lambda i, j: (j, 0))
        self.keys_aside = spec((channels, blocks.keys), lambda i, j: (0, j))
        self.terms_h = spec((blocks.rows, blocks.queries), lambda i, j: (j, i))
        self.terms_w = spec((blocks.grid[1], blocks.queries), lambda i, j: (0, i))


def _call(blocks, kernel, name, q, *, grid, inputs, in_specs, outputs, scratch, products):
    """A kernel whose steps along the last axis of ``grid`` add to the same outputs.

    ``outputs`` are spec, rows (None for as many as tokens, with channels last) and type.
    """
    heads, tokens, channels = q.shape
    logits = heads * tokens * tokens

    def on_refs(inputs, outputs, *scratch):
        kernel(blocks, *inputs, *outputs, *scratch)

    shapes = [
        (heads, tokens, channels) if rows is None else (heads, rows, tokens)
        for _, rows, _ in outputs
    ]
    return fused_call(
        on_refs,
        inputs,
        in_specs,
        [
            (jax.ShapeDtypeStruct(shape, dtype), spec)
            for shape, (spec, _, dtype) in zip(shapes, outputs, strict=True)
        ],
        grid=grid,
        flops=2 * products * logits * channels,
        transcendentals=logits,
        scratch=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        interpret=blocks.interpret,
        name=name,
    )


def _logits(blocks: _Blocks, q, k, terms_h, terms_w):
    """Logits ``[keys, queries]`` of a block."""
    products = product(k[0], q[0], (1, 1))
    by_place = products.reshape(blocks.rows, blocks.grid[1], blocks.queries)
    by_place = by_place + terms_h[0][:, None, :] + terms_w[0][None]
    return by_place.reshape(blocks.keys, blocks.queries)


def _at_first_step(start) -> None:
    pl.when(pl.program_id(2) == 0)(start)


def _at_last_step(num_steps: int, finish) -> None:
    pl.when(pl.program_id(2) == num_steps - 1)(finish)


def _forward_kernel(blocks, q, k, v_aside, terms_h, terms_w, out, log_sums, peaks, sums, means):
    @_at_first_step
    def _():
        peaks[...] = jnp.full_like(peaks, _LOWEST)
        sums[...] = jnp.zeros_like(sums)
        means[...] = jnp.zeros_like(means)

    logits = _logits(blocks, q, k, terms_h, terms_w)
    before = peaks[...]
    peak = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
    weights, kept = jnp.exp(logits - peak), jnp.exp(before - peak)
    sums[...] = kept * sums[...] + jnp.sum(weights, axis=0, keepdims=True)
    means[...] = kept * means[...] + product(v_aside[0], weights.astype(v_aside.dtype), (1, 0))
    peaks[...] = peak

    @functools.partial(_at_last_step, blocks.num_key_blocks)
    def _():
        out[0] = (means[...] / sums[...]).astype(out.dtype)
        log_sums[0] = peaks[...] + jnp.log(sums[...])


def _d_logits(weights, v, d_out_aside, means):
    return weights * (product(v[0], d_out_aside[0], (1, 0)) - means[0])


def _queries_backward_kernel(blocks, *refs):
    q, k, k_aside, v, d_out_aside, log_sums, means, terms_h, terms_w, *refs = refs
    d_q, d_terms_h, d_terms_w, sum_q, sum_w = refs

    @_at_first_step
    def _():
        sum_q[...] = jnp.zeros_like(sum_q)
        sum_w[...] = jnp.zeros_like(sum_w)

    weights = jnp.exp(_logits(blocks, q, k, terms_h, terms_w) - log_sums[0])
    d_logits = _d_logits(weights, v, d_out_aside, means)
    by_place = d_logits.reshape(blocks.rows, blocks.grid[1], blocks.queries)
    d_terms_h[0] = jnp.sum(by_place, axis=1)
    sum_w[...] += jnp.sum(by_place, axis=0)
    sum_q[...] += product(k_aside[0], d_logits.astype(k_aside.dtype), (1, 0))

    @functools.partial(_at_last_step, blocks.num_key_blocks)
    def _():
        d_q[0] = sum_q[...].astype(d_q.dtype)
        d_terms_w[0] = sum_w[...]


def _keys_backward_kernel(blocks, *refs):
    q, k, v, d_out, d_out_aside, log_sums, means, terms_h, terms_w, *refs = refs
    d_k, d_v, sum_k, sum_v = refs

    @_at_first_step
    def _():
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    weights = jnp.exp(_logits(blocks, q, k, terms_h, terms_w) - log_sums[0])
    sum_v[...] += product(weights.astype(d_out.dtype), d_out[0], (1, 0))
    d_logits = _d_logits(weights, v, d_out_aside, means)
    sum_k[...] += product(d_logits.astype(q.dtype), q[0], (1, 0))

    @functools.partial(_at_last_step, blocks.num_query_blocks)
    def _():
        d_k[0] = sum_k[...].astype(d_k.dtype)
        d_v[0] = sum_v[...].astype(d_v.dtype)
