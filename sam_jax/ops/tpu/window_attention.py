"""A TPU kernel for attention inside windows, forward and backward, with relative positions.

What a projection leaves behind is ``[windows, tokens, (q k v) x heads x channels]``. Cutting that
into heads is what costs on a TPU, not the attention: 80 channels are no multiple of its 128 lanes,
and moving them takes six times as long as the products. So the kernel never cuts. It takes, for
each head, the whole lane tiles that the head lies in, and sets the other heads' lanes of the
queries to zero, which leaves them out of every product.

Relative terms are made in the kernel, too: a query is multiplied with all entries of both tables,
and what belongs to its row and column is brought to the front by a barrel shifter, log2(side)
rotations of all queries at once. They enter the logits by a product with ones at the key's row and
column, in two bfloat16 parts, so that large terms keep their digits.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sam_jax.arrays import Array, Float, GridShape
from sam_jax.ops.full_precision import product
from sam_jax.ops.tpu.kernel import LANES, fused_call, whole

# Relative terms of a window share one tile of lanes: rows have the first half, columns the second.
# Each half holds the terms' leading digits, then the rest, so a side has a quarter of the lanes.
_MAX_SIDE = LANES // 4


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Constants that the kernels are compiled with."""

    grid: GridShape
    num_heads: int
    head_dim: int
    interpret: Any

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def span(self, head: int) -> slice:
        """The whole tiles of lanes that a head lies in."""
        first = head * self.head_dim // LANES * LANES
        return slice(first, -(-(head + 1) * self.head_dim // LANES) * LANES)

    def owns(self, head: int) -> Array:
        """Row that is True for those lanes of a head's span that belong to the head."""
        span = self.span(head)
        lane = span.start + jax.lax.broadcasted_iota(jnp.int32, (1, span.stop - span.start), 1)
        return (lane >= head * self.head_dim) & (lane < (head + 1) * self.head_dim)


def supports(grid: GridShape, num_heads: int, head_dim: int) -> bool:
    """True if the kernel takes the shape: a small grid, heads that fill whole tiles together."""
    return max(grid) <= _MAX_SIDE and num_heads * head_dim % LANES == 0 and head_dim % 8 == 0


def window_attention(
    qkv: Float[Array, "n gh gw e"],
    table_h: Float[Array, "entries_h c"],
    table_w: Float[Array, "entries_w c"],
    num_heads: int,
    *,
    interpret: Any,
) -> Float[Array, "n gh gw d"]:
    """Attention of all tokens of each grid with each other; see ``ops.attention.grid_attention``.

    Args:
      qkv: projections, e = 3 d: queries of all heads, then keys, then values.
      table_h, table_w: with exactly ``2 gh - 1`` and ``2 gw - 1`` entries.
      num_heads: heads.
      interpret: whether to run it without a TPU, slowly.
    """
    n, gh, gw, _ = qkv.shape
    shape = _Shape((gh, gw), num_heads, table_h.shape[-1], interpret)
    tables = _stack_tables(shape, table_h, table_w).astype(qkv.dtype)
    out = _attend(shape, qkv.reshape(n, gh * gw, -1), tables)
    return out.reshape(n, gh, gw, -1)


def _stack_tables(shape: _Shape, table_h: Array, table_w: Array) -> Array:
    """Both tables as ``[128, d]``, the last entry first, repeated for every head."""
    half = LANES // 2
    padded = [
        jnp.pad(table[::-1], ((0, half - table.shape[0]), (0, 0))) for table in (table_h, table_w)
    ]
    return jnp.tile(jnp.concatenate(padded), (1, shape.num_heads))


def _ones_at_keys(shape: _Shape, dtype) -> np.ndarray:
    """Ones ``[tokens, 128]`` at each key's row and column, for both parts of the terms."""
    rows, columns = (index.ravel() for index in np.indices(shape.grid))
    ones = np.zeros((rows.size, LANES), np.float32)
    token = np.arange(rows.size)
    parts = 1 if dtype == jnp.float32 else 2
    for part in range(parts):
        ones[token, part * _MAX_SIDE + rows] = 1
        ones[token, LANES // 2 + part * _MAX_SIDE + columns] = 1
    return ones


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(shape: _Shape, qkv: Array, tables: Array) -> Array:
    n, tokens, _ = qkv.shape
    (out,) = fused_call(
        functools.partial(_forward_kernel, shape),
        (qkv, tables, jnp.asarray(_ones_at_keys(shape, qkv.dtype), qkv.dtype)),
        _input_specs(shape, tokens),
        [
            (
                jax.ShapeDtypeStruct((n, tokens, shape.dim), qkv.dtype),
                _one_window(tokens, shape.dim),
            )
        ],
        **_call_options(shape, n, tokens, products=2),
        last_axis="parallel",
        name="window_attention",
    )
    return out


def _attend_forward(shape, qkv, tables):
    return _attend(shape, qkv, tables), (qkv, tables)


def _attend_backward(shape, residuals, d_out):
    qkv, tables = residuals
    n, tokens, _ = qkv.shape
    d_qkv, d_tables = fused_call(
        functools.partial(_backward_kernel, shape),
        (qkv, tables, jnp.asarray(_ones_at_keys(shape, qkv.dtype), qkv.dtype), d_out),
        (*_input_specs(shape, tokens), _one_window(tokens, shape.dim)),
        [
            (jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), _one_window(tokens, 3 * shape.dim)),
            (jax.ShapeDtypeStruct(tables.shape, jnp.float32), whole(LANES, shape.dim)),
        ],
        **_call_options(shape, n, tokens, products=5),
        name="window_attention_backward",
    )
    return d_qkv, d_tables.astype(tables.dtype)


_attend.defvjp(_attend_forward, _attend_backward)


def _input_specs(shape: _Shape, tokens: int) -> tuple[pl.BlockSpec, ...]:
    """Block specs of the projections, the tables, and the ones at keys."""
    return _one_window(tokens, 3 * shape.dim), whole(LANES, shape.dim), whole(tokens, LANES)


def _one_window(tokens: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, tokens, width), lambda window: (window, 0, 0))


def _call_options(shape: _Shape, n: int, tokens: int, products: int) -> dict[str, Any]:
    logits = n * shape.num_heads * tokens * tokens
    return {
        "grid": (n,),
        "flops": 2 * products * logits * shape.head_dim,
        "transcendentals": logits,
        "interpret": shape.interpret,
    }


def _shift(shape: _Shape, x, *, undo: bool = False):
    """Lanes of each row and column part moved to the front by what the query's place asks for.

    ``undo`` moves them back.
    """
    gh, gw = shape.grid
    token = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    row, column = jax.lax.div(token, gw), jax.lax.rem(token, gw)
    by = jnp.where(lane < LANES // 2, gh - 1 - row, gw - 1 - column)
    for bit in range(max(gh, gw).bit_length()):
        step = 2**bit if undo else LANES - 2**bit
        x = jnp.where((by & 2**bit) != 0, pltpu.roll(x, step, 1), x)
    return x


def _relative_terms(shape: _Shape, queries, tables):
    """Terms of queries ``[tokens, 128]``: rows' in the first half, columns' in the second."""
    terms = _shift(shape, product(queries, tables.astype(queries.dtype), (1, 1)))
    if queries.dtype == jnp.float32:
        return terms
    leading = terms.astype(queries.dtype)
    rest = pltpu.roll(terms - leading.astype(jnp.float32), _MAX_SIDE, 1).astype(queries.dtype)
    lane = jax.lax.broadcasted_iota(jnp.int32, terms.shape, 1)
    return jnp.where((lane & (LANES // 2 - 1)) < _MAX_SIDE, leading, rest)


def _weights(shape: _Shape, queries, keys, tables, ones):
    """Softmax of one head's logits, ``[tokens, tokens]`` in float32."""
    logits = product(queries, keys, (1, 1)) * shape.scale
    logits += product(_relative_terms(shape, queries, tables), ones, (1, 1))
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _of_head(shape: _Shape, head: int, ref, part: int = 0):
    """A head's tiles of the queries (part 0), keys (1) or values (2)."""
    span = shape.span(head)
    return ref[0, :, part * shape.dim + span.start : part * shape.dim + span.stop]


class _Tiles:
    """Sums over heads of what belongs into their tiles, each written once it is whole."""

    def __init__(self, shape: _Shape, ref, part: int = 0):
        self._shape, self._ref, self._part = shape, ref, part
        self._sums: dict[int, Array] = {}

    def add(self, head: int, values) -> None:
        span = self._shape.span(head)
        values = jnp.where(self._shape.owns(head), values, 0.0)
        for first in range(span.start, span.stop, LANES):
            tile = values[:, first - span.start : first - span.start + LANES]
            before = self._sums.get(first)
            self._sums[first] = tile if before is None else before + tile
            if first + LANES <= (head + 1) * self._shape.head_dim:
                start = self._part * self._shape.dim + first
                whole = self._sums.pop(first).astype(self._ref.dtype)
                self._ref[0, :, start : start + LANES] = whole


def _forward_kernel(shape, inputs, outputs):
    qkv, tables, ones = inputs
    (out,) = outputs
    written = _Tiles(shape, out)
    for head in range(shape.num_heads):
        q = _of_head(shape, head, qkv)
        q = jnp.where(shape.owns(head), q, jnp.zeros_like(q))
        weights = _weights(
            shape, q, _of_head(shape, head, qkv, 1), tables[:, shape.span(head)], ones[...]
        )
        values = _of_head(shape, head, qkv, 2)
        written.add(head, product(weights.astype(values.dtype), values, (1, 0)))


def _backward_kernel(shape, inputs, outputs):
    qkv, tables, ones, d_out = inputs
    d_qkv, d_tables = outputs

    @pl.when(pl.program_id(0) == 0)
    def _():
        d_tables[...] = jnp.zeros_like(d_tables)

    d_queries, d_keys, d_values = (_Tiles(shape, d_qkv, part) for part in range(3))
    # Only the terms' leading part has gradients: the rest is made of the same numbers.
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    leads = (lane & (LANES // 2 - 1)) < _MAX_SIDE
    for head in range(shape.num_heads):
        span, owned = shape.span(head), shape.owns(head)
        q, k, v = (_of_head(shape, head, qkv, part) for part in range(3))
        d_head = _of_head(shape, head, d_out)
        q, d_head = (jnp.where(owned, x, jnp.zeros_like(x)) for x in (q, d_head))
        table = tables[:, span]
        weights = _weights(shape, q, k, table, ones[...])
        d_values.add(head, product(weights.astype(q.dtype), d_head, (0, 0)))
        d_weights = product(d_head, v, (1, 1))
        mean = jnp.sum(weights * d_weights, axis=1, keepdims=True)
        d_logits = (weights * (d_weights - mean)).astype(q.dtype)
        d_keys.add(head, product(d_logits, q, (0, 0)) * shape.scale)
        d_terms = jnp.where(leads, product(d_logits, ones[...], (1, 0)), 0.0)
        d_terms = _shift(shape, d_terms, undo=True).astype(q.dtype)
        d_queries.add(
            head,
            product(d_logits, k, (1, 0)) * shape.scale
            + product(d_terms, table.astype(q.dtype), (1, 0)),
        )
        d_tables[:, span] += product(d_terms, q, (0, 0))
