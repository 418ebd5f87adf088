"""Masks as bits, an integer for each low-resolution pixel; and the order of pixels that suits it.

An image token has 4 x 4 low-resolution pixels, its sub-pixels. Masks are kept as ``[16, tokens]``:
sub-pixels row by row on the first axis, image tokens on the last, which fills the lanes of any
processor. Logits have the order of the image; operations that work by sub-pixel reorder them.

A packed mask is an integer for each sub-pixel, with a bit for each image pixel of it, row by row
from the highest: two bytes stand for what would take 16 as booleans, and sums over all pixels of a
mask become counts of bits.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sam_jax.arrays import Array, Bool, Float, GridShape, Int, Shaped, UInt8
from sam_jax.errors import ConfigError
from sam_jax.ops.images import valid_area

SIDE = 4
SUBPIXELS = SIDE * SIDE
# Image pixels along a side of a sub-pixel: their square fits into the bits of an integer, and they
# divide the bytes of packed masks.
_SCALES = (1, 2, 4)


def to_subpixels(maps: Shaped[Array, "*batch lh lw"]) -> Shaped[Array, "*batch 16 tokens"]:
    """Maps by sub-pixel and image token."""
    return rearrange(maps, "... (h r) (w c) -> ... (r c) (h w)", r=SIDE, c=SIDE)


def to_image(
    maps: Shaped[Array, "*batch 16 tokens"], grid: GridShape
) -> Shaped[Array, "*batch lh lw"]:
    """Maps in the order of the image; the inverse of ``to_subpixels``."""
    return rearrange(maps, "... (r c) (h w) -> ... (h r) (w c)", r=SIDE, h=grid[0])


def subpixel_kernels(
    kernel1: Float[Array, "4 c1"], kernel2: Float[Array, "4*c1 c2"]
) -> tuple[Float[Array, "16 q c1"], Float[Array, "q c1 c2"]]:
    """Two convolutions with kernel and stride 2, as products of the sub-pixels of an image token.

    The first makes each quarter ``q`` of its own 2 x 2 sub-pixels, with zeros for the others.
    """
    kernel = rearrange(kernel1, "(i j) c -> 1 i 1 j 1 1 c", i=2)
    kernel = kernel * np.eye(4, dtype=kernel.dtype).reshape(2, 1, 2, 1, 2, 2, 1)
    first = rearrange(kernel, "h i w j H W c -> (h i w j) (H W) c")
    return first, rearrange(kernel2, "(q c) e -> q c e", q=4)


@dataclasses.dataclass(frozen=True)
class MaskLayout:
    """Layout of bit-packed masks: the integer, and its bit, that hold each pixel of an image.

    Attributes:
      grid: rows and columns of image tokens.
      scale: image pixels along a side of a sub-pixel.
    """

    grid: GridShape
    scale: int

    @classmethod
    def of(cls, grid: GridShape, image_size: tuple[int, int]) -> "MaskLayout":
        """Layout for an image of a height and width.

        Raises:
          ConfigError: if a sub-pixel would not have 1, 2 or 4 pixels along both sides.
        """
        for scale in _SCALES:
            mask_layout = cls(grid, scale)
            if mask_layout.image_size == tuple(image_size):
                return mask_layout
        raise ConfigError(
            f"masks of {image_size[0]} x {image_size[1]} pixels on {grid[0]} x {grid[1]} tokens: "
            f"patches must have a side of {', '.join(str(SIDE * scale) for scale in _SCALES)}"
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        gh, gw = self.grid
        return SIDE * self.scale * gh, SIDE * self.scale * gw

    def pack(self, packed: UInt8[Array, "*batch h w8"]) -> Int[Array, "*batch 16 tokens"]:
        """Packed masks of ``numpy.packbits(masks, axis=-1)``."""
        scale, in_byte = self.scale, 8 // self.scale
        shifts = 8 - scale * (1 + jnp.arange(in_byte, dtype=jnp.int32))
        parts = (packed.astype(jnp.int32)[..., None] >> shifts) & (2**scale - 1)
        parts = rearrange(parts, "... h x part -> ... h (x part)")[..., : SIDE * self.grid[1]]
        rows = rearrange(parts, "... (h r y) (w c) -> y ... (r c) (h w)", r=SIDE, y=scale, c=SIDE)
        return sum(row << scale * (scale - 1 - y) for y, row in enumerate(rows))

    def area(self, image_hw: Int[Array, "b 2"]) -> Int[Array, "b 16 tokens"]:
        """Packed mask of the pixels that are image and not padding."""
        return self.of_masks(valid_area(image_hw, self.image_size))

    def bits(self) -> list[tuple[int, tuple[int, int]]]:
        """Bits of an integer, with row and column of their pixels inside the sub-pixel."""
        last = self.scale**2 - 1
        return [(last - i, divmod(i, self.scale)) for i in range(self.scale**2)]

    def of_masks(self, masks: Bool[Array, "*batch h w"]) -> Int[Array, "*batch 16 tokens"]:
        """Packs masks."""
        return self.pack(jnp.packbits(masks, axis=-1))

    def to_masks(self, packed_masks: Int[Array, "*batch 16 tokens"]) -> Bool[Array, "*batch h w"]:
        """Unpacks masks."""
        scale, in_byte = self.scale, 8 // self.scale
        shifts = scale * np.arange(scale)[::-1]
        lines = jnp.stack([packed_masks >> int(shift) & (2**scale - 1) for shift in shifts])
        lines = rearrange(lines, "y ... (r c) (h w) -> ... (h r y) (w c)", r=SIDE, h=self.grid[0])
        width = lines.shape[-1]
        lines = jnp.pad(lines, (*((0, 0),) * (lines.ndim - 1), (0, -width % in_byte)))
        lines = rearrange(lines, "... h (x part) -> ... h x part", part=in_byte)
        shifts = 8 - scale * (1 + np.arange(in_byte, dtype=np.int32))
        packed = jnp.sum(lines << shifts, axis=-1).astype(jnp.uint8)
        return jnp.unpackbits(packed, axis=-1)[..., : width * scale].astype(bool)

    def reduced(
        self, packed_masks: Int[Array, "*batch 16 tokens"]
    ) -> Int[Array, "*batch 16 tokens"]:
        """Masks at low resolution, in the layout of scale 1: pixels that are filled by half."""
        counts = jax.lax.population_count(packed_masks)
        return (2 * counts >= self.scale**2).astype(packed_masks.dtype)

    def boxes(self, packed_masks: Int[Array, "*batch 16 tokens"]) -> Float[Array, "*batch 4"]:
        """Tight boxes ``x0, y0, x1, y1`` in pixel indices, both corners inside the mask.

        All zeros for an empty mask. A prompt names pixels by their index; the model adds the half
        pixel itself.
        """
        packed_masks = rearrange(
            packed_masks, "... (r c) (h w) -> ... r c h w", r=SIDE, h=self.grid[0]
        )

        def first_and_last(across: tuple[int, int], along: int):
            """Pixels that the mask spans along y (0) or x (1)."""
            axes = [packed_masks.ndim + axis for axis in across]
            joined = jax.lax.reduce(packed_masks, np.int32(0), jax.lax.bitwise_or, axes)
            lines = [0] * self.scale
            for bit, place in self.bits():
                lines[place[along]] |= 1 << bit
            occupied = jnp.stack([joined & line for line in lines], axis=-1) != 0
            occupied = rearrange(occupied, "... part token line -> ... (token part line)")
            first = jnp.argmax(occupied, axis=-1)
            return first, occupied.shape[-1] - 1 - jnp.argmax(occupied[..., ::-1], axis=-1)

        y0, y1 = first_and_last((-3, -1), 0)
        x0, x1 = first_and_last((-4, -2), 1)
        boxes = jnp.stack([x0, y0, x1, y1], axis=-1).astype(jnp.float32)
        exists = jnp.any(packed_masks != 0, axis=(-4, -3, -2, -1))
        return jnp.where(exists[..., None], boxes, 0.0)

    def sample_pixel(
        self, key: Array, packed_masks: Int[Array, "16 tokens"]
    ) -> tuple[Int[Array, " 2"], Int[Array, " 3"]]:
        """One pixel ``(x, y)`` of a mask, each equally likely, and its place in the packed mask.

        The first pixel of all if the mask is empty. Draws a rank among the mask's pixels, then
        finds the sub-pixel, the token and the bit that hold it by running sums: never a random
        number per pixel.

        Returns:
          the pixel, and its sub-pixel, token and bit, for ``bit_at``.
        """
        counts = jax.lax.population_count(packed_masks)
        total = jnp.sum(counts, dtype=jnp.int32)
        rank = jax.random.randint(key, (), 0, jnp.maximum(total, 1), jnp.int32)
        subpixel, rank = _of_rank(jnp.sum(counts, axis=1), rank)
        token, rank = _of_rank(counts[subpixel], rank)
        bits, places = zip(*self.bits(), strict=True)
        order, rank = _of_rank(packed_masks[subpixel, token] >> jnp.array(bits) & 1, rank)
        row, column = (SIDE * x for x in jnp.divmod(token, self.grid[1]))
        row, column = row + subpixel // SIDE, column + subpixel % SIDE
        y, x = jnp.array(places)[order]
        pixel = jnp.stack([self.scale * column + x, self.scale * row + y])
        place = jnp.stack([subpixel, token, jnp.array(bits)[order]])
        exists = jnp.any(packed_masks != 0)
        first = jnp.array([0, 0, bits[0]])
        pixel, place = jnp.where(exists, pixel, 0), jnp.where(exists, place, first)
        return pixel.astype(jnp.int32), place.astype(jnp.int32)


def bit_at(packed_masks: Int[Array, "16 tokens"], place: Int[Array, " 3"]) -> Int[Array, ""]:
    """1 where the mask has the pixel at a place of ``MaskLayout.sample_pixel``, else 0."""
    subpixel, token, bit = place
    return packed_masks[subpixel, token] >> bit & 1


def num_pixels(packed_masks: Int[Array, "*batch 16 tokens"]) -> Float[Array, "*batch"]:
    """Pixels of masks."""
    counts = jax.lax.population_count(packed_masks)
    return jnp.sum(counts, axis=(-2, -1), dtype=jnp.int32).astype(jnp.float32)


def _of_rank(counts: Int[Array, " k"], rank: Int[Array, ""]) -> tuple[Array, Array]:
    """Index of the group that holds the element of a rank, and its rank inside the group."""
    up_to = jnp.cumsum(counts)
    group = jnp.minimum(jnp.sum(up_to <= rank), counts.size - 1)
    return group, rank - (up_to - counts)[group]
