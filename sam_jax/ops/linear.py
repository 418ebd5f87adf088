"""Dense layers and convolutions whose stride is their kernel, as functions of their weights."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from sam_jax.arrays import Array, Float
from sam_jax.ops.full_precision import add_bias


def dense(
    x: Float[Array, "*batch d"],
    kernel: Float[Array, "d e"],
    bias: Float[Array, " e"],
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "*batch e"]:
    """``x @ kernel + bias`` in the type of ``x``; the bias's gradient is summed in float32."""
    return add_bias(jnp.matmul(x, kernel.astype(x.dtype), precision=precision), bias)


def patch_conv(
    x: Float[Array, "*batch h w d"], kernel: Float[Array, "patch_d e"], bias: Float[Array, " e"]
) -> Float[Array, "*batch gh gw e"]:
    """Convolution whose stride is its kernel's side, so that it is a dense layer of each patch.

    Args:
      x: maps; height and width are multiples of the side.
      kernel: rows ``i j d`` of a patch.
      bias: of the outputs.
    """
    side = math.isqrt(kernel.shape[0] // x.shape[-1])
    patches = rearrange(x, "... (h i) (w j) d -> ... h w (i j d)", i=side, j=side)
    return dense(patches, kernel, bias)


def patch_conv_transpose(
    x: Float[Array, "*batch h w d"], kernel: Float[Array, "d i j e"], bias: Float[Array, " e"]
) -> Float[Array, "*batch oh ow e"]:
    """Transposed convolution whose stride is its kernel's side: each pixel becomes a patch."""
    patches = jnp.einsum("...hwd,dije->...hiwje", x, kernel.astype(x.dtype))
    return add_bias(rearrange(patches, "... h i w j e -> ... (h i) (w j) e"), bias)
