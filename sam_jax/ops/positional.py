"""Positions: random Fourier features of coordinates, and relative-position tables."""

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.arrays import Array, Float


def fourier_features(
    coords_01: Float[Array, "*batch 2"], frequencies: Float[Array, "2 half_d"]
) -> Float[Array, "*batch d"]:
    """Sine and cosine features of coordinates given in [0, 1], always in float32.

    The matrix has entries of order one, so phases reach tens of radians: bfloat16 would lose the
    position altogether.

    Source: Kirillov et al. 2023, appendix A, after Tancik et al. 2020.
    """
    phases = (2.0 * coords_01.astype(jnp.float32) - 1.0) @ frequencies.astype(jnp.float32)
    phases = 2.0 * jnp.pi * phases
    return jnp.concatenate([jnp.sin(phases), jnp.cos(phases)], axis=-1)


def grid_coords(grid: tuple[int, int]) -> Float[np.ndarray, "gh gw 2"]:
    """Centres of the cells of a grid as ``(x, y)`` in (0, 1)."""
    gh, gw = grid
    ys = (np.arange(gh, dtype=np.float32) + 0.5) / gh
    xs = (np.arange(gw, dtype=np.float32) + 0.5) / gw
    return np.stack(np.broadcast_arrays(xs[None, :], ys[:, None]), axis=-1)


def relative_positions(
    table: Float[Array, "entries c"], size: int
) -> Float[Array, "{size} {size} c"]:
    """Embedding of every query-key offset along one axis: row ``q``, column ``k``.

    Entry ``size - 1`` of the table is offset zero, larger entries mean that the query lies further
    along the axis than the key. A table of another length is interpolated linearly.
    """
    entries = 2 * size - 1
    if table.shape[0] != entries:
        table = jax.image.resize(table, (entries, table.shape[1]), method="linear", antialias=False)
    offsets = np.arange(size)[:, None] - np.arange(size)[None, :] + size - 1
    return table[offsets]
