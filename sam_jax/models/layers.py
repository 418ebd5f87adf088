"""Layers that several parts of the model share."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Float
from sam_jax.ops.full_precision import EXACT, add_bias


def layer_norm(epsilon: float, dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """A LayerNorm over channels whose statistics are float32 and exact.

    Linen's fast variance, E[x^2] - E[x]^2, loses digits where the mean is large.
    """
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def gelu(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """The exact GELU; linen's default is the tanh approximation, which checkpoints do not use."""
    return nn.gelu(x, approximate=False)


class Dense(nn.Module):
    """``nn.Dense`` whose bias has a gradient that is summed in float32.

    Attributes:
      features: channels of the output.
      dtype: type of product and output.
      precision: of the product, see ``ops.full_precision``.
    """

    features: int
    dtype: DTypeLike = jnp.float32
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch o"]:
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return add_bias(jnp.matmul(x, kernel, precision=self.precision), bias)


class Projection(nn.Module):
    """Kernel and bias of a dense layer, for those who do not apply it to its input.

    The bias is float32, as ``ops.full_precision`` takes it.
    """

    features: int
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, input_dim: int) -> tuple[Float[Array, "d c"], Float[Array, " c"]]:
        kernel = self.param("kernel", self.kernel_init, (input_dim, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return kernel.astype(self.dtype), bias


class NormWeights(nn.Module):
    """Scale and shift of a LayerNorm, for those who do not apply it to the last axis."""

    @nn.compact
    def __call__(self, channels: int) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        scale = self.param("scale", nn.initializers.ones, (channels,))
        return scale, self.param("bias", nn.initializers.zeros, (channels,))


class Mlp(nn.Module):
    """Dense layers of the given widths with an activation between them, none after the last.

    Attributes:
      widths: channels of each layer's output.
      activation: between layers.
      dtype: type of the computation.
      exact_output: whether the last layer is float32 with all digits, whatever the others are.
    """

    widths: Sequence[int]
    activation: Callable[[Array], Array]
    dtype: DTypeLike = jnp.float32
    exact_output: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch o"]:
        for index, width in enumerate(self.widths):
            if index:
                x = self.activation(x)
            options: dict[str, Any] = {"dtype": self.dtype}
            if self.exact_output and index == len(self.widths) - 1:
                options = {"dtype": jnp.float32, "precision": EXACT}
            x = Dense(width, **options, name=f"dense_{index}")(x)
            x = checkpoint_name(x, "product")
        return x
