"""Dropout whose choices follow from a seed for each object and the place of each number.

So it does not depend on how objects are spread over devices, and kernels make the same choices as
plain code, where they need them, instead of reading a random number for each of a million numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.arrays import Array, Bool, Float, Int, UInt32

# An odd number far from all patterns (2^32 over the golden ratio) and murmur3's last mixing.
_SPREAD = np.uint32(0x9E3779B9).view(np.int32)
_MIX = ((16, np.uint32(0x85EBCA6B).view(np.int32)), (13, np.uint32(0xC2B2AE35).view(np.int32)))


def dropout(
    x: Float[Array, "b #p ..."], seeds: UInt32[Array, "b p"] | None, branch: int, rate: float
) -> Float[Array, "b p ..."]:
    """Each object's numbers, kept with probability ``1 - rate`` and enlarged for it, or zero.

    Args:
      x: of objects.
      seeds: of objects; None for no dropout.
      branch: tells places in a model apart that share seeds.
      rate: share that is dropped, in [0, 1).
    """
    if seeds is None or rate == 0:
        return x
    place = jnp.arange(np.prod(x.shape[2:]), dtype=jnp.int32).reshape(x.shape[2:])
    of_branch = branch_seeds(seeds, branch)
    of_branch = of_branch.reshape(*of_branch.shape, *(1,) * (x.ndim - 2))
    return kept(x, keeps(of_branch, place, rate), rate)


def branch_seeds(seeds: UInt32[Array, "*batch"], branch: int) -> Int[Array, "*batch"]:
    """What ``keeps`` takes."""
    return _mixed(jax.lax.bitcast_convert_type(seeds, jnp.int32) + jnp.int32(branch) * _SPREAD)


def keeps(
    seeds: Int[Array, "*#batch"], place: Int[Array, "*#batch"], rate: float
) -> Bool[Array, "*#batch"]:
    """Whether the numbers at a place (their index inside an object) are kept."""
    chance = jax.lax.shift_right_logical(_mixed((place * _SPREAD) ^ seeds), np.int32(8))
    return chance >= round(rate * 2**24)


def kept(x: Array, keep: Array, rate: float) -> Array:
    """Numbers that are kept, enlarged so that their mean stays; zeros for the others."""
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def _mixed(x: Array) -> Array:
    for shift, factor in _MIX:
        x = (x ^ jax.lax.shift_right_logical(x, np.int32(shift))) * factor
    return x ^ jax.lax.shift_right_logical(x, np.int32(16))
