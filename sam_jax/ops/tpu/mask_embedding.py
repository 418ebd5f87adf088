"""TPU kernels that embed the masks of an image's objects and add them to the image's embeddings.

The logits of a mask are 16 numbers for each image token; embeddings are wide. Made by separate
products, sums and norms, and added to the image that all objects share, the embeddings of all
objects, 2 MB each, would pass through the chip's memory several times. Here they are written once.
Backwards they are read once: the kernel makes its hidden numbers again, which are few, and adds up
what all objects say of the image's embeddings before it lets go of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl

from sam_jax.arrays import Array, Bool, Float
from sam_jax.ops.full_precision import product
from sam_jax.ops.packed_masks import SUBPIXELS, subpixel_kernels
from sam_jax.ops.tpu.kernel import LANES, SUBLANES, fused_call, kernel_gelu, tile_size, wholes


def supports(num_tokens: int, dim: int, channels: int) -> bool:
    """True if image tokens, their channels and the hidden channels fill whole registers."""
    return num_tokens % LANES == 0 and dim % LANES == 0 and channels % (2 * SUBLANES) == 0


def add_mask_embeddings(
    weights: Any,
    image: Float[Array, "b tokens d"],
    logits: Float[Array, "b p 16 tokens"],
    mask_valid: Bool[Array, "b p"],
    no_mask: Float[Array, " d"],
    *,
    norm_epsilon: float,
    interpret: Any,
) -> Float[Array, "b p tokens d"]:
    """An image's embeddings plus each object's mask embedding, or ``no_mask`` without a mask.

    Args:
      weights: see ``ops.mask_embedding.MaskEmbeddingWeights``.
      image: embeddings that an image's objects share.
      logits: of each object, the 16 sub-pixels of each image token row by row.
      mask_valid: which objects have a mask.
      no_mask: what the others have in place of an embedding.
      norm_epsilon: added to the variances.
      interpret: see ``kernel.fused_call``.
    """
    channels, dim = weights.kernel3.shape
    static = _Static(2 * channels * (2 * SUBPIXELS + dim), norm_epsilon, interpret)
    valid = jnp.broadcast_to(
        mask_valid.astype(jnp.int32)[..., None, None], (*mask_valid.shape, 1, LANES)
    )
    matrices = (*_matrices(weights, image.dtype), no_mask.astype(jnp.float32)[None])
    return _add(static, matrices, logits.astype(image.dtype), image, valid)


def _matrices(weights, dtype):
    """Weights in the form that ``_embed`` takes: three kernels, six columns, and a row."""
    # The mean over channels is linear in the logits, so centred kernels make centred results.
    kernel1, kernel2, bias1, bias2 = (
        x - jnp.mean(x, axis=-1, keepdims=True)
        for x in (
            y.astype(jnp.float32)
            for y in (
                *subpixel_kernels(weights.kernel1, weights.kernel2),
                weights.bias1,
                weights.bias2,
            )
        )
    )
    kernel1 = rearrange(kernel1, "s q c -> s (q c)")
    kernel2 = rearrange(kernel2, "q c e -> (q c) e")
    columns = (*(jnp.tile(x, 4) for x in (bias1, *weights.norm1)), bias2, *weights.norm2)
    return (
        *(x.astype(dtype) for x in (kernel1, kernel2, weights.kernel3)),
        *(x.astype(jnp.float32)[:, None] for x in columns),
        weights.bias3.astype(jnp.float32)[None],
    )


def _embed(norm_epsilon, weights, logits, is_valid):
    """Embeddings ``[tokens, d]`` of some image tokens of one object; quarters are side by side."""
    kernels, columns, (bias3, no_mask) = weights[:3], weights[3:9], weights[9:]
    num_rows = columns[0].shape[0]
    row, other = (
        jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (num_rows,) * 2, axis), num_rows // 4)
        for axis in (0, 1)
    )
    means = jnp.where(row == other, 4 / num_rows, 0.0)

    def normalised(x, variance, scale, shift):
        x = x * jax.lax.rsqrt(variance + norm_epsilon) * scale + shift
        return kernel_gelu(x, logits.dtype).astype(logits.dtype)

    x = product(kernels[0], logits, (0, 0)) + columns[0]
    x = normalised(x, product(means, jnp.square(x), (1, 0)), *columns[1:3])
    x = product(kernels[1], x, (0, 0)) + columns[3]
    x = normalised(x, jnp.mean(jnp.square(x), axis=0, keepdims=True), *columns[4:])
    embedded = product(x, kernels[2], (0, 0)) + bias3
    return jnp.where(is_valid, embedded, no_mask)


@dataclasses.dataclass(frozen=True)
class _Static:
    """Constants that the kernels are compiled with."""

    flops_per_token: int
    norm_epsilon: float
    interpret: Any

    def embed(self, weights: Any, logits: Array, is_valid: Array) -> Array:
        """Embeddings ``[tokens, d]`` of the masks of some image tokens of one object."""
        return _embed(self.norm_epsilon, weights, logits, is_valid)


def _call(static: _Static, kernel: Any, inputs: Any, specs: Any, outputs: Any, *, passes: int):
    """``kernel`` of references, for each object, for each block of tokens, for each image.

    Objects come last, so that an image's tokens stay where they are until all have been there.
    """
    b, p, _, num_tokens = inputs[1].shape
    return fused_call(
        kernel,
        inputs,
        specs,
        outputs,
        grid=(b, num_tokens // tile_size(num_tokens), p),
        flops=passes * static.flops_per_token * b * p * num_tokens,
        interpret=static.interpret,
        name="mask_embedding" + ("_backward" if passes > 1 else ""),
    )


def _of_logits(logits: Array) -> pl.BlockSpec:
    return pl.BlockSpec(
        (1, 1, logits.shape[2], tile_size(logits.shape[3])), lambda i, j, k: (i, k, 0, j)
    )


def _of_validity() -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, 1, LANES), lambda i, j, k: (i, k, 0, 0))


def _of_image(logits: Array, dim: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, tile_size(logits.shape[3]), dim), lambda i, j, k: (i, j, 0))


def _of_tokens(logits: Array, dim: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, tile_size(logits.shape[3]), dim), lambda i, j, k: (i, k, j, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add(static: _Static, weights, logits, image, valid):
    b, p, _, num_tokens = logits.shape
    dim = image.shape[-1]

    def kernel(inputs, outputs):
        weights, logits, image, valid = inputs
        (out,) = outputs
        is_valid = valid[0, 0, :, 0:1] != 0
        made = static.embed(tuple(ref[...] for ref in weights), logits[0, 0], is_valid)
        out[0, 0] = (image[0].astype(jnp.float32) + made).astype(out.dtype)

    (out,) = _call(
        static,
        kernel,
        (weights, logits, image, valid),
        (wholes(weights), _of_logits(logits), _of_image(logits, dim), _of_validity()),
        [(jax.ShapeDtypeStruct((b, p, num_tokens, dim), image.dtype), _of_tokens(logits, dim))],
        passes=1,
    )
    return out


def _add_forward(static, *inputs):
    return _add(static, *inputs), inputs


def _add_backward(static, inputs, d_out):
    weights, logits, image, valid = inputs
    dim = image.shape[-1]

    def kernel(inputs, outputs):
        weights, logits, valid, d_out = inputs
        *d_weights, d_logits, d_image = outputs
        is_valid = valid[0, 0, :, 0:1] != 0
        pull = jax.vjp(
            lambda weights, logits: static.embed(weights, logits, is_valid),
            tuple(ref[...] for ref in weights),
            logits[0, 0],
        )[1]
        d_tokens = d_out[0, 0].astype(jnp.float32)
        found, d_logits[0, 0] = pull(d_tokens)

        @pl.when(pl.program_id(2) == 0)
        def _():
            for ref in (*d_weights, d_image):
                ref[...] = jnp.zeros_like(ref)

        for ref, gradient in zip(d_weights, found, strict=True):
            ref[0, 0] += gradient.astype(jnp.float32)
        d_image[0] += d_tokens

    # Each block of tokens has its own part of the weights' gradients, so that none waits.
    blocks = (logits.shape[0], logits.shape[-1] // tile_size(logits.shape[3]))
    sums = [
        (
            jax.ShapeDtypeStruct((*blocks, *x.shape), jnp.float32),
            pl.BlockSpec((1, 1, *x.shape), lambda i, j, k: (i, j, 0, 0)),
        )
        for x in weights
    ]
    *d_weights, d_logits, d_image = _call(
        static,
        kernel,
        (weights, logits, valid, d_out),
        (wholes(weights), _of_logits(logits), _of_validity(), _of_tokens(logits, dim)),
        [
            *sums,
            (jax.ShapeDtypeStruct(logits.shape, logits.dtype), _of_logits(logits)),
            (jax.ShapeDtypeStruct(image.shape, jnp.float32), _of_image(logits, dim)),
        ],
        passes=3,
    )
    totals = [
        jnp.sum(d, axis=(0, 1)).astype(x.dtype) for d, x in zip(d_weights, weights, strict=True)
    ]
    return tuple(totals), d_logits, d_image.astype(image.dtype), None


_add.defvjp(_add_forward, _add_backward)
