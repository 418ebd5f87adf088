"""TPU kernels that bring a grid's tokens into windows and back, and normalise them on the way.

A window's rows do not begin where a TPU's tiles do, so a compiler moves tokens several times to cut
a grid: once to pad it, and once for each order of axes in between. Here a step reads one row of
windows, moves each row of a window by itself, and writes it once. The LayerNorm before or after it,
and the residual sum, are done to the rows while they are at hand.

The padding is what ``windows.window_partition`` says: zeros, at the bottom and right.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sam_jax.arrays import Array, Float, GridShape
from sam_jax.ops.tpu.kernel import LANES, SUBLANES, fused_call, whole

# Rough FLOPs per number of a row, for the compiler's schedule and for cost reports.
_FLOPS = 20


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Constants that the kernels are compiled with."""

    grid: GridShape
    window_size: int
    epsilon: float
    interpret: Any

    @property
    def num_windows(self) -> tuple[int, int]:
        """Rows and columns of windows, the last of which may reach beyond the grid."""
        gh, gw = self.grid
        return -(-gh // self.window_size), -(-gw // self.window_size)


def supports(grid: GridShape, window_size: int, dim: int) -> bool:
    """True if the kernels take the shape: whole registers of channels, windows of whole pairs."""
    return dim % LANES == 0 and window_size % 2 == 0 and grid[1] % (2 * SUBLANES) == 0


def norm_partition(
    tokens: Float[Array, "b gh gw d"],
    scale: Float[Array, " d"],
    shift: Float[Array, " d"],
    window_size: int,
    *,
    epsilon: float,
    interpret: Any,
) -> tuple[Float[Array, "bw s s d"], Float[Array, "b gh gw d"]]:
    """Windows of the normalised tokens, and the tokens.

    The tokens are returned for the branch that skips the windows: what comes back from both
    branches is then added in the kernel.

    Args:
      tokens: of the block before.
      scale, shift: of the LayerNorm.
      window_size: side of a window.
      epsilon: added to the variance.
      interpret: whether to run it without a TPU, slowly.
    """
    shape = _Shape(tokens.shape[1:3], window_size, epsilon, interpret)
    windows, tokens = _norm_partition(shape, tokens, _row(scale), _row(shift))
    return windows.reshape(-1, window_size, window_size, windows.shape[-1]), tokens


def unpartition_add_norm(
    tokens: Float[Array, "b gh gw d"],
    windows: Float[Array, "bw s s d"],
    scale: Float[Array, " d"],
    shift: Float[Array, " d"],
    *,
    epsilon: float,
    interpret: Any,
) -> tuple[Float[Array, "b gh gw d"], Float[Array, "b gh gw d"]]:
    """Sum of tokens and their branch in windows, and the LayerNorm of the sum.

    Args:
      tokens: of the branch that skipped the windows.
      windows: of the same grid.
      scale, shift: of the LayerNorm.
      epsilon: added to the variance.
      interpret: whether to run it without a TPU, slowly.
    """
    size = windows.shape[1]
    shape = _Shape(tokens.shape[1:3], size, epsilon, interpret)
    windows = windows.reshape(windows.shape[0], size * size, -1)
    return _unpartition_add_norm(shape, tokens, windows, _row(scale), _row(shift))


def _row(vector: Array) -> Array:
    return vector.astype(jnp.float32)[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_partition(shape: _Shape, tokens: Array, scale: Array, shift: Array):
    def of_row(vectors, rows):
        scale, shift = vectors
        return _Rows(window=_normalised(shape, *rows)[0] * scale + shift)

    (windows,) = _call(shape, "norm_partition", of_row, [tokens], [scale, shift], to_windows=True)
    return windows, tokens


def _norm_partition_forward(shape, tokens, scale, shift):
    return _norm_partition(shape, tokens, scale, shift), (tokens, scale)


def _norm_partition_backward(shape, residuals, gradients):
    tokens, scale = residuals
    d_windows, d_tokens = gradients

    def of_row(vectors, rows):
        (scale,), (tokens, d_tokens, d_normed) = vectors, rows
        d_input, sums = _norm_backward(shape, tokens, scale, d_normed)
        return _Rows(grids=(d_tokens + d_input,), sums=sums)

    d_tokens, *d_norm = _call(
        shape,
        "norm_partition_backward",
        of_row,
        [tokens, d_tokens],
        [scale],
        windows=d_windows,
        num_grids=1,
        num_sums=2,
    )
    return d_tokens, *d_norm


_norm_partition.defvjp(_norm_partition_forward, _norm_partition_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unpartition_add_norm(shape: _Shape, tokens: Array, windows: Array, scale: Array, shift: Array):
    def of_row(vectors, rows):
        scale, shift = vectors
        tokens, branch = rows
        # The sum is normalised as it is stored, rounded: blocks without windows do the same.
        tokens = (tokens + branch).astype(dtype).astype(jnp.float32)
        return _Rows(grids=(tokens, _normalised(shape, tokens)[0] * scale + shift))

    dtype = tokens.dtype
    return tuple(
        _call(
            shape,
            "unpartition_add_norm",
            of_row,
            [tokens],
            [scale, shift],
            windows=windows,
            num_grids=2,
        )
    )


def _unpartition_add_norm_forward(shape, tokens, windows, scale, shift):
    tokens, normed = _unpartition_add_norm(shape, tokens, windows, scale, shift)
    return (tokens, normed), (tokens, scale)


def _unpartition_add_norm_backward(shape, residuals, gradients):
    tokens, scale = residuals

    def of_row(vectors, rows):
        (scale,), (tokens, d_tokens, d_normed) = vectors, rows
        d_input, sums = _norm_backward(shape, tokens, scale, d_normed)
        d_tokens += d_input
        return _Rows(grids=(d_tokens,), window=d_tokens, sums=sums)

    d_tokens, d_windows, *d_norm = _call(
        shape,
        "unpartition_add_norm_backward",
        of_row,
        [tokens, *gradients],
        [scale],
        num_grids=1,
        to_windows=True,
        num_sums=2,
    )
    return d_tokens, d_windows, *d_norm


_unpartition_add_norm.defvjp(_unpartition_add_norm_forward, _unpartition_add_norm_backward)


def _normalised(shape: _Shape, tokens):
    """Tokens of mean 0 and variance 1, and what they were multiplied with."""
    centred = tokens - jnp.mean(tokens, axis=1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=1, keepdims=True)
    factor = jax.lax.rsqrt(variance + shape.epsilon)
    return centred * factor, factor


def _norm_backward(shape: _Shape, tokens, scale, d_normed):
    """Gradients of the tokens, and of scale and shift."""
    normalised, factor = _normalised(shape, tokens)
    scaled = d_normed * scale
    along = jnp.mean(scaled * normalised, axis=1, keepdims=True)
    d_tokens = factor * (scaled - jnp.mean(scaled, axis=1, keepdims=True) - normalised * along)
    return d_tokens, (d_normed * normalised, d_normed)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Results for one row of the grid, in float32.

    Attributes:
      grids: rows ``[gw, d]`` of grids.
      window: a row of the grid that is cut into windows, or None.
      sums: rows of what is summed over all tokens.
    """

    grids: tuple[Array, ...] = ()
    window: Array | None = None
    sums: tuple[Array, ...] = ()


def _call(
    shape: _Shape,
    name: str,
    of_row: Callable[[list[Array], list[Array]], _Rows],
    grids: Sequence[Array],
    vectors: Sequence[Array],
    *,
    windows: Array | None = None,
    num_grids: int = 0,
    to_windows: bool = False,
    num_sums: int = 0,
) -> list[Array]:
    """``of_row`` of vectors and of each row of grids and, last, of the windows' grid.

    Returns grids, windows and sums over all tokens, as many as there are of each.
    """
    b, gh, gw, d = grids[0].shape
    dtype, size = grids[0].dtype, shape.window_size
    down, across = shape.num_windows
    of_grid = pl.BlockSpec((1, size, gw, d), lambda i, r: (i, r, 0, 0))
    of_windows = pl.BlockSpec((across, size * size, d), lambda i, r: (i * down + r, 0, 0))
    of_sum = pl.BlockSpec((1, SUBLANES, d), lambda i, r: (i, 0, 0))
    inputs = (tuple(vectors), tuple(grids), () if windows is None else (windows,))
    outputs: list[tuple[Any, pl.BlockSpec]] = [
        *[(jax.ShapeDtypeStruct(grids[0].shape, dtype), of_grid)] * num_grids,
        *[(jax.ShapeDtypeStruct((b * down * across, size * size, d), dtype), of_windows)]
        * to_windows,
        *[(jax.ShapeDtypeStruct((b, SUBLANES, d), jnp.float32), of_sum)] * num_sums,
    ]
    pack = 4 // dtype.itemsize
    word = jnp.int32 if pack == 2 else dtype
    num_moved = (windows is not None) + to_windows

    def kernel(input_refs, output_refs, *scratch):
        vector_refs, grid_refs, window_refs = input_refs
        refs = list(output_refs)

        def take(count):
            taken, refs[:count] = refs[:count], []
            return taken

        grid_outs, window_outs, sum_outs = take(num_grids), take(to_windows), take(num_sums)
        moved = [
            _Windows(shape, words, row) for words, row in zip(*[iter(scratch)] * 2, strict=True)
        ]
        for ref in sum_outs:

            @pl.when(pl.program_id(1) == 0)
            def _(ref=ref):
                ref[...] = jnp.zeros_like(ref)

        for windows_of_row in moved:
            windows_of_row.clear_row()
        for ref in window_refs:
            moved[0].load(ref)
        weights = [ref[...] for ref in vector_refs]
        for row in range(size):
            rows = [ref[0, row].astype(jnp.float32) for ref in grid_refs]
            rows += [moved[0].row(row, dtype).astype(jnp.float32) for _ in window_refs]
            made = of_row(weights, rows)
            is_inside = pl.program_id(1) * size + row < gh
            for ref, value in zip(grid_outs, made.grids, strict=True):
                ref[0, row] = value.astype(dtype)
            if made.window is not None:
                moved[-1].set_row(row, jnp.where(is_inside, made.window, 0.0).astype(dtype))
            for ref, value in zip(sum_outs, made.sums, strict=True):
                inside = jnp.where(is_inside, value, 0.0)
                ref[0] += jnp.sum(inside.reshape(-1, SUBLANES, d), axis=0)
        for ref in window_outs:
            moved[-1].store(ref)

    scratch = [
        pltpu.VMEM((across, _whole_tiles(size * size // pack), d), word),
        pltpu.VMEM((_whole_tiles(across * size // pack), d), word),
    ]
    results = fused_call(
        kernel,
        inputs,
        (
            (whole(1, d),) * len(vectors),
            (of_grid,) * len(grids),
            () if windows is None else (of_windows,),
        ),
        outputs,
        grid=(b, down),
        flops=_FLOPS * grids[0].size,
        transcendentals=b * gh * gw,
        scratch=scratch * num_moved,
        interpret=shape.interpret,
        name=name,
    )
    num_kept = len(results) - num_sums
    return [*results[:num_kept], *(jnp.sum(x, axis=(0, 1))[None] for x in results[num_kept:])]


def _whole_tiles(rows: int) -> int:
    return -(-rows // SUBLANES) * SUBLANES


@dataclasses.dataclass(frozen=True)
class _Windows:
    """A row of windows, in words of 32 bits: numbers of a token, or of a pair of them.

    Tokens of 16 bits lie in pairs, and only whole words can begin anywhere in a tile.

    Attributes:
      shape: of the kernel.
      words: scratch of the windows.
      across: scratch of a row of the grid, with the padding at its end.
    """

    shape: _Shape
    words: Any
    across: Any

    def clear_row(self) -> None:
        """Makes the padding zero."""
        self.across[...] = jnp.zeros_like(self.across)

    def load(self, ref) -> None:
        """Takes windows ``[n, s s, d]``."""
        for index in range(ref.shape[0]):
            words = self._to_words(ref[index])
            self.words[index, : words.shape[0]] = words

    def store(self, ref) -> None:
        """Gives the windows back."""
        for index in range(ref.shape[0]):
            values = self._to_values(self.words[index], ref.dtype)
            ref[index] = values[: ref.shape[1]]

    def row(self, row: int, dtype) -> Array:
        """A row of the grid ``[gw, d]``, from the windows."""
        for index, of_window, of_row in self._places(row):
            self.across[of_row] = self.words[index, of_window]
        return self._to_values(self.across[...], dtype)[: self.shape.grid[1]]

    def set_row(self, row: int, values) -> None:
        """Puts a row of the grid into the windows."""
        words = self._to_words(values)
        self.across[: words.shape[0]] = words
        for index, of_window, of_row in self._places(row):
            self.words[index, of_window] = self.across[of_row]

    def _places(self, row: int) -> list[tuple[int, slice, slice]]:
        """Index of each window, the row's slice in it, and the window's slice in the row."""
        step = self.shape.window_size // self._pack
        return [
            (index, slice(row * step, row * step + step), slice(index * step, index * step + step))
            for index in range(self.shape.num_windows[1])
        ]

    @property
    def _pack(self) -> int:
        return 2 if self.words.dtype == jnp.int32 else 1

    def _to_words(self, values) -> Array:
        return pltpu.bitcast(values, jnp.int32) if self._pack == 2 else values

    def _to_values(self, words, dtype) -> Array:
        return pltpu.bitcast(words, dtype) if self._pack == 2 else words
