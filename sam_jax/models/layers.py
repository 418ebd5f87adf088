"""Layers that several parts of the model share."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Float
from sam_jax.ops.tpu_kernel import SUBLANES, product


def layer_norm(epsilon: float, dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """A LayerNorm over channels whose statistics are float32 and exact.

    Linen's fast variance, E[x^2] - E[x]^2, loses digits where the mean is large.
    """
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def gelu(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """The exact GELU; linen's default is the tanh approximation, which checkpoints do not use."""
    return nn.gelu(x, approximate=False)


class Dense(nn.Module):
    """``nn.Dense`` whose bias's gradient is a product with ones, summed in float32.

    Of a plain sum the TPU's compiler makes a pass of its own over the output's gradient, by whose
    count it takes as long as the product itself.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch o"]:
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return _add_bias(x.astype(self.dtype) @ kernel.astype(self.dtype), bias.astype(self.dtype))


@jax.custom_vjp
def _add_bias(x: Array, bias: Array) -> Array:
    return x + bias


def _add_bias_backward(_, d_out):
    rows = d_out.reshape(-1, d_out.shape[-1])
    # A single row would be made a sum again.
    ones = jnp.ones((SUBLANES, rows.shape[0]), rows.dtype)
    d_bias = product(ones, rows, (1, 0))[0]
    return d_out, d_bias.astype(d_out.dtype)


_add_bias.defvjp(lambda x, bias: (x + bias, None), _add_bias_backward)


class Projection(nn.Module):
    """Kernel and bias of a dense layer, for those who do not apply it to its input."""

    features: int
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, input_dim: int) -> tuple[Float[Array, "d c"], Float[Array, " c"]]:
        kernel = self.param("kernel", self.kernel_init, (input_dim, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return kernel.astype(self.dtype), bias.astype(self.dtype)


class NormWeights(nn.Module):
    """Scale and shift of a LayerNorm, for those who do not apply it to the last axis."""

    @nn.compact
    def __call__(self, channels: int) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        scale = self.param("scale", nn.initializers.ones, (channels,))
        return scale, self.param("bias", nn.initializers.zeros, (channels,))


class Mlp(nn.Module):
    """Dense layers of the given widths with an activation between them, none after the last."""

    widths: Sequence[int]
    activation: Callable[[Array], Array]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch o"]:
        for index, width in enumerate(self.widths):
            if index:
                x = self.activation(x)
            x = Dense(width, dtype=self.dtype, name=f"dense_{index}")(x)
            x = checkpoint_name(x, "product")
        return x
