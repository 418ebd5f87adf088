"""A TPU kernel for ``ops.mask_sums``, forward and backward, that never has enlarged logits.

Enlarging by a whole factor makes each image pixel a fixed mean of at most four low-resolution
logits. So pixels are taken by their place inside their sub-pixel: those of one place, of a whole
object, are sums and products of maps ``[16, cells]``. First a line of each sub-pixel is made from
its neighbours above and below, then the line's pixels from their neighbours beside them, a few
registers of cells at a time.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sam_jax.arrays import Array, Float, Int
from sam_jax.ops.cells import SIDE, SUBPIXELS, MaskGrid
from sam_jax.ops.mask_sums import MaskSums, power
from sam_jax.ops.tpu_kernel import LANES, SUBLANES, VMEM_LIMIT_BYTES

# Cells at a time: a handful of maps of them fill the registers.
MOST_CELLS = 512
# Bits of what ``_neighbours_inside`` says of each number of a map.
_ROW_ABOVE, _ROW_BELOW, _COLUMN_LEFT, _COLUMN_RIGHT = 1, 2, 4, 8
_CELL_ABOVE, _CELL_BELOW, _CELL_LEFT, _CELL_RIGHT = 16, 32, 64, 128


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What the kernels know when they are compiled."""

    mask_grid: MaskGrid
    alpha: float
    gamma: float
    interpret: bool

    @property
    def num_cells(self) -> int:
        gh, gw = self.mask_grid.grid
        return gh * gw

    @property
    def chunk(self) -> int:
        """Cells at a time."""
        return next(size for size in (MOST_CELLS, 256, LANES) if self.num_cells % size == 0)


def supports(mask_grid: MaskGrid) -> bool:
    """Whether the cells fill whole registers."""
    gh, gw = mask_grid.grid
    return gh * gw % LANES == 0


def mask_sums(
    logits: Float[Array, "b p m 16 cells"],
    masks: Int[Array, "b p 16 cells"],
    area: Int[Array, "b 16 cells"],
    mask_grid: MaskGrid,
    *,
    alpha: float,
    gamma: float,
    interpret: bool,
) -> MaskSums:
    """See ``ops.mask_sums.mask_sums``.

    Args:
      logits, masks, area, mask_grid, alpha, gamma: as there.
      interpret: whether to run it without a TPU, slowly.
    """
    shape = _Shape(mask_grid, alpha, gamma, interpret)
    (focal, probability, hit), errors = _sums(shape, logits, masks, area)
    return MaskSums(focal, probability, hit, errors)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(shape: _Shape, logits: Array, masks: Array, area: Array):
    b, p, m = logits.shape[:3]
    maps = (SUBPIXELS, shape.num_cells)
    sums, errors = pl.pallas_call(
        functools.partial(_forward_kernel, shape),
        grid=(b, p, m),
        in_specs=_input_specs(shape),
        out_specs=[_of_candidate(SUBLANES, LANES), _of_candidate(*maps)],
        out_shape=[
            jax.ShapeDtypeStruct((b, p, m, SUBLANES, LANES), jnp.float32),
            jax.ShapeDtypeStruct((b, p, m, *maps), jnp.int32),
        ],
        scratch_shapes=[pltpu.VMEM(maps, jnp.float32)] * 3,
        compiler_params=_compiler_params(),
        cost_estimate=_cost(shape, logits, operations=30, maps=3),
        interpret=shape.interpret,
        name="mask_sums",
    )(_neighbours_inside(shape), logits, masks, area)
    sums = jnp.sum(sums[..., :3, :], axis=-1)
    return tuple(jnp.moveaxis(sums, -1, 0)), errors


def _sums_forward(shape, logits, masks, area):
    return _sums(shape, logits, masks, area), (logits, masks, area)


def _sums_backward(shape, residuals, cotangents):
    logits, masks, area = residuals
    b, p, m = logits.shape[:3]
    maps = (SUBPIXELS, shape.num_cells)
    d_sums = jnp.pad(jnp.stack(cotangents[0], axis=-1), (*((0, 0),) * 3, (0, SUBLANES - 3)))
    d_logits = pl.pallas_call(
        functools.partial(_backward_kernel, shape),
        grid=(b, p, m),
        in_specs=[*_input_specs(shape), _of_candidate(SUBLANES, LANES)],
        out_specs=_of_candidate(*maps),
        out_shape=jax.ShapeDtypeStruct(logits.shape, jnp.float32),
        scratch_shapes=[pltpu.VMEM(maps, jnp.float32)] * 6,
        compiler_params=_compiler_params(),
        cost_estimate=_cost(shape, logits, operations=60, maps=3),
        interpret=shape.interpret,
        name="mask_sums_backward",
    )(
        _neighbours_inside(shape),
        logits,
        masks,
        area,
        jnp.broadcast_to(d_sums[..., None], (b, p, m, SUBLANES, LANES)),
    )
    return d_logits, None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _of_candidate(rows: int, columns: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, 1, rows, columns), lambda b, p, m: (b, p, m, 0, 0))


def _input_specs(shape: _Shape) -> list[pl.BlockSpec]:
    maps = (SUBPIXELS, shape.num_cells)
    return [
        pl.BlockSpec(maps, lambda b, p, m: (0, 0)),
        _of_candidate(*maps),
        pl.BlockSpec((1, 1, *maps), lambda b, p, m: (b, p, 0, 0)),
        pl.BlockSpec((1, *maps), lambda b, p, m: (b, 0, 0)),
    ]


def _compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "parallel"),
        vmem_limit_bytes=VMEM_LIMIT_BYTES,
    )


def _cost(shape: _Shape, logits: Array, operations: int, maps: int) -> pl.CostEstimate:
    pixels = logits.size * shape.mask_grid.scale**2
    return pl.CostEstimate(
        flops=operations * pixels, transcendentals=2 * pixels, bytes_accessed=4 * maps * logits.size
    )


def _neighbours_inside(shape: _Shape) -> np.ndarray:
    """Of each number of a map, bits for which neighbours its cell and the image have."""
    gh, gw = shape.mask_grid.grid
    row, column, cell_row, cell_column = np.ogrid[:SIDE, :SIDE, :gh, :gw]
    conditions = {
        _ROW_ABOVE: row > 0,
        _ROW_BELOW: row < SIDE - 1,
        _COLUMN_LEFT: column > 0,
        _COLUMN_RIGHT: column < SIDE - 1,
        _CELL_ABOVE: cell_row > 0,
        _CELL_BELOW: cell_row < gh - 1,
        _CELL_LEFT: cell_column > 0,
        _CELL_RIGHT: cell_column < gw - 1,
    }
    bits = sum(bit * condition.astype(np.int32) for bit, condition in conditions.items())
    return np.broadcast_to(bits, (SIDE, SIDE, gh, gw)).reshape(SUBPIXELS, -1).astype(np.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _roll(x: Array, shift: int, axis: int) -> Array:
    return pltpu.roll(x, shift % x.shape[axis], axis)


_roll.defvjp(
    lambda x, shift, axis: (_roll(x, shift, axis), None),
    lambda shift, axis, _, d_x: (_roll(d_x, -shift, axis),),
)


def _between(before: Array, at: Array, after: Array, place: int, scale: int) -> Array:
    """Values at a place of ``scale`` inside each sub-pixel, from theirs and their neighbours'."""
    offset = (place + 0.5) / scale - 0.5
    if not offset:
        return at
    weight = abs(offset)
    return (1 - weight) * at + weight * (before if offset < 0 else after)


def _line(shape: _Shape, maps: Array, inside: Array, y: int) -> tuple[Array, Array, Array]:
    """A line of each sub-pixel, and its neighbours to the left and right.

    Neighbours in the same cell are some rows of the map away, others as well some columns. Edges of
    the image are their own neighbours.
    """
    gw = shape.mask_grid.grid[1]

    def neighbour(x, in_cell, in_image, near: int, far: int, cells: int):
        across = _roll(_roll(x, far, 0), cells, 1)
        outer = jnp.where((inside & in_image) != 0, across, x)
        return jnp.where((inside & in_cell) != 0, _roll(x, near, 0), outer)

    up, down = SIDE, -SIDE
    above = neighbour(maps, _ROW_ABOVE, _CELL_ABOVE, up, up, gw)
    below = neighbour(maps, _ROW_BELOW, _CELL_BELOW, down, down, -gw)
    line = _between(above, maps, below, y, shape.mask_grid.scale)
    left = neighbour(line, _COLUMN_LEFT, _CELL_LEFT, 1, 1 - SIDE, 1)
    right = neighbour(line, _COLUMN_RIGHT, _CELL_RIGHT, -1, SIDE - 1, -1)
    return left, line, right


def _values(shape: _Shape, beside: tuple[Array, Array, Array]) -> tuple[Array, ...]:
    """Of a line's pixels, from left to right."""
    scale = shape.mask_grid.scale
    return tuple(_between(*beside, x, scale) for x in range(scale))


def _bits(shape: _Shape, y: int) -> list[np.int32]:
    """Of a line's pixels: the bits of words that tell of them."""
    line = sorted((x, bit) for bit, (row, x) in shape.mask_grid.bits() if row == y)
    return [np.int32(1 << bit) for _, bit in line]


class _Missed(NamedTuple):
    """Of pixels: the probability of what they are not, its complement, and what that costs."""

    probability: Array
    complement: Array
    cross_entropy: Array


def _missed(value: Array, on_mask: Array) -> _Missed:
    """As ``ops.mask_sums.pixel_terms``, but by a hyperbolic tangent: divisions take a TPU long.

    A probability within 1e-7 of 0 or 1 is taken for it.
    """
    against = jnp.where(on_mask, -value, value)
    half = 0.5 * jnp.tanh(0.5 * against)
    cross_entropy = jnp.maximum(against, 0.0) - jnp.log(0.5 + jnp.abs(half))
    return _Missed(0.5 + half, 0.5 - half, cross_entropy)


def _forward_kernel(shape, neighbours, logits, masks, area, sums, errors, left, line, right):
    beside = (left, line, right)
    errors[...] = jnp.zeros_like(errors)
    totals = (jnp.zeros((SUBPIXELS, shape.chunk), jnp.float32),) * 3
    for y in range(shape.mask_grid.scale):
        for ref, values in zip(
            beside, _line(shape, logits[0, 0, 0], neighbours[...], y), strict=True
        ):
            ref[...] = values

        def add_cells(index, totals, y=y):
            at = pl.ds(pl.multiple_of(index * shape.chunk, shape.chunk), shape.chunk)
            focal_sum, probability_sum, hit_sum = totals
            wrong = errors[0, 0, 0, :, at]
            masks_here, area_here = masks[0, 0, :, at], area[0, :, at]
            values = _values(shape, tuple(ref[:, at] for ref in beside))
            for bit, value in zip(_bits(shape, y), values, strict=True):
                on_mask, inside = masks_here & bit != 0, area_here & bit != 0
                missed = _missed(value, on_mask)
                weight = jnp.where(on_mask, shape.alpha, 1.0 - shape.alpha)
                focal = weight * power(missed.probability, shape.gamma) * missed.cross_entropy
                probability = jnp.where(on_mask, missed.complement, missed.probability)
                focal_sum += jnp.where(inside, focal, 0.0)
                probability_sum += jnp.where(inside, probability, 0.0)
                hit_sum += jnp.where(inside & on_mask, probability, 0.0)
                wrong |= jnp.where((value > 0) ^ on_mask, bit, 0)
            errors[0, 0, 0, :, at] = wrong & area_here
            return focal_sum, probability_sum, hit_sum

        totals = jax.lax.fori_loop(0, shape.num_cells // shape.chunk, add_cells, totals)
    for row, total in enumerate(totals):
        tiles = sum(total[:, i : i + LANES] for i in range(0, shape.chunk, LANES))
        sums[0, 0, 0, row : row + 1, :] = jnp.sum(tiles, axis=0, keepdims=True)
    sums[0, 0, 0, 3:, :] = jnp.zeros((SUBLANES - 3, LANES), jnp.float32)


def _backward_kernel(
    shape,
    neighbours,
    logits,
    masks,
    area,
    d_sums,
    d_logits,
    left,
    line,
    right,
    d_left,
    d_line,
    d_right,
):
    beside, d_beside = (left, line, right), (d_left, d_line, d_right)
    maps, inside_image = logits[0, 0, 0], neighbours[...]
    d_focal, d_probability, d_hit = (d_sums[0, 0, 0, row : row + 1, 0:1] for row in range(3))
    total = jnp.zeros_like(maps)
    for y in range(shape.mask_grid.scale):
        values, from_line = jax.vjp(lambda x, y=y: _line(shape, x, inside_image, y), maps)
        for ref, value in zip(beside, values, strict=True):
            ref[...] = value

        def one_chunk(index, carry, y=y):
            at = pl.ds(pl.multiple_of(index * shape.chunk, shape.chunk), shape.chunk)
            masks_here, area_here = masks[0, 0, :, at], area[0, :, at]
            values, pull = jax.vjp(
                lambda *beside: _values(shape, beside), *(ref[:, at] for ref in beside)
            )
            d_values = []
            for bit, value in zip(_bits(shape, y), values, strict=True):
                on_mask = masks_here & bit != 0
                missed = _missed(value, on_mask)
                # Of the cross-entropy, the slope is what is missed.
                d_against = shape.gamma * missed.complement * missed.cross_entropy
                d_against += missed.probability
                d_against *= power(missed.probability, shape.gamma)
                d_value = d_against * jnp.where(
                    on_mask, -shape.alpha * d_focal, (1.0 - shape.alpha) * d_focal
                )
                of_probability = jnp.where(on_mask, d_probability + d_hit, d_probability)
                d_value += of_probability * missed.probability * missed.complement
                d_values.append(jnp.where(area_here & bit != 0, d_value, 0.0))
            for ref, gradient in zip(d_beside, pull(tuple(d_values)), strict=True):
                ref[:, at] = gradient
            return carry

        jax.lax.fori_loop(0, shape.num_cells // shape.chunk, one_chunk, 0)
        total += from_line(tuple(ref[...] for ref in d_beside))[0]
    d_logits[0, 0, 0] = total
