"""LayerNorm with float32 statistics, as a function of its scale and shift."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sam_jax.arrays import Array, Float


class NormWeights(NamedTuple):
    """Scale and shift of a LayerNorm."""

    scale: Float[Array, " d"]
    shift: Float[Array, " d"]


def layer_norm(
    x: Float[Array, "*batch d"], weights: NormWeights, epsilon: float
) -> Float[Array, "*batch d"]:
    """LayerNorm over the last axis, in the type of ``x``; statistics and scaling are float32.

    The variance is exact: E[x^2] - E[x]^2 loses digits where the mean is large.
    """
    exact = x.astype(jnp.float32)
    centred = exact - jnp.mean(exact, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(variance + epsilon) * weights.scale
    return (centred * factor + weights.shift).astype(x.dtype)
