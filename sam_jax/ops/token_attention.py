"""Attention among the few tokens of a prompt and the many tokens of an image, three operations.

``token_attention`` is the definition: project, softmax over keys per head, project back. The other
two are those of the two-way transformer, between an object's few tokens and its thousands of image
tokens. Where the image tokens are an object's own, its tokens are brought through the image tokens'
projections instead: for every head, ``(W_q t) . (W_k x) = (W_k^T W_q t) . x`` and
``sum_x p_x (W_v x) = W_v (sum_x p_x x)``. That is exact, takes less than half of the arithmetic,
and no projected image tokens are ever in memory.

Arrays carry an axis of objects that may be 1 on either side where all objects of an image share it:
it is broadcast inside products and never copied.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sam_jax.arrays import Array, Bool, DimSize, Float, Int
from sam_jax.ops import dispatch
from sam_jax.ops.dropout import dropout
from sam_jax.ops.full_precision import EXACT, add_bias, add_shared, broadcast_to, multiply
from sam_jax.ops.linear import dense
from sam_jax.ops.norm import NormWeights, layer_norm
from sam_jax.ops.tpu import image_to_token_attention as image_to_token_kernel
from sam_jax.ops.tpu import token_to_image_attention as token_to_image_kernel

# Lengths to count with where ``jax.export`` leaves them open: clicks on many objects.
_OPEN_TOKENS = 8
_OPEN_OBJECTS = 64


class AttentionWeights(NamedTuple):
    """Weights of multi-head attention, heads side by side: ``e = heads * channels``."""

    q_kernel: Float[Array, "d e"]
    q_bias: Float[Array, " e"]
    k_kernel: Float[Array, "d e"]
    k_bias: Float[Array, " e"]
    v_kernel: Float[Array, "d e"]
    v_bias: Float[Array, " e"]
    out_kernel: Float[Array, "e d"]
    out_bias: Float[Array, " d"]


def token_attention(
    weights: AttentionWeights,
    queries: Float[Array, "b #p s d"],
    keys: Float[Array, "b #p t d"],
    values: Float[Array, "b #p t d"],
    keys_valid: Bool[Array, "b #p t"] | None = None,
    *,
    num_heads: int,
    implementation: str = dispatch.AUTO,
) -> Float[Array, "b p s d"]:
    """Multi-head attention; logits are float32, keys that are not valid get no weight."""
    return TOKEN_ATTENTION(
        weights,
        queries,
        keys,
        values,
        keys_valid,
        num_heads=num_heads,
        implementation=implementation,
    )


def token_to_image_attention(
    weights: AttentionWeights,
    tokens: Float[Array, "b #p t d"],
    image_tokens: Float[Array, "b #p k d"],
    image_pe: Float[Array, "k d"],
    *,
    num_heads: int,
    implementation: str = dispatch.AUTO,
) -> tuple[Float[Array, "b p t d"], Float[Array, "b #p k d"]]:
    """Attention of tokens to the image tokens of their object; and the image tokens.

    Keys are image tokens with their positional encoding, which has no gradient, values image tokens
    alone. What follows should use the image tokens that are returned: a kernel then adds up the
    gradients of both uses.
    """
    return TOKEN_TO_IMAGE_ATTENTION(
        weights,
        tokens,
        image_tokens,
        image_pe,
        num_heads=num_heads,
        implementation=implementation,
    )


def image_to_token_attention(
    weights: AttentionWeights,
    norm: NormWeights,
    image_tokens: Float[Array, "b #p k d"],
    image_pe: Float[Array, "k d"],
    keys: Float[Array, "b #p t d"],
    values: Float[Array, "b #p t d"],
    keys_valid: Bool[Array, "b #p t"],
    dropout_seeds: Int[Array, "b p"] | None = None,
    *,
    num_heads: int,
    dropout_rate: float,
    norm_epsilon: float,
    implementation: str = dispatch.AUTO,
) -> Float[Array, "b p k d"]:
    """Image tokens after attention to their object's tokens: dropout, residual sum and LayerNorm.

    Args:
      weights: of the attention.
      norm: of the LayerNorm.
      image_tokens, image_pe: of each object or image; their positional encoding.
      keys, values, keys_valid: the object's tokens.
      dropout_seeds: see ``ops.dropout.dropout``; None for no dropout.
      num_heads: of the attention.
      dropout_rate: of what is added to the image tokens.
      norm_epsilon: added to the variance.
      implementation: which form computes it.
    """
    return IMAGE_TO_TOKEN_ATTENTION(
        weights,
        norm,
        image_tokens,
        image_pe,
        keys,
        values,
        keys_valid,
        dropout_seeds,
        num_heads=num_heads,
        dropout_rate=dropout_rate,
        norm_epsilon=norm_epsilon,
        implementation=implementation,
    )


# --- References -----------------------------------------------------------------------------------


def _attention(weights, queries, keys, values, keys_valid=None, *, num_heads):
    q = _split_heads(dense(queries, weights.q_kernel, weights.q_bias), num_heads)
    k = _split_heads(dense(keys, weights.k_kernel, weights.k_bias), num_heads)
    v = _split_heads(dense(values, weights.v_kernel, weights.v_bias), num_heads)
    logits = jnp.einsum("bpsac,bptac->bpast", q, k, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    if keys_valid is not None:
        logits = jnp.where(keys_valid[:, :, None, None], logits, -jnp.inf)
    probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    heads = jnp.einsum("bpast,bptac->bpsac", probs, v)
    return dense(_join_channels(heads), weights.out_kernel, weights.out_bias)


def _token_to_image(weights, tokens, image_tokens, image_pe, *, num_heads):
    keys = image_tokens + jax.lax.stop_gradient(image_pe)
    return _attention(weights, tokens, keys, image_tokens, num_heads=num_heads), image_tokens


def _image_to_token(
    weights, norm, image_tokens, image_pe, keys, values, keys_valid, dropout_seeds=None,
    *, num_heads, dropout_rate, norm_epsilon, attend=_attention,
):  # fmt: skip
    queries = image_tokens + jax.lax.stop_gradient(image_pe)
    update = attend(weights, queries, keys, values, keys_valid, num_heads=num_heads)
    update = dropout(update, dropout_seeds, dropout_rate)
    return layer_norm(add_shared(update, image_tokens), norm, norm_epsilon)


# --- In an order of products that suits few tokens and many ---------------------------------------


def _token_to_image_ordered(weights, tokens, image_tokens, image_pe, *, num_heads):
    keys = image_tokens + jax.lax.stop_gradient(image_pe)
    attended = _few_to_many(weights, tokens, keys, image_tokens, num_heads=num_heads)
    return attended, image_tokens


def _ordered(weights, queries, keys, values, keys_valid=None, *, num_heads):
    num_queries, num_keys = (known_size(x.shape[2], _OPEN_TOKENS) for x in (queries, keys))
    ordered = _many_to_few if num_queries > num_keys else _few_to_many
    return ordered(weights, queries, keys, values, keys_valid, num_heads=num_heads)


def _few_to_many(w, queries, keys, values, keys_valid=None, *, num_heads):
    """``attention`` of few queries, which go through the keys' projection if that takes less."""
    scale = (w.q_bias.size // num_heads) ** -0.5
    fold = _folding_pays(w, queries, keys, num_heads)
    q = dense(queries, w.q_kernel, w.q_bias)
    if fold:
        # The keys' bias adds the same to all logits of a query, which softmax does not see.
        rows = _fold(_split_heads(q, num_heads), w.k_kernel)
    else:
        rows = expand_heads(q, num_heads)
        keys = dense(keys, w.k_kernel, w.k_bias)
    logits = _contract("bpfd,bptd->bpft", _join_rows(rows), keys)
    logits = split_rows(logits, num_heads) * scale
    if keys_valid is not None:
        logits = jnp.where(keys_valid[:, :, None, None], logits, -jnp.inf)
    probs = _join_rows(jax.nn.softmax(logits, axis=-1).astype(values.dtype))
    if not fold:
        values = dense(values, w.v_kernel, w.v_bias)
    means = _contract("bpft,bptd->bpfd", probs, values, values.dtype)
    means = split_rows(means, num_heads)
    if fold:
        kernel = _heads_of(w.v_kernel.astype(means.dtype), num_heads)
        heads = _join_channels(jnp.einsum("bpsad,dac->bpsac", means, kernel))
        heads = add_bias(heads, w.v_bias)
    else:
        heads = own_heads(means)
    return dense(heads, w.out_kernel, w.out_bias)


def _many_to_few(w, queries, keys, values, keys_valid=None, *, num_heads):
    """``attention`` of many queries, which stay the last axis of logits: that is fast to sum."""
    scale = (w.q_bias.size // num_heads) ** -0.5
    k = dense(keys, w.k_kernel, w.k_bias)
    if _folding_pays(w, keys, queries, num_heads):
        heads = _split_heads(k, num_heads)
        logits = _contract("bpfd,bpsd->bpfs", _join_rows(_fold(heads, w.q_kernel)), queries)
        bias = rearrange(w.q_bias, "(a c) -> a c", a=num_heads)
        by_bias = jnp.einsum("bptac,ac->bpta", heads.astype(jnp.float32), bias, precision=EXACT)
        logits += _join_rows(by_bias[..., None])
    else:
        queries = dense(queries, w.q_kernel, w.q_bias)
        rows = expand_heads(k, num_heads)
        logits = _contract("bpfd,bpsd->bpfs", _join_rows(rows), queries)
    logits = split_rows(logits, num_heads) * scale
    if keys_valid is not None:
        logits = jnp.where(keys_valid[:, :, :, None, None], logits, -jnp.inf)
    probs = _join_rows(jax.nn.softmax(logits, axis=2).astype(values.dtype))
    # Unlike the queries, the output is each object's own, so the projection is always folded.
    v = _split_heads(dense(values, w.v_kernel, w.v_bias), num_heads)
    out_kernel = rearrange(w.out_kernel.astype(v.dtype), "(a c) d -> a c d", a=num_heads)
    updates = jnp.einsum("bptac,acd->bptad", v, out_kernel)
    update = _contract("bpfs,bpfd->bpsd", probs, _join_rows(updates), values.dtype)
    return add_bias(update, w.out_bias)


def _fold(heads: Float[Array, "b p t a c"], kernel: Array) -> Float[Array, "b p t a d"]:
    """Heads of few tokens times the transposed projection of the many tokens they will meet."""
    kernel = _heads_of(kernel.astype(heads.dtype), heads.shape[3])
    return jnp.einsum("bptac,dac->bptad", heads, kernel)


def _heads_of(kernel: Array, num_heads: int) -> Array:
    return rearrange(kernel, "d (a c) -> d a c", a=num_heads)


_image_to_token_ordered = functools.partial(_image_to_token, attend=_many_to_few)


def folding_pays(
    num_few: int,
    num_many: int,
    dim: int,
    inner: int,
    num_heads: int,
    num_sharing: float = 1,
) -> bool:
    """True if folding a projection into few tokens is cheaper than projecting the many tokens.

    Args:
      num_few, num_many: tokens on either side, of an object.
      dim: channels of tokens.
      inner: channels of all heads.
      num_heads: heads.
      num_sharing: objects that share the many, and would share their projection.
    """
    projected = num_many * inner * (dim / num_sharing + num_few)
    folded = num_few * dim * (inner + num_many * num_heads)
    # The 10 % are for projected tokens, which are written to memory and read again.
    return folded < 1.1 * projected


def _folding_pays(weights: AttentionWeights, few: Array, many: Array, num_heads: int) -> bool:
    is_shared = known_size(many.shape[1], _OPEN_OBJECTS) == 1
    dim, inner = weights.q_kernel.shape
    return folding_pays(
        known_size(few.shape[2], _OPEN_TOKENS),
        known_size(many.shape[2], _OPEN_TOKENS),
        dim,
        inner,
        num_heads,
        num_sharing=known_size(few.shape[1], _OPEN_OBJECTS) if is_shared else 1,
    )


def known_size(size: DimSize, otherwise: int) -> int:
    """A length, or what to count with where an export leaves it open."""
    return size if isinstance(size, int) else otherwise


# --- Heads of few tokens --------------------------------------------------------------------------
#
# Tokens and heads are joined on one axis for products with image tokens, which XLA's CPU compiler
# would copy otherwise. Heads come last on it: there are eight, like the rows of a TPU's tiles, so
# that sums over tokens move no data. Products of the few tokens use rows with zeros for the other
# heads: a TPU multiplies the zeros faster than it could reorder the heads.


def expand_heads(x: Float[Array, "b p t e"], num_heads: int) -> Float[Array, "b p t a e"]:
    """Block-diagonal expansion: each head's channels in their place, zeros in the others'.

    One product with heads that lie side by side then gives the logits of each head.
    """
    return x[:, :, :, None] * _blocks(num_heads, x)


def own_heads(x: Float[Array, "b p t a e"]) -> Float[Array, "b p t e"]:
    """Own channels of each head, taken from its row; the transpose of ``expand_heads``."""
    return jnp.sum(x * _blocks(x.shape[3], x), axis=3)


def _blocks(num_heads: int, like: Array) -> Array:
    channels = like.shape[-1] // num_heads
    return jnp.asarray(np.kron(np.eye(num_heads), np.ones(channels)), like.dtype)


def fold_into(rows: Float[Array, "b p t a e"], kernel: Array) -> Float[Array, "b p t a d"]:
    """``_fold`` for heads from ``expand_heads``, whose zeros are multiplied, too."""
    return jnp.einsum("bptae,de->bptad", rows, kernel.astype(rows.dtype))


def fold_out(
    w: AttentionWeights, values: Float[Array, "b p t d"], num_heads: int
) -> Float[Array, "b p t a d"]:
    """Values of each head of each token after the output projection, without its bias."""
    v = expand_heads(dense(values, w.v_kernel, w.v_bias), num_heads)
    return jnp.einsum("bptae,ed->bptad", v, w.out_kernel.astype(v.dtype))


def query_bias_logits(
    w: AttentionWeights, keys: Float[Array, "b p t a e"]
) -> Float[Array, "b p t a 1"]:
    """Logits that the bias of folded queries adds to each key, in float32."""
    logits = jnp.matmul(keys.astype(jnp.float32), w.q_bias, precision=EXACT)
    return logits[..., None]


def _split_heads(x, num_heads):
    return rearrange(x, "b p t (a c) -> b p t a c", a=num_heads)


def _join_channels(x):
    return rearrange(x, "b p t a c -> b p t (a c)")


def _join_rows(x):
    return rearrange(x, "b p t a d -> b p (t a) d")


def split_rows(x: Float[Array, "b p f d"], num_heads: int) -> Float[Array, "b p t a d"]:
    """Rows of tokens and heads by token and head."""
    return rearrange(x, "b p (t a) d -> b p t a d", a=num_heads)


def _contract(equation: str, few: Array, many: Array, dtype: Any = jnp.float32) -> Array:
    """An einsum of ``few`` and ``many``; axis ``p`` is dropped from one whose objects share it."""
    (left, right), out = equation.split("->", maxsplit=1)[0].split(","), equation.split("->")[1]
    if many.shape[1] == 1 and few.shape[1] > 1:
        many, right = many[:, 0], right.replace("p", "")
    elif few.shape[1] == 1 and many.shape[1] > 1:
        few, left = few[:, 0], left.replace("p", "")
    return jnp.einsum(f"{left},{right}->{out}", few, many, preferred_element_type=dtype)


# --- On TPUs --------------------------------------------------------------------------------------


def _token_to_image_on_tpu(weights, tokens, image_tokens, image_pe, *, num_heads, interpret):
    """The folded order, in a kernel that reads each image token of an object once."""
    b, p = np.broadcast_shapes(tokens.shape[:2], image_tokens.shape[:2])
    image_tokens = _per_object(image_tokens, b, p)
    scale = (weights.q_bias.size // num_heads) ** -0.5
    q = multiply(dense(tokens, weights.q_kernel, weights.q_bias), scale)
    rows = _join_rows(fold_into(expand_heads(q, num_heads), weights.k_kernel))
    rows = _per_object(rows, b, p)
    means, image_tokens = token_to_image_kernel.token_to_image_attention(
        _join_objects(_whole_tiles(rows)),
        _join_objects(image_tokens),
        image_pe.astype(image_tokens.dtype),
        interpret=interpret,
    )
    means = rearrange(means, "(b p) f d -> b p f d", b=b)[:, :, : rows.shape[2]]
    means = split_rows(means, num_heads)
    heads = own_heads(jnp.einsum("bpsad,de->bpsae", means, weights.v_kernel.astype(means.dtype)))
    attended = dense(add_bias(heads, weights.v_bias), weights.out_kernel, weights.out_bias)
    return attended, rearrange(image_tokens, "(b p) k d -> b p k d", b=b)


def _image_to_token_on_tpu(
    weights, norm, image_tokens, image_pe, keys, values, keys_valid, dropout_seeds=None,
    *, num_heads, dropout_rate, norm_epsilon, interpret,
):  # fmt: skip
    """The folded order, in a kernel that reads and writes each image token of an object once."""
    b, p = np.broadcast_shapes(image_tokens.shape[:2], keys.shape[:2])
    scale = (weights.q_bias.size // num_heads) ** -0.5
    k = multiply(dense(keys, weights.k_kernel, weights.k_bias), scale)
    k = expand_heads(k, num_heads)
    bias = jnp.where(keys_valid[..., None, None], query_bias_logits(weights, k), -jnp.inf)
    rows, bias, update = (
        _per_object(x, b, p)
        for x in (
            _join_rows(fold_into(k, weights.q_kernel)),
            _join_rows(bias),
            _join_rows(fold_out(weights, values, num_heads)),
        )
    )
    image_tokens = _per_object(image_tokens, b, p)
    out = image_to_token_kernel.image_to_token_attention(
        _join_objects(_whole_tiles(rows)),
        _join_objects(_whole_tiles(bias, -jnp.inf)),
        _join_objects(_whole_tiles(update)),
        weights.out_bias,
        norm,
        _join_objects(image_tokens),
        image_pe.astype(image_tokens.dtype),
        None if dropout_seeds is None else dropout_seeds.reshape(-1),
        num_heads=num_heads,
        dropout_rate=dropout_rate,
        norm_epsilon=norm_epsilon,
        interpret=interpret,
    )
    return rearrange(out, "(b p) k d -> b p k d", b=b)


def _per_object(x: Array, b: int, p: int) -> Array:
    """A copy for each object: kernels work on one object after the other."""
    return broadcast_to(x, (b, p, *x.shape[2:]), x.dtype)


def _whole_tiles(rows: Array, fill: float = 0.0) -> Array:
    """Rows of tokens and heads, filled up to whole tiles of half precision."""
    missing = -rows.shape[2] % token_to_image_kernel.ROW_MULTIPLE
    return jnp.pad(rows, ((0, 0), (0, 0), (0, missing), (0, 0)), constant_values=fill)


def _join_objects(x):
    return rearrange(x, "b p ... -> (b p) ...")


def _kernels_support(tokens: Array, image_tokens: Array, num_heads: int) -> bool:
    num_tokens, dim = (known_size(size, 1) for size in image_tokens.shape[2:])
    is_known = isinstance(tokens.shape[2], int)
    return is_known and token_to_image_kernel.supports(num_tokens, dim, num_heads)


# --- Tables ---------------------------------------------------------------------------------------


def _example_inputs(dtype: Any) -> dict[str, Any]:
    """Two objects of eleven tokens, of which one lacks some, on 256 image tokens."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    dim, inner, tokens = 128, 64, normal(1, 2, 11, 128)
    kernel, bias = normal(dim, inner) * dim**-0.5, normal(inner) * 0.1
    outward = normal(inner, dim) * inner**-0.5, normal(dim) * 0.1
    return {
        "weights": AttentionWeights(kernel, bias, kernel, bias, kernel, bias, *outward),
        "norm": NormWeights(1 + 0.1 * normal(dim), 0.1 * normal(dim)),
        "tokens": tokens,
        "valid": jnp.arange(11) < jnp.array([[[11], [7]]]),
        "image_tokens": normal(1, 2, 256, dim),
        "image_pe": normal(256, dim),
        "seeds": jnp.array([[3, 4]], jnp.int32),
    }


def _token_attention_examples(dtype: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Tokens to tokens, to the image's and from them."""
    x = _example_inputs(dtype)
    weights, tokens, image_tokens = x["weights"], x["tokens"], x["image_tokens"]
    options = {"num_heads": 8}
    return [
        ((weights, tokens, tokens, tokens, x["valid"]), options),
        ((weights, tokens, image_tokens, image_tokens), options),
        ((weights, image_tokens, tokens, tokens, x["valid"]), options),
    ]


def _token_to_image_examples(dtype: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    x = _example_inputs(dtype)
    args = (x["weights"], x["tokens"], x["image_tokens"], x["image_pe"])
    return [(args, {"num_heads": 8})]


def _image_to_token_examples(dtype: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    x = _example_inputs(dtype)
    args = (x["weights"], x["norm"], x["image_tokens"], x["image_pe"], x["tokens"], x["tokens"])
    options = {"num_heads": 8, "dropout_rate": 0.2, "norm_epsilon": 1e-5}
    return [
        ((*args, x["valid"], x["seeds"]), options),
        ((*args, x["valid"], None), options),
    ]


TOKEN_ATTENTION = dispatch.Operation(
    "token_attention",
    [dispatch.Form("ordered", _ordered), dispatch.Form("reference", _attention)],
    examples=_token_attention_examples,
)
TOKEN_TO_IMAGE_ATTENTION = dispatch.Operation(
    "token_to_image_attention",
    [
        dispatch.Form(
            "kernel",
            _token_to_image_on_tpu,
            supports=lambda w, tokens, image, pe, *, num_heads: _kernels_support(
                tokens, image, num_heads
            ),
            is_kernel=True,
        ),
        dispatch.Form("ordered", _token_to_image_ordered),
        dispatch.Form("reference", _token_to_image),
    ],
    examples=_token_to_image_examples,
)
IMAGE_TO_TOKEN_ATTENTION = dispatch.Operation(
    "image_to_token_attention",
    [
        dispatch.Form(
            "kernel",
            _image_to_token_on_tpu,
            supports=lambda w, norm, image, pe, keys, *_, num_heads, **__: _kernels_support(
                keys, image, num_heads
            ),
            is_kernel=True,
        ),
        dispatch.Form("ordered", _image_to_token_ordered),
        dispatch.Form("reference", _image_to_token),
    ],
    examples=_image_to_token_examples,
)
