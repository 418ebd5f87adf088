"""Layers that several parts of the model share."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Float


def layer_norm(epsilon: float, dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """A LayerNorm over channels whose statistics are float32 and exact.

    Linen's fast variance, E[x^2] - E[x]^2, loses digits where the mean is large.
    """
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def gelu(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """The exact GELU; linen's default is the tanh approximation, which checkpoints do not use."""
    return nn.gelu(x, approximate=False)


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
            x = nn.Dense(width, dtype=self.dtype, name=f"dense_{index}")(x)
            x = checkpoint_name(x, "product")
        return x
