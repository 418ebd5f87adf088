"""Bilinear resizing with half-pixel centres, equal to PyTorch's ``align_corners=False``."""

from functools import partial

import jax
import jax.numpy as jnp

from sam_jax.arrays import Array, Float
from sam_jax.ops.full_precision import EXACT


def resize_bilinear(
    maps: Float[Array, "*batch h w"], size: tuple[int, int]
) -> Float[Array, "*batch oh ow"]:
    """Maps resized over their last two axes, edges clamped, without antialiasing.

    The published model resizes its logits without antialiasing in both directions;
    ``jax.image.resize`` antialiases by default when it makes things smaller.
    """
    return jax.image.resize(
        maps, (*maps.shape[:-2], *size), method="linear", antialias=False, precision=EXACT
    )


def enlarge(maps: Float[Array, "*batch h w"], scale: int) -> Float[Array, "*batch oh ow"]:
    """``resize_bilinear`` to ``scale`` times the height and width, as means of neighbours.

    A number that is not finite stays with its neighbours. As products with matrices, which are
    mostly zeros, it would spread over its whole row and column. Gradients are such products: a CPU
    takes twice as long, or more, for the gradients of the means.
    """
    return _enlarge(maps, scale)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _enlarge(maps, scale):
    for axis in (maps.ndim - 2, maps.ndim - 1):
        maps = _enlarge_axis(maps, scale, axis)
    return maps


def _enlarge_backward(scale, _, d_out):
    *batch, height, width = d_out.shape
    maps = jax.ShapeDtypeStruct((*batch, height // scale, width // scale), d_out.dtype)
    (d_maps,) = jax.linear_transpose(lambda x: resize_bilinear(x, (height, width)), maps)(d_out)
    return (d_maps,)


_enlarge.defvjp(lambda maps, scale: (_enlarge(maps, scale), None), _enlarge_backward)


def _enlarge_axis(maps, scale, axis):
    size = maps.shape[axis]
    edges = [(0, 0)] * maps.ndim
    edges[axis] = (1, 1)
    padded = jnp.pad(maps, edges, mode="edge")
    before, after = (jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in (0, 2))
    places = []
    for place in range(scale):
        offset = (place + 0.5) / scale - 0.5
        neighbour, weight = (before if offset < 0 else after), abs(offset)
        places.append((1 - weight) * maps + weight * neighbour if weight else maps)
    enlarged = jnp.stack(places, axis + 1)
    return enlarged.reshape(*maps.shape[:axis], -1, *maps.shape[axis + 1 :])


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
        table.astype(jnp.float32),
        (*grid, table.shape[-1]),
        method="cubic",
        antialias=False,
        precision=EXACT,
    ).astype(dtype)
