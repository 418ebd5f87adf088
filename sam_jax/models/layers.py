"""Layers that several parts of the model share, and parameters for operations that fuse layers."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Float
from sam_jax.ops.full_precision import EXACT
from sam_jax.ops.linear import dense
from sam_jax.ops.norm import NormWeights
from sam_jax.ops.remat import PRODUCT, keeping, product_of

Block = TypeVar("Block", bound=nn.Module)
Remat: TypeAlias = Literal["none", "products", "blocks"]
LECUN_NORMAL = nn.initializers.lecun_normal()


def layer_norm(epsilon: float, dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """A LayerNorm over channels whose statistics are float32 and exact.

    Linen's fast variance, E[x^2] - E[x]^2, loses digits where the mean is large. Values are those
    of ``ops.norm.layer_norm``, bit for bit; gradients are rounded at other places.
    """
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def gelu(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """The exact GELU; linen's default is the tanh approximation, which checkpoints do not use."""
    return nn.gelu(x, approximate=False)


class Dense(nn.Module):
    """``nn.Dense`` whose bias has a gradient that is summed in float32 (``ops.full_precision``).

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
        kernel = self.param("kernel", LECUN_NORMAL, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return dense(x.astype(self.dtype), kernel, bias, self.precision)


class DenseParams(nn.Module):
    """Kernel and bias of a dense layer, for an operation that does more than to apply them."""

    features: int
    kernel_init: Initializer = LECUN_NORMAL

    @nn.compact
    def __call__(self, input_dim: int) -> tuple[Float[Array, "d c"], Float[Array, " c"]]:
        kernel = self.param("kernel", self.kernel_init, (input_dim, self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))


class NormParams(nn.Module):
    """Scale and shift of a LayerNorm, for an operation that does more than to apply them."""

    @nn.compact
    def __call__(self, channels: int) -> NormWeights:
        scale = self.param("scale", nn.initializers.ones, (channels,))
        return NormWeights(scale, self.param("bias", nn.initializers.zeros, (channels,)))


def as_float32(variables: Any) -> Any:
    """Fresh variables in float32; with JAX's 64 bits turned on, Flax makes float64."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)


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
            dtype, precision = self.dtype, None
            if self.exact_output and index == len(self.widths) - 1:
                dtype, precision = jnp.float32, EXACT
            x = product_of(Dense(width, dtype, precision, name=f"dense_{index}")(x))
        return x


def remat_block(block_class: type[Block], remat: Remat) -> type[Block]:
    """A class of blocks whose backward pass computes a part of the forward pass again.

    Args:
      block_class: of the blocks.
      remat: "none" keeps everything; "products" keeps what the large products made and computes
        norms and activations again; "blocks" keeps only what goes from block to block.
    """
    if remat == "none":
        return block_class
    names = {"products": (PRODUCT,), "blocks": ()}[remat]
    return nn.remat(block_class, policy=keeping(*names))


def scan_modules(modules: Sequence[nn.Module], x: Array, *inputs: Any) -> Array:
    """Modules of one kind, one after the other, as a loop over their stacked parameters.

    Args:
      modules: bound and initialised, alike but for their names.
      x: what the first one takes and each hands to the next.
      *inputs: further arguments, stacked over modules; None for none.
    """
    params = [module.variables["params"] for module in modules]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    unbound = modules[0].clone(parent=None)

    def step(x, params_and_inputs):
        params, inputs = params_and_inputs
        return unbound.apply({"params": params}, x, *inputs), None

    return jax.lax.scan(step, x, (stacked, inputs))[0]
