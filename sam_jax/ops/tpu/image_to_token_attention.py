"""A TPU kernel for attention of an object's image tokens to its prompt's tokens, and what follows.

The prompt's tokens were brought through the projections on both sides (``ops.token_attention``), so
a step does two thin products for some image tokens, and adds dropout, residual sum and LayerNorm
while they are at hand.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sam_jax.arrays import Array, Float, Int
from sam_jax.ops.dropout import dropped_out, keep_mask
from sam_jax.ops.full_precision import product
from sam_jax.ops.norm import NormWeights
from sam_jax.ops.tpu.per_token import TokenFunction, per_token


def image_to_token_attention(
    rows: Float[Array, "objects f d"],
    biases: Float[Array, "objects f 1"],
    updates: Float[Array, "objects f d"],
    out_bias: Float[Array, " d"],
    norm: NormWeights,
    image_tokens: Float[Array, "objects tokens d"],
    positions: Float[Array, "tokens d"],
    dropout_seeds: Int[Array, " objects"] | None,
    *,
    num_heads: int,
    dropout_rate: float,
    norm_epsilon: float,
    interpret: Any,
) -> Float[Array, "objects tokens d"]:
    """Image tokens plus dropout of attention to an object's tokens, normalised.

    Args:
      rows: folded keys, a row for each token and head; logits are
        ``rows . (image_tokens + positions) + biases``.
      biases: of logits; -inf for tokens that are not valid.
      updates: what each head of each token adds to whoever attends to it alone.
      out_bias: of the attention's last projection.
      norm: of the LayerNorm.
      image_tokens, positions: of each object; their encodings.
      dropout_seeds: of ``ops.dropout.keep_mask``; None for no dropout.
      num_heads: heads, which are the faster axis of rows.
      dropout_rate: of what is added.
      norm_epsilon: added to the variance.
      interpret: see ``kernel.fused_call``.
    """
    rate = 0.0 if dropout_seeds is None else dropout_rate
    return per_token(
        TokenFunction(
            functools.partial(_attend, num_heads, rate, norm_epsilon),
            out_rows=None,
            name="image_to_token_attention",
            flops_per_token=4 * rows.shape[1] * rows.shape[2],
        ),
        tuple(x.astype(jnp.float32)[None] for x in (out_bias, *norm)),
        (rows, biases, updates),
        image_tokens,
        positions=positions,
        seeds=dropout_seeds,
        out_dtype=image_tokens.dtype,
        interpret=interpret,
    )


def _attend(num_heads, dropout_rate, norm_epsilon, weights, per_object, image_tokens, extras):
    """Some image tokens of one object; tokens and heads are joined on the first axis of logits."""
    rows, biases, updates = per_object
    out_bias, scale, shift = weights
    logits = product(rows, image_tokens + extras.positions, (1, 1)) + biases
    by_token = logits.reshape(-1, num_heads, logits.shape[1])
    largest = jax.lax.stop_gradient(jnp.max(by_token, axis=0))
    probs = jnp.exp(by_token - largest)
    probs *= 1.0 / jnp.sum(probs, axis=0)
    update = product(probs.reshape(logits.shape).astype(image_tokens.dtype), updates, (0, 0))
    update += out_bias
    if dropout_rate:
        places = extras.first + jax.lax.broadcasted_iota(jnp.int32, (update.shape[0], 1), 0)
        keep = keep_mask(extras.seed, places, update.shape[1], dropout_rate)
        update = dropped_out(update, keep, dropout_rate)
    x = image_tokens.astype(jnp.float32) + update
    x -= jnp.mean(x, axis=1, keepdims=True)
    variance = jnp.mean(jnp.square(x), axis=1, keepdims=True)
    return x * jax.lax.rsqrt(variance + norm_epsilon) * scale + shift
