"""Embeddings of mask prompts, added to the image's: the dense branch of the prompt encoder."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sam_jax.arrays import Array, Bool, Float
from sam_jax.ops import dispatch
from sam_jax.ops.full_precision import add_shared, broadcast_to
from sam_jax.ops.linear import dense, patch_conv
from sam_jax.ops.norm import NormWeights, layer_norm
from sam_jax.ops.packed_masks import subpixel_kernels, to_subpixels
from sam_jax.ops.tpu import mask_embedding as kernel


class MaskEmbeddingWeights(NamedTuple):
    """Weights of two convolutions (kernel and stride 2), their LayerNorms, and a pointwise one."""

    kernel1: Float[Array, "4 c1"]
    bias1: Float[Array, " c1"]
    norm1: NormWeights
    kernel2: Float[Array, "4*c1 c2"]
    bias2: Float[Array, " c2"]
    norm2: NormWeights
    kernel3: Float[Array, "c2 d"]
    bias3: Float[Array, " d"]


def embed_masks(
    weights: MaskEmbeddingWeights,
    mask_logits: Float[Array, "b p lh lw"],
    norm_epsilon: float,
) -> Float[Array, "b p gh gw d"]:
    """Embeddings of masks at a quarter of their size, in the type of the logits.

    Source: Kirillov et al. 2023, appendix A, "Prompt encoder".
    """
    x = patch_conv(mask_logits[..., None], weights.kernel1, weights.bias1)
    x = jax.nn.gelu(layer_norm(x, weights.norm1, norm_epsilon), approximate=False)
    x = patch_conv(x, weights.kernel2, weights.bias2)
    x = jax.nn.gelu(layer_norm(x, weights.norm2, norm_epsilon), approximate=False)
    return dense(x, weights.kernel3, weights.bias3)


def add_mask_embeddings(
    weights: MaskEmbeddingWeights,
    image: Float[Array, "b gh gw d"],
    mask_logits: Float[Array, "b p lh lw"],
    mask_valid: Bool[Array, "b p"],
    no_mask: Float[Array, " d"],
    *,
    norm_epsilon: float,
    implementation: str = dispatch.AUTO,
) -> Float[Array, "b p gh gw d"]:
    """The image's embeddings plus each object's mask embedding, or ``no_mask`` without a mask.

    Forms: ``reference`` is ``embed_masks``; ``by_subpixel`` has image tokens on the last axis and
    the few channels of a mask before it, which fills vector registers that four channels would not.

    Args:
      weights: of the convolutions.
      image: embeddings of each image.
      mask_logits: low-resolution logits of each object's mask; finite, also where there is none.
      mask_valid: which objects have a mask.
      no_mask: embedding of the others.
      norm_epsilon: added to the variances.
      implementation: which form computes it.
    """
    return ADD_MASK_EMBEDDINGS(
        weights,
        image,
        mask_logits,
        mask_valid,
        no_mask,
        norm_epsilon=norm_epsilon,
        implementation=implementation,
    )


def _added(image, embeddings, mask_valid, no_mask):
    without = broadcast_to(no_mask, embeddings.shape, embeddings.dtype)
    embeddings = jnp.where(mask_valid[..., None, None, None], embeddings, without)
    return add_shared(embeddings, image[:, None])


def _reference(weights, image, mask_logits, mask_valid, no_mask, *, norm_epsilon):
    embeddings = embed_masks(weights, mask_logits.astype(image.dtype), norm_epsilon)
    return _added(image, embeddings, mask_valid, no_mask)


def _by_subpixel(weights, image, mask_logits, mask_valid, no_mask, *, norm_epsilon):
    dtype = image.dtype

    def normalised(x, bias, norm):
        """LayerNorm over the axis before the last, and GELU."""
        scale, shift, bias = (w[:, None] for w in (*norm, bias))
        x = x.astype(jnp.float32) + bias
        x -= jnp.mean(x, axis=-2, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=-2, keepdims=True)
        x = x * jax.lax.rsqrt(variance + norm_epsilon) * scale + shift
        return jax.nn.gelu(x.astype(dtype), approximate=False)

    kernel1, kernel2 = (x.astype(dtype) for x in subpixel_kernels(weights.kernel1, weights.kernel2))
    x = jnp.einsum("bpsn,sqc->bpqcn", to_subpixels(mask_logits).astype(dtype), kernel1)
    x = normalised(x, weights.bias1, weights.norm1)
    x = jnp.einsum("bpqcn,qce->bpen", x, kernel2)
    x = normalised(x, weights.bias2, weights.norm2)
    x = dense(rearrange(x, "b p c n -> b p n c"), weights.kernel3, weights.bias3)
    embeddings = rearrange(x, "b p (h w) d -> b p h w d", h=image.shape[1])
    return _added(image, embeddings, mask_valid, no_mask)


def _on_tpu(weights, image, mask_logits, mask_valid, no_mask, *, norm_epsilon, interpret):
    added = kernel.add_mask_embeddings(
        weights,
        rearrange(image, "b h w d -> b (h w) d"),
        to_subpixels(mask_logits),
        mask_valid,
        no_mask,
        norm_epsilon=norm_epsilon,
        interpret=interpret,
    )
    return rearrange(added, "b p (h w) d -> b p h w d", h=image.shape[1])


def _kernel_supports(weights, image, *_, **__):
    _, gh, gw, dim = image.shape
    return kernel.supports(gh * gw, dim, weights.kernel3.shape[0])


def _examples(dtype: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    channels, dim = 16, 128
    weights = MaskEmbeddingWeights(
        normal(4, channels // 4) / 2,
        0.1 * normal(channels // 4),
        NormWeights(1 + 0.1 * normal(channels // 4), 0.1 * normal(channels // 4)),
        normal(channels, channels) * channels**-0.5,
        0.1 * normal(channels),
        NormWeights(1 + 0.1 * normal(channels), 0.1 * normal(channels)),
        normal(channels, dim) * channels**-0.5,
        0.1 * normal(dim),
    )
    valid = jnp.array([[True, False, True], [True, True, True]])
    args = (weights, normal(2, 16, 24, dim), 3 * normal(2, 3, 64, 96), valid, normal(dim))
    return [(args, {"norm_epsilon": 1e-6})]


ADD_MASK_EMBEDDINGS = dispatch.Operation(
    "add_mask_embeddings",
    [
        dispatch.Form("kernel", _on_tpu, supports=_kernel_supports, is_kernel=True),
        dispatch.Form("by_subpixel", _by_subpixel),
        dispatch.Form("reference", _reference),
    ],
    examples=_examples,
)
