"""Attention over a grid with decomposed relative positions: one reference, two lean forms."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sam_jax.arrays import Array, Float
from sam_jax.ops.positional import relative_positions

Implementation: TypeAlias = Literal["auto", "reference", "extended", "chunked"]

# Rows of queries that "chunked" handles at once: 8 rows of a 64 x 64 grid make logits of
# 512 x 4096 float32 (8 MB), which stay in the cache of one CPU core.
QUERY_ROWS_PER_CHUNK = 8
# Up to this many tokens the whole matrix of logits is small enough to be made at once.
MAX_TOKENS_AT_ONCE = 1024


def grid_attention(
    q: Float[Array, "b gh gw a c"],
    k: Float[Array, "b gh gw a c"],
    v: Float[Array, "b gh gw a c"],
    rel_pos_h: Float[Array, "entries_h c"] | None,
    rel_pos_w: Float[Array, "entries_w c"] | None,
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "b gh gw a c"]:
    """Softmax attention of all cells with all cells of the same grid.

    Logits are ``q . k / sqrt(c) + q . R_h[row offset] + q . R_w[column offset]`` and are kept in
    float32. All forms give the same values:

    - ``reference``: the formula as it stands; what accelerators run.
    - ``extended``: every query carries its relative terms as further channels, and every key says
      with ones which row and column it is in, so that one product makes the whole logits. Half the
      time of the reference in windows on a CPU.
    - ``chunked``: a few rows of queries of one head at a time, for large grids on a CPU.

    ``auto`` takes the fastest for the size and the default device.

    Args:
      q, k, v: projections per head; the scale is applied here.
      rel_pos_h, rel_pos_w: tables of relative positions per axis (of any length; interpolated),
        or None for attention without them.
      implementation: which of the forms computes it.

    Source: Li et al. 2022 (MViTv2), section 3.1, as used in ViTDet and SAM.
    """
    gh, gw = q.shape[1:3]
    if implementation == "auto":
        if jax.default_backend() != "cpu":
            implementation = "reference"
        else:
            implementation = "extended" if gh * gw <= MAX_TOKENS_AT_ONCE else "chunked"
    tables = None
    if rel_pos_h is not None and rel_pos_w is not None:
        tables = (
            relative_positions(rel_pos_h, gh).astype(q.dtype),
            relative_positions(rel_pos_w, gw).astype(q.dtype),
        )
    forms = {"reference": _reference, "extended": _extended, "chunked": _chunked}
    return forms[implementation](q, k, v, tables)


def _reference(q, k, v, tables):
    gh, gw, c = q.shape[1], q.shape[2], q.shape[-1]
    logits = jnp.einsum("bhwac,bijac->bahwij", q * c**-0.5, k, preferred_element_type=jnp.float32)
    if tables is not None:
        by_row, by_column = tables
        # The relative terms use the unscaled query, as the published model does.
        logits += jnp.einsum("bhwac,hic->bahwi", q, by_row, preferred_element_type=jnp.float32)[
            ..., None
        ]
        logits += jnp.einsum("bhwac,wjc->bahwj", q, by_column, preferred_element_type=jnp.float32)[
            ..., None, :
        ]
    probs = jax.nn.softmax(rearrange(logits, "b a h w i j -> b a h w (i j)"), axis=-1)
    probs = rearrange(probs, "b a h w (i j) -> b a h w i j", i=gh, j=gw).astype(v.dtype)
    return jnp.einsum("bahwij,bijac->bhwac", probs, v)


def _extended(q, k, v, tables):
    _, gh, gw, a, c = q.shape
    q, k, v = (rearrange(x, "b h w a c -> (b a) h w c") for x in (q, k, v))
    # In float32, as relative terms may be large: half precision would round them among the logits.
    queries, keys = [q.astype(jnp.float32) * c**-0.5], [k.astype(jnp.float32)]
    if tables is not None:
        by_row, by_column = tables
        queries += [
            jnp.einsum("xhwc,hic->xhwi", q, by_row, preferred_element_type=jnp.float32),
            jnp.einsum("xhwc,wjc->xhwj", q, by_column, preferred_element_type=jnp.float32),
        ]
        rows, columns = np.indices((gh, gw))
        is_in = np.concatenate([np.eye(gh)[rows], np.eye(gw)[columns]], axis=-1)
        keys.append(jnp.broadcast_to(is_in.astype(np.float32), (*k.shape[:3], gh + gw)))
    queries, keys = (
        rearrange(jnp.concatenate(parts, axis=-1), "x h w e -> x (h w) e")
        for parts in (queries, keys)
    )
    logits = jnp.einsum("xqe,xke->xqk", queries, keys)
    out = _mean_by_softmax(logits, rearrange(v, "x h w c -> x (h w) c"))
    return rearrange(out, "(b a) (h w) c -> b h w a c", a=a, h=gh)


def _chunked(q, k, v, tables):
    gh, a, c = q.shape[1], q.shape[3], q.shape[-1]
    rows = max(r for r in range(1, QUERY_ROWS_PER_CHUNK + 1) if gh % r == 0)
    by_row, by_column = tables if tables is not None else (None, None)

    @jax.checkpoint
    def one_chunk(q, k, v, by_row):
        """``q`` [rows, gw, c] against all of ``k`` and ``v`` [gh * gw, c], one head."""
        logits = jnp.einsum("hwc,kc->hwk", q * c**-0.5, k, preferred_element_type=jnp.float32)
        if by_row is not None:
            logits = rearrange(logits, "h w (i j) -> h w i j", i=gh)
            logits += jnp.einsum("hwc,hic->hwi", q, by_row, preferred_element_type=jnp.float32)[
                ..., None
            ]
            logits += jnp.einsum("hwc,wjc->hwj", q, by_column, preferred_element_type=jnp.float32)[
                :, :, None
            ]
            logits = rearrange(logits, "h w i j -> h w (i j)")
        return _mean_by_softmax(logits, v)

    def one_head(head):
        q, k, v = head
        q = rearrange(q, "(n h) w c -> n h w c", h=rows)
        k, v = (rearrange(x, "h w c -> (h w) c") for x in (k, v))
        if by_row is None:
            out = jax.lax.map(lambda q: one_chunk(q, k, v, None), q)
        else:
            rows_of_table = rearrange(by_row, "(n h) i c -> n h i c", h=rows)
            out = jax.lax.map(lambda x: one_chunk(x[0], k, v, x[1]), (q, rows_of_table))
        return rearrange(out, "n h w c -> (n h) w c")

    heads = tuple(rearrange(x, "b h w a c -> (b a) h w c") for x in (q, k, v))
    out = jax.lax.map(one_head, heads)
    return rearrange(out, "(b a) h w c -> b h w a c", a=a)


def _mean_by_softmax(logits, values):
    """``softmax(logits) @ values``, divided by the sum last: c numbers a query, not one per key."""
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    means = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return (means / total).astype(values.dtype)
