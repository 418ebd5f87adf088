"""TPU kernels for attention of a prompt's tokens to the image tokens of their object.

Where tokens were brought through the projections of the image tokens (``ops.token_attention``),
keys are the image tokens with their positions and values the image tokens themselves: an object's
2 MB are read once and used twice. Logits lie on their side, image tokens in the lanes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sam_jax.arrays import Array, Float
from sam_jax.ops.full_precision import product
from sam_jax.ops.remat import worth_keeping
from sam_jax.ops.tpu.kernel import LANES, SUBLANES, fused_call, tile_size
from sam_jax.ops.tpu.per_token import each_block, each_object

# Rows of tokens and heads come in whole tiles of half precision.
ROW_MULTIPLE = 2 * SUBLANES


def supports(num_tokens: int, dim: int, num_heads: int) -> bool:
    """True if image tokens, channels and heads fill whole registers."""
    return num_heads == SUBLANES and num_tokens % LANES == 0 and dim % LANES == 0


def token_to_image_attention(
    rows: Float[Array, "objects f d"],
    image_tokens: Float[Array, "objects tokens d"],
    positions: Float[Array, "tokens d"],
    *,
    interpret: Any,
) -> tuple[Float[Array, "objects f d"], Float[Array, "objects tokens d"]]:
    """Means of image tokens by the softmax of their products with each row; and the image tokens.

    What follows should use these image tokens: then the kernel adds up their gradients, which would
    take more time by themselves.

    Args:
      rows: folded queries, a row for each token and head; logits are
        ``rows . (image_tokens + positions)``.
      image_tokens: of each object.
      positions: encodings of the image tokens, without a gradient.
      interpret: whether to run it without a TPU, slowly.
    """
    return _means(interpret, rows, image_tokens, positions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _means(interpret, rows, image_tokens, positions):
    return _forward(interpret, rows, image_tokens, positions)[0], image_tokens


def _forward(interpret, rows, image_tokens, positions):
    objects, num_rows, dim = rows.shape
    return fused_call(
        _forward_kernel,
        (rows, image_tokens, positions),
        _input_specs(rows, image_tokens),
        [
            (jax.ShapeDtypeStruct(rows.shape, rows.dtype), each_object((num_rows, dim))),
            (
                jax.ShapeDtypeStruct((objects, num_rows, LANES), jnp.float32),
                each_object((num_rows, LANES)),
            ),
        ],
        scratch=[
            pltpu.VMEM((num_rows, LANES), jnp.float32),
            pltpu.VMEM((num_rows, LANES), jnp.float32),
            pltpu.VMEM((num_rows, dim), jnp.float32),
        ],
        **_call_options(rows, image_tokens, products=2),
        interpret=interpret,
        name="token_to_image_attention",
    )


def _means_forward(interpret, rows, image_tokens, positions):
    found = _forward(interpret, rows, image_tokens, positions)
    means, log_sums = worth_keeping(found)
    return (means, image_tokens), (rows, image_tokens, positions, means, log_sums)


def _means_backward(interpret, residuals, cotangents):
    d_means, d_image_tokens = cotangents
    rows, image_tokens, positions, means, log_sums = residuals
    # The gradient of softmax subtracts the weighted mean of the gradients of its outputs.
    offsets = jnp.sum(d_means.astype(jnp.float32) * means.astype(jnp.float32), axis=-1)
    offsets = jnp.broadcast_to(offsets[..., None], log_sums.shape)
    per_row = each_object(rows.shape[1:])
    statistics = each_object(log_sums.shape[1:])
    d_rows, d_image_tokens = fused_call(
        _backward_kernel,
        (rows, image_tokens, positions, log_sums, offsets, d_means, d_image_tokens),
        (
            *_input_specs(rows, image_tokens),
            statistics,
            statistics,
            per_row,
            each_block(image_tokens),
        ),
        [
            (jax.ShapeDtypeStruct(rows.shape, jnp.float32), per_row),
            (
                jax.ShapeDtypeStruct(image_tokens.shape, image_tokens.dtype),
                each_block(image_tokens),
            ),
        ],
        **_call_options(rows, image_tokens, products=5),
        interpret=interpret,
        name="token_to_image_attention_backward",
    )
    return d_rows.astype(rows.dtype), d_image_tokens, None


_means.defvjp(_means_forward, _means_backward)


def _input_specs(rows, image_tokens):
    of_step = pl.BlockSpec(
        (tile_size(image_tokens.shape[1]), image_tokens.shape[2]), lambda i, j: (j, 0)
    )
    return each_object(rows.shape[1:]), each_block(image_tokens), of_step


def _call_options(rows: Array, image_tokens: Array, products: int) -> dict[str, Any]:
    objects, num_tokens, dim = image_tokens.shape
    logits = objects * rows.shape[1] * num_tokens
    return {
        "grid": (objects, num_tokens // tile_size(num_tokens)),
        "flops": 2 * products * logits * dim,
        "transcendentals": logits,
    }


def _forward_kernel(inputs, outputs, largest, total, weighed):
    rows, image_tokens, positions = inputs
    means, log_sums = outputs
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        largest[...] = jnp.full_like(largest, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        weighed[...] = jnp.zeros_like(weighed)

    values = image_tokens[0]
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


def _backward_kernel(inputs, outputs):
    rows, image_tokens, positions, log_sums, offsets, d_means, d_after = inputs
    d_rows, d_image_tokens = outputs

    @pl.when(pl.program_id(1) == 0)
    def _():
        d_rows[...] = jnp.zeros_like(d_rows)

    values = image_tokens[0]
    keys = values + positions[...]
    weights = jnp.exp(product(rows[0], keys, (1, 1)) - log_sums[0, :, :1])
    d_weights = product(d_means[0], values, (1, 1))
    d_logits = (weights * (d_weights - offsets[0, :, :1])).astype(values.dtype)
    d_rows[0] += product(d_logits, keys, (1, 0))
    d_token = d_after[0].astype(jnp.float32)
    d_token += product(weights.astype(values.dtype), d_means[0], (0, 0))
    d_image_tokens[0] = (d_token + product(d_logits, rows[0], (0, 0))).astype(d_image_tokens.dtype)
