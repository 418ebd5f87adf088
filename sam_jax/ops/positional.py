"""Positions: fixed sines, random Fourier features of coordinates, relative-position tables."""

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.arrays import Array, Float
from sam_jax.ops.full_precision import EXACT


def fourier_features(
    coords_01: Float[Array, "*batch 2"], frequencies: Float[Array, "2 half_d"]
) -> Float[Array, "*batch d"]:
    """Sine and cosine features of coordinates given in [0, 1], always in float32.

    The matrix has entries of order one, so phases reach tens of radians: bfloat16 would lose the
    position altogether, and does inside a TPU's product unless that is asked to be exact.

    Source: Kirillov et al. 2023, appendix A, after Tancik et al. 2020.
    """
    coords, frequencies = (x.astype(jnp.float32) for x in (coords_01, frequencies))
    phases = 2.0 * jnp.pi * jnp.matmul(2.0 * coords - 1.0, frequencies, precision=EXACT)
    return jnp.concatenate([jnp.sin(phases), jnp.cos(phases)], axis=-1)


def grid_coords(grid: tuple[int, int]) -> Float[np.ndarray, "gh gw 2"]:
    """Centres of the patches of a grid as ``(x, y)`` in (0, 1)."""
    gh, gw = grid
    ys = (np.arange(gh, dtype=np.float32) + 0.5) / gh
    xs = (np.arange(gw, dtype=np.float32) + 0.5) / gw
    return np.stack(np.broadcast_arrays(xs[None, :], ys[:, None]), axis=-1)


def grid_fourier_features(
    grid: tuple[int, int], frequencies: Float[Array, "2 half_d"]
) -> Float[Array, "gh gw d"]:
    """``fourier_features`` of ``grid_coords``.

    A phase is the sum of a row's and a column's, so by the rule for the sine of a sum ``gh + gw``
    sines are enough for a frequency. On a CPU ``gh * gw`` take a sixth of decoding a prompt.
    """
    sines_and_cosines = []
    for size, of_axis in zip(grid[::-1], frequencies.astype(jnp.float32), strict=True):
        centres = (np.arange(size, dtype=np.float32) + 0.5) / size
        phases = 2.0 * jnp.pi * ((2.0 * centres - 1.0)[:, None] * of_axis)
        sines_and_cosines.append((jnp.sin(phases), jnp.cos(phases)))
    (sin_x, cos_x), (sin_y, cos_y) = sines_and_cosines
    factors = [
        jnp.concatenate(pair, axis=-1)
        for pair in ((sin_x, cos_x), (cos_x, -sin_x), (cos_y, cos_y), (sin_y, sin_y))
    ]
    # Without the barrier XLA moves the sines into the sum's loop, and takes them for every patch.
    by_sin_x, by_cos_x, cos_y, sin_y = jax.lax.optimization_barrier(factors)
    return by_sin_x * cos_y[:, None] + by_cos_x * sin_y[:, None]


def sincos_positions(grid: tuple[int, int], dim: int) -> Float[np.ndarray, "gh gw d"]:
    """Sines and cosines of columns and rows, in geometrically falling frequencies.

    A quarter of the channels each: sines and cosines of the column, then of the row.

    Raises:
      ValueError: if the channels do not divide by four.

    Source: Vaswani et al. 2017, section 3.5, for two axes as in the published code of He et al.
        2022, which has the columns first.
    """
    if dim % 4:
        raise ValueError(f"positions of {dim} channels: expected a multiple of 4")
    frequencies = 1e4 ** -(np.arange(dim // 4, dtype=np.float64) / (dim // 4))
    of_rows, of_columns = (
        np.concatenate([np.sin(phases), np.cos(phases)], axis=-1)
        for phases in (np.arange(size)[:, None] * frequencies for size in grid)
    )
    parts = np.broadcast_arrays(of_columns[None], of_rows[:, None])
    return np.concatenate(parts, axis=-1, dtype=np.float32)


def resize_table(table: Float[Array, "entries c"], size: int) -> Float[Array, "e c"]:
    """A table of relative positions for ``size`` places, ``2 size - 1`` entries, interpolated."""
    entries = 2 * size - 1
    if table.shape[0] == entries:
        return table
    return jax.image.resize(
        table, (entries, table.shape[1]), method="linear", antialias=False, precision=EXACT
    )


def relative_positions(
    table: Float[Array, "entries c"], size: int
) -> Float[Array, "{size} {size} c"]:
    """Embedding of every query-key offset along one axis: row ``q``, column ``k``.

    Entry ``size - 1`` of the table is offset zero, larger entries mean that the query lies further
    along the axis than the key. A table of another length is interpolated linearly.
    """
    offsets = np.arange(size)[:, None] - np.arange(size)[None, :] + size - 1
    return resize_table(table, size)[offsets]
