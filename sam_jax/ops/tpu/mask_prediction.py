"""A TPU kernel for upscaling image tokens and their product with the masks' filters.

Sub-pixels lie side by side in the lanes: products with zeros in them stand for what each sub-pixel
does by itself, and an object's 4 MB of upscaled channels are never in the chip's memory.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sam_jax.arrays import Array, Float
from sam_jax.ops.full_precision import product
from sam_jax.ops.packed_masks import SUBPIXELS
from sam_jax.ops.remat import worth_keeping
from sam_jax.ops.tpu.kernel import kernel_gelu
from sam_jax.ops.tpu.per_token import TokenFunction, per_token, supports

__all__ = ["predict_masks", "supports"]


def predict_masks(
    weights: Any,
    image_tokens: Float[Array, "objects tokens d"],
    filters: Float[Array, "objects m c"],
    *,
    norm_epsilon: float,
    interpret: Any,
) -> Float[Array, "objects m 16 tokens"]:
    """Logits of candidates, the 16 sub-pixels of each image token row by row.

    Args:
      weights: see ``ops.mask_prediction.UpscalingWeights``.
      image_tokens: of each object.
      filters: of each candidate.
      norm_epsilon: added to the variance.
      interpret: see ``kernel.fused_call``.
    """
    dtype, dim, num_masks = image_tokens.dtype, image_tokens.shape[-1], filters.shape[1]
    # The mean over channels is linear in the image tokens, so centred kernels make centred results.
    kernel, bias = (
        x - jnp.mean(x, axis=-1, keepdims=True)
        for x in (y.astype(jnp.float32) for y in (weights.kernel1, weights.bias1))
    )
    kernel = rearrange(kernel, "d i j c -> d (i j c)").astype(dtype)
    middle = bias.size
    means = np.kron(np.eye(4), np.full((middle, middle), 1 / middle))
    # Two sub-pixels of the first split fill 128 lanes.
    kernel2 = weights.kernel2.astype(dtype)
    kernel2 = jnp.einsum("dklc,jJ->jdJklc", kernel2, jnp.eye(2, dtype=dtype))
    kernel2 = rearrange(kernel2, "j d J k l c -> (j d) (J k l c)")
    rows = [jnp.tile(x.astype(jnp.float32), 4)[None] for x in (bias, *weights.norm)]
    bias2 = jnp.tile(weights.bias2.astype(jnp.float32), 8)[None]
    # Permutation that takes positions (j k l) of half of the sub-pixels to rows k, columns (j l).
    places = rearrange(np.eye(8), "(j k l) s -> (k j l) s", j=2, k=2)
    filters = jnp.einsum("omc,Ss->oscmS", filters.astype(dtype), jnp.asarray(places, dtype))
    logits = per_token(
        TokenFunction(
            functools.partial(_predict, num_masks, norm_epsilon),
            out_rows=SUBPIXELS * num_masks,
            name="predict_masks",
            flops_per_token=2 * dim * (3 * dim + SUBPIXELS * num_masks),
        ),
        (kernel, *rows, kernel2, bias2),
        (rearrange(filters, "o s c m S -> o (s c) (m S)"),),
        image_tokens,
        constants=(jnp.asarray(means, dtype),),
        out_dtype=jnp.float32,
        interpret=interpret,
    )
    logits = rearrange(logits, "o (m s) n -> o m s n", m=num_masks)
    return worth_keeping(logits)


def _predict(num_masks, norm_epsilon, weights, per_object, image_tokens, extras):
    """Logits ``[m 16, tokens]`` of some image tokens of one object."""
    kernel, bias, scale, shift, kernel2, bias2 = weights
    (filters,), (means,) = per_object, extras.constants
    dtype = image_tokens.dtype
    centred = product(image_tokens, kernel, (1, 0)) + bias
    # Means over the channels of each sub-pixel, for each of its channels.
    variance = product(jnp.square(centred).astype(dtype), means, (1, 0))
    x = centred * jax.lax.rsqrt(variance + norm_epsilon) * scale + shift
    x = kernel_gelu(x, dtype)
    half = x.shape[1] // 2
    halves = []
    for part in (x[:, :half], x[:, half:]):
        pixels = product(part.astype(dtype), kernel2, (1, 0)) + bias2
        pixels = kernel_gelu(pixels, dtype)
        halves.append(product(filters, pixels.astype(dtype), (0, 1)))
    rows = SUBPIXELS // 2
    return jnp.concatenate(
        [part[rows * m : rows * m + rows] for m in range(num_masks) for part in halves]
    )
