"""Bilinear resizing with half-pixel centres, equal to PyTorch's ``align_corners=False``."""

import jax
import jax.numpy as jnp

from sam_jax.arrays import Array, Float


def resize_bilinear(
    maps: Float[Array, "*batch h w"], size: tuple[int, int]
) -> Float[Array, "*batch oh ow"]:
    """Maps resized over their last two axes, edges clamped, without antialiasing.

    The published model resizes its logits without antialiasing in both directions;
    ``jax.image.resize`` antialiases by default when it makes things smaller.
    """
    return jax.image.resize(maps, (*maps.shape[:-2], *size), method="linear", antialias=False)


def resize_positions(
    table: Float[Array, "gh gw d"], grid: tuple[int, int]
) -> Float[Array, "oh ow d"]:
    """A table of absolute positions for another grid, bicubic, as the table itself if it fits.

    Differs: PyTorch's bicubic kernel has a = -0.75 and JAX's a = -0.5 (Keys); on smooth tables
    the two agree to about 1e-2 of the table's range. Nothing published depends on either.
    """
    if table.shape[:2] == tuple(grid):
        return table
    dtype = table.dtype
    return jax.image.resize(
        table.astype(jnp.float32), (*grid, table.shape[-1]), method="cubic", antialias=False
    ).astype(dtype)
