"""Dropout whose choices follow from a seed for each object and the place of each number.

So it does not depend on how objects are spread over devices, and kernels make the same choices as
plain code, where they need them, instead of reading a random number for each of a million numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.arrays import Array, Bool, Float, Int, UInt32
from sam_jax.ops.full_precision import multiply

# An odd number far from all patterns (2^32 over the golden ratio) and murmur3's last mixing.
_SPREAD = np.uint32(0x9E3779B9).view(np.int32)
_MIX = ((16, np.uint32(0x85EBCA6B).view(np.int32)), (13, np.uint32(0xC2B2AE35).view(np.int32)))


def dropout(
    x: Float[Array, "b #p ..."], seeds: Int[Array, "b p"] | None, rate: float
) -> Float[Array, "b p ..."]:
    """Each object's numbers, kept with probability ``1 - rate`` and enlarged for it, or zero.

    Args:
      x: of objects.
      seeds: of objects, see ``branch_seeds``; None for no dropout.
      rate: share that is dropped, in [0, 1).
    """
    if seeds is None or rate == 0:
        return x
    *shape, dim = x.shape[2:]
    rows = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.int32).reshape(*shape, 1)
    of_place = seeds.reshape(*seeds.shape, *(1,) * rows.ndim)
    return dropped_out(x, keep_mask(of_place, rows, dim, rate), rate)


def branch_seeds(seeds: UInt32[Array, "*batch"], branch: int) -> Int[Array, "*batch"]:
    """Seeds for one place of a model, from each object's seed and the number of the place."""
    return _mixed(jax.lax.bitcast_convert_type(seeds, jnp.int32) + jnp.int32(branch) * _SPREAD)


def keep_mask(
    seeds: Int[Array, "*#batch 1"], rows: Int[Array, "*#batch 1"], dim: int, rate: float
) -> Bool[Array, "*batch {dim}"]:
    """Dropout mask of rows of ``dim`` numbers, True for those that are kept.

    Two numbers of a row, half of it apart, have 16 of the 32 bits that are mixed for them each, so
    the rate is met to 2^-17.

    Args:
      seeds: of each row's object and branch.
      rows: index of each row inside its object.
      dim: numbers in a row.
      rate: share that is dropped.
    """
    half = -(-dim // 2)
    columns = jax.lax.broadcasted_iota(jnp.int32, (*(1,) * (rows.ndim - 1), half), rows.ndim - 1)
    bits = _mixed(rows * np.int32(half) * _SPREAD + columns * _SPREAD ^ seeds)
    chances = [bits & np.int32(2**16 - 1), jax.lax.shift_right_logical(bits, np.int32(16))]
    return (jnp.concatenate(chances, axis=-1) >= round(rate * 2**16))[..., :dim]


def dropped_out(x: Array, keep: Array, rate: float) -> Array:
    """Numbers that are kept, enlarged so that their mean stays; zeros for the others."""
    return jnp.where(keep, multiply(x, 1 / (1 - rate)), jnp.zeros_like(x))


def _mixed(x: Array) -> Array:
    for shift, factor in _MIX:
        x = (x ^ jax.lax.shift_right_logical(x, np.int32(shift))) * factor
    return x ^ jax.lax.shift_right_logical(x, np.int32(16))
