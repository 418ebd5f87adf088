"""TPU kernels for the statistics of masks under the losses, that never have enlarged logits.

Enlarging by a whole factor makes each image pixel a fixed mean of at most four low-resolution
logits. So pixels are taken by their place inside their sub-pixel: those of one place, of a whole
object, are sums and products of maps ``[16, tokens]``. First a line of each sub-pixel is made from
its neighbours above and below, then the line's pixels from their neighbours beside them, a few
registers of tokens at a time.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sam_jax.arrays import Array, Float, Int
from sam_jax.ops.packed_masks import SIDE, SUBPIXELS, MaskLayout
from sam_jax.ops.tpu.kernel import LANES, SUBLANES, fused_call, whole

# Image tokens that are handled at a time: a handful of their maps fills the registers.
MOST_TOKENS = 512
# Bits of the numbers of ``_neighbours_inside``.
_ROW_ABOVE, _ROW_BELOW, _COLUMN_LEFT, _COLUMN_RIGHT = 1, 2, 4, 8
_TOKEN_ABOVE, _TOKEN_BELOW, _TOKEN_LEFT, _TOKEN_RIGHT = 16, 32, 64, 128


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Constants that the kernels are compiled with."""

    mask_layout: MaskLayout
    alpha: float
    gamma: float
    interpret: Any

    @property
    def num_tokens(self) -> int:
        gh, gw = self.mask_layout.grid
        return gh * gw

    @property
    def chunk(self) -> int:
        """Image tokens at a time."""
        return next(size for size in (MOST_TOKENS, 256, LANES) if self.num_tokens % size == 0)


def supports(mask_layout: MaskLayout) -> bool:
    """True if the image tokens fill whole registers."""
    gh, gw = mask_layout.grid
    return gh * gw % LANES == 0


def mask_statistics(
    logits: Float[Array, "b p m 16 tokens"],
    packed_masks: Int[Array, "b p 16 tokens"],
    area: Int[Array, "b 16 tokens"],
    mask_layout: MaskLayout,
    *,
    alpha: float,
    gamma: float,
    interpret: Any,
) -> tuple[Array, Array, Array, Array]:
    """Sums of focal loss, probability and probability on the mask, and packed errors.

    Args:
      logits: of candidates, the 16 sub-pixels of each image token row by row.
      packed_masks, area, mask_layout, alpha, gamma: see ``ops.mask_statistics``.
      interpret: see ``kernel.fused_call``.
    """
    shape = _Shape(mask_layout, alpha, gamma, interpret)
    sums, errors = _sums(shape, logits, packed_masks, area)
    return *sums, errors


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(shape: _Shape, logits: Array, masks: Array, area: Array):
    b, p, m = logits.shape[:3]
    maps = (SUBPIXELS, shape.num_tokens)
    sums, errors = fused_call(
        functools.partial(_forward_kernel, shape),
        (jnp.asarray(_neighbours_inside(shape)), logits, masks, area),
        _input_specs(shape),
        [
            (
                jax.ShapeDtypeStruct((b, p, m, SUBLANES, LANES), jnp.float32),
                _per_candidate(SUBLANES, LANES),
            ),
            (jax.ShapeDtypeStruct((b, p, m, *maps), jnp.int32), _per_candidate(*maps)),
        ],
        scratch=[pltpu.VMEM(maps, jnp.float32)] * 3,
        **_call_options(shape, logits, operations=30),
        name="mask_statistics",
    )
    sums = jnp.sum(sums[..., :3, :], axis=-1)
    return tuple(jnp.moveaxis(sums, -1, 0)), errors


def _sums_forward(shape, logits, masks, area):
    return _sums(shape, logits, masks, area), (logits, masks, area)


def _sums_backward(shape, residuals, cotangents):
    logits, masks, area = residuals
    b, p, m = logits.shape[:3]
    maps = (SUBPIXELS, shape.num_tokens)
    d_sums = jnp.pad(jnp.stack(cotangents[0], axis=-1), (*((0, 0),) * 3, (0, SUBLANES - 3)))
    d_sums = jnp.broadcast_to(d_sums[..., None], (b, p, m, SUBLANES, LANES))
    (d_logits,) = fused_call(
        functools.partial(_backward_kernel, shape),
        (jnp.asarray(_neighbours_inside(shape)), logits, masks, area, d_sums),
        (*_input_specs(shape), _per_candidate(SUBLANES, LANES)),
        [(jax.ShapeDtypeStruct(logits.shape, jnp.float32), _per_candidate(*maps))],
        scratch=[pltpu.VMEM(maps, jnp.float32)] * 6,
        **_call_options(shape, logits, operations=60),
        name="mask_statistics_backward",
    )
    return d_logits, None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _per_candidate(rows: int, columns: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, 1, rows, columns), lambda b, p, m: (b, p, m, 0, 0))


def _input_specs(shape: _Shape) -> tuple[pl.BlockSpec, ...]:
    maps = (SUBPIXELS, shape.num_tokens)
    return (
        whole(*maps),
        _per_candidate(*maps),
        pl.BlockSpec((1, 1, *maps), lambda b, p, m: (b, p, 0, 0)),
        pl.BlockSpec((1, *maps), lambda b, p, m: (b, 0, 0)),
    )


def _call_options(shape: _Shape, logits: Array, operations: int) -> dict[str, Any]:
    pixels = logits.size * shape.mask_layout.scale**2
    return {
        "grid": logits.shape[:3],
        "flops": operations * pixels,
        "transcendentals": 2 * pixels,
        "last_axis": "parallel",
        "interpret": shape.interpret,
    }


def _neighbours_inside(shape: _Shape) -> np.ndarray:
    """Bits, for each number of a map, that say which neighbours its token and the image have."""
    gh, gw = shape.mask_layout.grid
    row, column, token_row, token_column = np.ogrid[:SIDE, :SIDE, :gh, :gw]
    conditions = {
        _ROW_ABOVE: row > 0,
        _ROW_BELOW: row < SIDE - 1,
        _COLUMN_LEFT: column > 0,
        _COLUMN_RIGHT: column < SIDE - 1,
        _TOKEN_ABOVE: token_row > 0,
        _TOKEN_BELOW: token_row < gh - 1,
        _TOKEN_LEFT: token_column > 0,
        _TOKEN_RIGHT: token_column < gw - 1,
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

    Neighbours of the same token are some rows of the map away, others as well some columns. Edges
    of the image are their own neighbours.
    """
    gw = shape.mask_layout.grid[1]

    def neighbour(x, in_token, in_image, near: int, far: int, tokens: int):
        across = _roll(_roll(x, far, 0), tokens, 1)
        outer = jnp.where((inside & in_image) != 0, across, x)
        return jnp.where((inside & in_token) != 0, _roll(x, near, 0), outer)

    up, down = SIDE, -SIDE
    above = neighbour(maps, _ROW_ABOVE, _TOKEN_ABOVE, up, up, gw)
    below = neighbour(maps, _ROW_BELOW, _TOKEN_BELOW, down, down, -gw)
    line = _between(above, maps, below, y, shape.mask_layout.scale)
    left = neighbour(line, _COLUMN_LEFT, _TOKEN_LEFT, 1, 1 - SIDE, 1)
    right = neighbour(line, _COLUMN_RIGHT, _TOKEN_RIGHT, -1, SIDE - 1, -1)
    return left, line, right


def _values(shape: _Shape, beside: tuple[Array, Array, Array]) -> tuple[Array, ...]:
    """Values of a line's pixels, from left to right."""
    scale = shape.mask_layout.scale
    return tuple(_between(*beside, x, scale) for x in range(scale))


def _bits(shape: _Shape, y: int) -> list[np.int32]:
    """Bits of the packed integers that stand for a line's pixels, from left to right."""
    line = sorted((x, bit) for bit, (row, x) in shape.mask_layout.bits() if row == y)
    return [np.int32(1 << bit) for _, bit in line]


class _Missed(NamedTuple):
    """Probability of the wrong class at pixels, its complement, and the cross-entropy."""

    probability: Array
    complement: Array
    cross_entropy: Array


def _missed(value: Array, on_mask: Array) -> _Missed:
    """``ops.mask_statistics.pixel_terms`` by a hyperbolic tangent: divisions take a TPU long.

    A probability within 1e-7 of 0 or 1 is taken for it.
    """
    against = jnp.where(on_mask, -value, value)
    half = 0.5 * jnp.tanh(0.5 * against)
    cross_entropy = jnp.maximum(against, 0.0) - jnp.log(0.5 + jnp.abs(half))
    return _Missed(0.5 + half, 0.5 - half, cross_entropy)


def _forward_kernel(shape, inputs, outputs, left, line, right):
    neighbours, logits, masks, area = inputs
    sums, errors = outputs
    beside = (left, line, right)
    errors[...] = jnp.zeros_like(errors)
    totals = (jnp.zeros((SUBPIXELS, shape.chunk), jnp.float32),) * 3
    for y in range(shape.mask_layout.scale):
        for ref, values in zip(
            beside, _line(shape, logits[0, 0, 0], neighbours[...], y), strict=True
        ):
            ref[...] = values

        def add_tokens(index, totals, y=y):
            at = pl.ds(pl.multiple_of(index * shape.chunk, shape.chunk), shape.chunk)
            focal_sum, probability_sum, hit_sum = totals
            wrong = errors[0, 0, 0, :, at]
            masks_here, area_here = masks[0, 0, :, at], area[0, :, at]
            values = _values(shape, tuple(ref[:, at] for ref in beside))
            for bit, value in zip(_bits(shape, y), values, strict=True):
                on_mask, inside = masks_here & bit != 0, area_here & bit != 0
                missed = _missed(value, on_mask)
                weight = jnp.where(on_mask, shape.alpha, 1.0 - shape.alpha)
                focal = weight * missed.probability**shape.gamma * missed.cross_entropy
                probability = jnp.where(on_mask, missed.complement, missed.probability)
                focal_sum += jnp.where(inside, focal, 0.0)
                probability_sum += jnp.where(inside, probability, 0.0)
                hit_sum += jnp.where(inside & on_mask, probability, 0.0)
                wrong |= jnp.where((value > 0) ^ on_mask, bit, 0)
            errors[0, 0, 0, :, at] = wrong & area_here
            return focal_sum, probability_sum, hit_sum

        totals = jax.lax.fori_loop(0, shape.num_tokens // shape.chunk, add_tokens, totals)
    for row, total in enumerate(totals):
        tiles = sum(total[:, i : i + LANES] for i in range(0, shape.chunk, LANES))
        sums[0, 0, 0, row : row + 1, :] = jnp.sum(tiles, axis=0, keepdims=True)
    sums[0, 0, 0, 3:, :] = jnp.zeros((SUBLANES - 3, LANES), jnp.float32)


def _backward_kernel(shape, inputs, outputs, left, line, right, d_left, d_line, d_right):
    neighbours, logits, masks, area, d_sums = inputs
    (d_logits,) = outputs
    beside, d_beside = (left, line, right), (d_left, d_line, d_right)
    maps, inside_image = logits[0, 0, 0], neighbours[...]
    d_focal, d_probability, d_hit = (d_sums[0, 0, 0, row : row + 1, 0:1] for row in range(3))
    total = jnp.zeros_like(maps)
    for y in range(shape.mask_layout.scale):
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
                # The derivative of the cross-entropy is ``missed.probability``.
                d_against = shape.gamma * missed.complement * missed.cross_entropy
                d_against += missed.probability
                d_against *= missed.probability**shape.gamma
                d_value = d_against * jnp.where(
                    on_mask, -shape.alpha * d_focal, (1.0 - shape.alpha) * d_focal
                )
                of_probability = jnp.where(on_mask, d_probability + d_hit, d_probability)
                d_value += of_probability * missed.probability * missed.complement
                d_values.append(jnp.where(area_here & bit != 0, d_value, 0.0))
            for ref, gradient in zip(d_beside, pull(tuple(d_values)), strict=True):
                ref[:, at] = gradient
            return carry

        jax.lax.fori_loop(0, shape.num_tokens // shape.chunk, one_chunk, 0)
        total += from_line(tuple(ref[...] for ref in d_beside))[0]
    d_logits[0, 0, 0] = total
