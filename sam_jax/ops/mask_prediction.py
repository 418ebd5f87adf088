"""Mask logits of an object: upscaled image tokens, multiplied with the filter of each candidate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sam_jax.arrays import Array, Float
from sam_jax.ops import dispatch
from sam_jax.ops.full_precision import add_shared
from sam_jax.ops.linear import patch_conv_transpose
from sam_jax.ops.norm import NormWeights, layer_norm
from sam_jax.ops.packed_masks import to_image
from sam_jax.ops.tpu import mask_prediction as kernel


class UpscalingWeights(NamedTuple):
    """Weights of two transposed convolutions (kernel and stride 2), and the LayerNorm between."""

    kernel1: Float[Array, "d 2 2 c1"]
    bias1: Float[Array, " c1"]
    norm: NormWeights
    kernel2: Float[Array, "c1 2 2 c2"]
    bias2: Float[Array, " c2"]


def predict_masks(
    weights: UpscalingWeights,
    image_tokens: Float[Array, "b p gh gw d"],
    filters: Float[Array, "b p m c"],
    *,
    norm_epsilon: float,
    implementation: str = dispatch.AUTO,
) -> Float[Array, "b p m lh lw"]:
    """Logits in float32, four for each image token and side.

    Forms: ``reference`` is the decoder's two transposed convolutions and a product; ``by_subpixel``
    keeps the sub-pixels of either convolution apart from the grid until only one number per
    candidate is left of them: putting 32 channels in order would move far more memory than one.

    Args:
      weights: of the convolutions.
      image_tokens: of the image as each object sees it.
      filters: of each candidate, from its hypernetwork.
      norm_epsilon: added to the variance.
      implementation: which form computes it.

    Source: Kirillov et al. 2023, appendix A, "Lightweight mask decoder".
    """
    return PREDICT_MASKS(
        weights, image_tokens, filters, norm_epsilon=norm_epsilon, implementation=implementation
    )


def _reference(weights, image_tokens, filters, *, norm_epsilon):
    x = patch_conv_transpose(image_tokens, weights.kernel1, weights.bias1)
    x = jax.nn.gelu(layer_norm(x, weights.norm, norm_epsilon), approximate=False)
    x = jax.nn.gelu(patch_conv_transpose(x, weights.kernel2, weights.bias2), approximate=False)
    return jnp.einsum("bphwc,bpmc->bpmhw", x, filters, preferred_element_type=jnp.float32)


def _by_subpixel(weights, image_tokens, filters, *, norm_epsilon):
    """``i j`` are the sub-pixels of the first convolution and ``k l`` those of the second."""
    dtype = image_tokens.dtype
    x = jnp.einsum("bphwd,dijc->bphwijc", image_tokens, weights.kernel1.astype(dtype))
    x = layer_norm(add_shared(x, weights.bias1), weights.norm, norm_epsilon)
    x = jax.nn.gelu(x, approximate=False)
    x = jnp.einsum("bphwijd,dklc->bphwijklc", x, weights.kernel2.astype(dtype))
    x = jax.nn.gelu(add_shared(x, weights.bias2), approximate=False)
    logits = jnp.einsum("bphwijklc,bpmc->bphwijklm", x, filters, preferred_element_type=jnp.float32)
    return rearrange(logits, "b p h w i j k l m -> b p m (h i k) (w j l)")


def _on_tpu(weights, image_tokens, filters, *, norm_epsilon, interpret):
    b, _, gh, gw, _ = image_tokens.shape
    logits = kernel.predict_masks(
        weights,
        rearrange(image_tokens, "b p h w d -> (b p) (h w) d"),
        rearrange(filters, "b p m c -> (b p) m c"),
        norm_epsilon=norm_epsilon,
        interpret=interpret,
    )
    return to_image(rearrange(logits, "(b p) m s n -> b p m s n", b=b), (gh, gw))


def _kernel_supports(weights, image_tokens, filters, **_):
    *_, gh, gw, dim = image_tokens.shape
    # Two sub-pixels together have half of the channels, which must fill the lanes.
    return kernel.supports(gh * gw, dim // 2)


def _examples(dtype: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    dim = 256
    weights = UpscalingWeights(
        normal(dim, 2, 2, dim // 4) * dim**-0.5,
        0.1 * normal(dim // 4),
        NormWeights(1 + 0.1 * normal(dim // 4), 0.1 * normal(dim // 4)),
        normal(dim // 4, 2, 2, dim // 8) * (dim // 4) ** -0.5,
        0.1 * normal(dim // 8),
    )
    args = (weights, normal(1, 2, 8, 16, dim), normal(1, 2, 3, dim // 8) * 0.2)
    return [(args, {"norm_epsilon": 1e-6})]


PREDICT_MASKS = dispatch.Operation(
    "predict_masks",
    [
        dispatch.Form("kernel", _on_tpu, supports=_kernel_supports, is_kernel=True),
        dispatch.Form("by_subpixel", _by_subpixel),
        dispatch.Form("reference", _reference),
    ],
    examples=_examples,
)
