"""Attention over a grid with decomposed relative positions: one reference, and what is faster."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sam_jax.arrays import Array, Float, GridShape
from sam_jax.ops import dispatch
from sam_jax.ops.full_precision import EXACT, multiply
from sam_jax.ops.positional import relative_positions, resize_table
from sam_jax.ops.tpu import flash_attention, window_attention

Implementation: TypeAlias = Literal[
    "auto", "reference", "extended", "chunked", "window_kernel", "flash_kernel", "cudnn"
]

# Rows of queries that "chunked" handles at once: 8 rows of a 64 x 64 grid make logits of
# 512 x 4096 float32 (8 MB), which stay in the cache of one CPU core.
QUERY_ROWS_PER_CHUNK = 8
# Up to this many tokens the whole matrix of logits is small enough to be made at once.
MAX_TOKENS_AT_ONCE = 1024
# Most channels of a head for cuDNN's fused attention, forward and backward, with queries, keys and
# values of equal width; by major compute capability, 0 for all others.
_CUDNN_MAX_CHANNELS = {0: 128, 9: 256}
# Older GPUs have no fused attention.
_CUDNN_OLDEST = (8, 0)
_CUDNN_MULTIPLE = 8


def grid_attention(
    qkv: Float[Array, "b gh gw e"],
    rel_pos_h: Float[Array, "entries_h c"] | None,
    rel_pos_w: Float[Array, "entries_w c"] | None,
    num_heads: int,
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "b gh gw d"]:
    """Softmax attention of all tokens with all tokens of the same grid.

    Logits are ``q . k / sqrt(c) + q . R_h[row offset] + q . R_w[column offset]`` in float32. All
    forms give the same values and gradients:

    - ``reference``: the formula as it stands; holds all logits of all heads.
    - ``extended``: every query carries its relative terms as further channels, and every key says
      with ones which row and column it is in, so that one product makes the whole logits.
    - ``chunked``: a few rows of queries of one head at a time, for large grids.
    - ``window_kernel``, ``flash_kernel``: TPU kernels for small and for large grids; elsewhere they
      are interpreted, which is for tests.
    - ``cudnn``: the extended form by cuDNN's fused attention, on NVIDIA GPUs. Relative terms are
      rounded like queries, twice as finely where the channels suffice. Elsewhere the same product
      is computed without it, which is for tests.

    ``auto`` is the fastest for the shape and the device of those that do not hold all logits.

    Args:
      qkv: projections of every token as one dense layer makes them, e = 3 d: queries of all heads,
        then keys, then values. The scale is applied here.
      rel_pos_h, rel_pos_w: tables of relative positions per axis (of any length; interpolated),
        or None for attention without them.
      num_heads: heads, of c = d / num_heads channels.
      implementation: which of the forms computes it.

    Raises:
      ValueError: if a form is asked for that cannot do this shape.

    Source: Li et al. 2022 (MViTv2), section 3.1, as used in ViTDet and SAM.
    """
    return GRID_ATTENTION(qkv, rel_pos_h, rel_pos_w, num_heads, implementation=implementation)


def _by_heads(form: Any) -> Any:
    """A form that takes queries, keys and values by head, and embeddings of all offsets."""

    def attend(qkv, rel_pos_h, rel_pos_w, num_heads):
        _, gh, gw, _ = qkv.shape
        q, k, v = rearrange(qkv, "b h w (three a c) -> three b h w a c", three=3, a=num_heads)
        of_offsets = None
        if rel_pos_h is not None and rel_pos_w is not None:
            # Rounded after the lookup: the gradient of a table's entry is summed in float32.
            of_offsets = [
                relative_positions(table, size).astype(qkv.dtype)
                for table, size in ((rel_pos_h, gh), (rel_pos_w, gw))
            ]
        return rearrange(form(q, k, v, of_offsets), "b h w a c -> b h w (a c)")

    return attend


def _by_tables(kernel: Any) -> Any:
    """A kernel that takes packed projections and tables of exactly ``2 size - 1`` entries."""

    def attend(qkv, rel_pos_h, rel_pos_w, num_heads, *, interpret):
        _, gh, gw, width = qkv.shape
        head_dim = width // 3 // num_heads
        tables = [
            resize_table(jnp.zeros((1, head_dim)) if table is None else table, size)
            for table, size in ((rel_pos_h, gh), (rel_pos_w, gw))
        ]
        return kernel(qkv, *tables, num_heads, interpret=interpret)

    return attend


def _shape_of(qkv: Any, num_heads: int) -> tuple[GridShape, int]:
    """Rows and columns, and channels of a head."""
    _, gh, gw, width = qkv.shape
    return (gh, gw), width // 3 // num_heads


def _kernel_supports(module: Any) -> Any:
    def supports(qkv, rel_pos_h, rel_pos_w, num_heads):
        grid, head_dim = _shape_of(qkv, num_heads)
        return module.supports(grid, num_heads, head_dim)

    return supports


def _holds_all_logits(qkv, *_, **__) -> bool:
    return qkv.shape[1] * qkv.shape[2] <= MAX_TOKENS_AT_ONCE


def _cudnn_supports(qkv, rel_pos_h, rel_pos_w, num_heads) -> bool:
    """True if cuDNN takes so many channels, and on all but GPUs, which do without it."""
    target = dispatch.current_target()
    grid, head_dim = _shape_of(qkv, num_heads)
    needed = _round_up(head_dim + sum(grid), _CUDNN_MULTIPLE)
    return target.platform != "gpu" or needed <= cudnn_max_channels(target.compute_capability)


def _cudnn_pays(qkv, *_, **__) -> bool:
    # Its backward pass wants an even number of tokens.
    return qkv.dtype in (jnp.bfloat16, jnp.float16) and qkv.shape[1] * qkv.shape[2] % 2 == 0


def _reference(q, k, v, tables):
    gh, gw, c = q.shape[1], q.shape[2], q.shape[-1]
    logits = jnp.einsum(
        "bhwac,bijac->bahwij", multiply(q, c**-0.5), k, preferred_element_type=jnp.float32
    )
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
    a, gh, c = q.shape[3], q.shape[1], q.shape[-1]
    # In float32, as relative terms may be large: half precision would round them among the logits.
    queries, keys = [q.astype(jnp.float32) * c**-0.5], [k.astype(jnp.float32)]
    if tables is not None:
        queries += _relative_terms(q, tables)
        keys += _ones_at_keys(k, jnp.float32)
    queries, keys = (
        rearrange(jnp.concatenate(parts, axis=-1), "b h w a e -> (b a) (h w) e")
        for parts in (queries, keys)
    )
    logits = jnp.einsum("xqe,xke->xqk", queries, keys, precision=EXACT)
    out = mean_by_softmax(logits, rearrange(v, "b h w a c -> (b a) (h w) c"))
    return rearrange(out, "(b a) (h w) c -> b h w a c", a=a, h=gh)


def _relative_terms(q, tables):
    """A query's terms for all rows, and for all columns, ``[b, h, w, a, size]`` in float32."""
    by_row, by_column = tables
    return [
        jnp.einsum("bhwac,hic->bhwai", q, by_row, preferred_element_type=jnp.float32),
        jnp.einsum("bhwac,wjc->bhwaj", q, by_column, preferred_element_type=jnp.float32),
    ]


def _ones_at_keys(k, dtype):
    """A one at each key's row, and at its column, ``[b, h, w, a, size]``."""
    return [
        jnp.broadcast_to(
            np.eye(k.shape[axis], dtype=dtype)[np.indices(k.shape[1:3])[axis - 1]][:, :, None],
            (*k.shape[:-1], k.shape[axis]),
        )
        for axis in (1, 2)
    ]


def _by_cudnn(q, k, v, tables):
    gh, gw, _, c = q.shape[1:]
    target = dispatch.current_target()
    queries, keys = [multiply(q, c**-0.5)], [k]
    if tables is not None:
        terms, ones = _relative_terms(q, tables), _ones_at_keys(k, k.dtype)
        leading = [term.astype(q.dtype) for term in terms]
        queries, keys = queries + leading, keys + ones
        # Other platforms compute it like the GPU with the highest limit.
        most = cudnn_max_channels(target.compute_capability or (9, 0))
        if c + 2 * (gh + gw) <= most:
            queries += [
                (term - lead.astype(jnp.float32)).astype(q.dtype)
                for term, lead in zip(terms, leading, strict=True)
            ]
            keys += ones
    queries, keys = (jnp.concatenate(parts, axis=-1) for parts in (queries, keys))
    width = _round_up(queries.shape[-1], _CUDNN_MULTIPLE)
    # Queries, keys and values must be equally wide.
    queries, keys, values = (
        rearrange(
            jnp.pad(x, (*((0, 0),) * 4, (0, width - x.shape[-1]))), "b h w a e -> b (h w) a e"
        )
        for x in (queries, keys, v)
    )
    out = jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        scale=1.0,
        implementation="cudnn" if target.platform == "gpu" else "xla",
    )
    return rearrange(out[..., :c], "b (h w) a c -> b h w a c", h=gh)


def cudnn_max_channels(capability: tuple[int, int] | None) -> int:
    """Channels of a head that cuDNN's fused attention takes in both passes, 0 if it does nothing.

    Whatever runs forward may be differentiated, so that what the backward pass takes decides.

    Args:
      capability: the GPU's compute capability; None for a device that is no NVIDIA GPU.

    Source: cudnn-frontend, ``scaled_dot_product_flash_attention.h``, checks of the backward pass.
    """
    if capability is None or capability < _CUDNN_OLDEST:
        return 0
    return _CUDNN_MAX_CHANNELS.get(capability[0], _CUDNN_MAX_CHANNELS[0])


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _chunked(q, k, v, tables):
    gh, a, c = q.shape[1], q.shape[3], q.shape[-1]
    rows = max(r for r in range(1, QUERY_ROWS_PER_CHUNK + 1) if gh % r == 0)
    dtype = q.dtype
    # What chunks share is rounded in each of them: loops sum its gradient in its own type.
    k, v = (x.astype(jnp.float32) for x in (k, v))
    by_row: Any = None
    by_column: Any = None
    if tables is not None:
        by_row, by_column = (x.astype(jnp.float32) for x in tables)

    @jax.checkpoint
    def one_chunk(q, k, v, by_row):
        """``q`` [rows, gw, c] against all of ``k`` and ``v`` [gh * gw, c], one head."""
        k, v = k.astype(dtype), v.astype(dtype)
        q_scaled = multiply(q, c**-0.5)
        logits = jnp.einsum("hwc,kc->hwk", q_scaled, k, preferred_element_type=jnp.float32)
        if by_row is not None and by_column is not None:
            of_rows, of_columns = by_row.astype(dtype), by_column.astype(dtype)
            logits = rearrange(logits, "h w (i j) -> h w i j", i=gh)
            logits += jnp.einsum("hwc,hic->hwi", q, of_rows, preferred_element_type=jnp.float32)[
                ..., None
            ]
            logits += jnp.einsum("hwc,wjc->hwj", q, of_columns, preferred_element_type=jnp.float32)[
                :, :, None
            ]
            logits = rearrange(logits, "h w i j -> h w (i j)")
        return mean_by_softmax(logits, v)

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


def mean_by_softmax(
    logits: Float[Array, "*batch q k"], values: Float[Array, "... k c"]
) -> Float[Array, "*batch q c"]:
    """``softmax(logits) @ values``, divided by the sum last: c numbers a query, not one per key."""
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    means = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return (means / total).astype(values.dtype)


def _examples(dtype: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Heads that fill the lanes together, and ones that straddle them, as those of ViT-H do."""
    rng = np.random.default_rng(0)

    def inputs(grid: GridShape, heads: int, channels: int) -> tuple[Any, ...]:
        tables = [rng.standard_normal((2 * size - 1, channels)) for size in grid]
        qkv = rng.standard_normal((2, *grid, 3 * heads * channels))
        return tuple(jnp.asarray(x, dtype) for x in (qkv, *tables))

    return [
        (inputs((14, 8), 2, 64), {"num_heads": 2}),
        (inputs((8, 8), 8, 80), {"num_heads": 8}),
    ]


GRID_ATTENTION = dispatch.Operation(
    "grid_attention",
    [
        dispatch.Form(
            "window_kernel",
            _by_tables(window_attention.window_attention),
            supports=_kernel_supports(window_attention),
            is_kernel=True,
        ),
        dispatch.Form(
            "flash_kernel",
            _by_tables(flash_attention.flash_attention),
            supports=_kernel_supports(flash_attention),
            pays=lambda *args, **options: not _holds_all_logits(*args, **options),
            is_kernel=True,
        ),
        dispatch.Form(
            "cudnn",
            _by_heads(_by_cudnn),
            supports=_cudnn_supports,
            pays=_cudnn_pays,
            platforms=("gpu",),
        ),
        dispatch.Form("extended", _by_heads(_extended), pays=_holds_all_logits),
        dispatch.Form("chunked", _by_heads(_chunked)),
        dispatch.Form("reference", _by_heads(_reference)),
    ],
    examples=_examples,
    describe=lambda qkv, h, w, num_heads: (
        f"a grid of {qkv.shape[1]} x {qkv.shape[2]} tokens with {num_heads} heads of "
        f"{qkv.shape[3] // 3 // num_heads} channels"
    ),
)
