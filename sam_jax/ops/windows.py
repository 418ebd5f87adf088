"""Cutting a grid of tokens into square windows and putting it together again."""

import jax.numpy as jnp
from einops import rearrange

from sam_jax.arrays import Array, Float, GridShape


def window_partition(
    tokens: Float[Array, "b gh gw d"], window_size: int
) -> Float[Array, "bw {window_size} {window_size} d"]:
    """Windows of the grid, zero-padded at the bottom and right to whole windows.

    Windows of one image are consecutive and in row-major order. The padding takes part in the
    attention, as in the published model: masking it instead moves the outputs by several percent.
    """
    _, gh, gw, _ = tokens.shape
    pad_h, pad_w = -gh % window_size, -gw % window_size
    tokens = jnp.pad(tokens, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)))
    return rearrange(
        tokens, "b (nh sh) (nw sw) d -> (b nh nw) sh sw d", sh=window_size, sw=window_size
    )


def window_unpartition(
    windows: Float[Array, "bw s s d"], grid: GridShape
) -> Float[Array, "b gh gw d"]:
    """The grid of ``window_partition`` again, without its padding."""
    gh, gw = grid
    size = windows.shape[1]
    tokens = rearrange(
        windows,
        "(b nh nw) sh sw d -> b (nh sh) (nw sw) d",
        nh=-(-gh // size),
        nw=-(-gw // size),
    )
    return tokens[:, :gh, :gw]
