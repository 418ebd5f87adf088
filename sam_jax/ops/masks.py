"""Segmentation masks on the device: packing, overlap, boxes, sampling of pixels."""

import jax
import jax.numpy as jnp

from sam_jax.arrays import Array, Bool, Float, Int, UInt8


def unpack_masks(packed: UInt8[Array, "*batch h w8"]) -> Bool[Array, "*batch h w"]:
    """Masks of ``numpy.packbits(masks, axis=-1)`` again.

    64 masks of 1024 x 1024 take 8 MB packed and 64 MB as bytes, for every image of every batch
    that waits in a queue or crosses to the device.
    """
    return jnp.unpackbits(packed, axis=-1).astype(bool)


def mask_iou(
    masks: Bool[Array, "*#batch h w"], others: Bool[Array, "*#batch h w"]
) -> Float[Array, "*#batch"]:
    """Intersection over union; two empty masks have IoU 0 (the union is taken as at least 1)."""
    intersection = jnp.sum(masks & others, axis=(-2, -1), dtype=jnp.int32)
    union = jnp.sum(masks | others, axis=(-2, -1), dtype=jnp.int32)
    return intersection / jnp.maximum(union, 1)


def masks_to_boxes(masks: Bool[Array, "*batch h w"]) -> Float[Array, "*batch 4"]:
    """Tight boxes ``x0, y0, x1, y1`` in pixel indices, both corners inside the mask.

    All zeros for an empty mask. A prompt names pixels by their index; the model adds the half
    pixel itself.
    """

    def first_and_last(occupied):
        size = occupied.shape[-1]
        first = jnp.argmax(occupied, axis=-1)
        last = size - 1 - jnp.argmax(occupied[..., ::-1], axis=-1)
        return first, last

    x0, x1 = first_and_last(jnp.any(masks, axis=-2))
    y0, y1 = first_and_last(jnp.any(masks, axis=-1))
    boxes = jnp.stack([x0, y0, x1, y1], axis=-1).astype(jnp.float32)
    return jnp.where(jnp.any(masks, axis=(-2, -1))[..., None], boxes, 0.0)


def sample_pixel(key: Array, region: Bool[Array, "*batch h w"]) -> Int[Array, "*batch 2"]:
    """One pixel ``(x, y)`` of each region, every one equally likely; ``(0, 0)`` if it is empty.

    Draws a rank among the region's pixels, then finds the row and the column that hold it by
    running sums, so it costs one pass over the region and never a random number per pixel.
    """
    per_row = jnp.sum(region, axis=-1, dtype=jnp.int32)
    up_to_row = jnp.cumsum(per_row, axis=-1)
    total = up_to_row[..., -1]
    rank = jax.random.randint(key, total.shape, 0, jnp.maximum(total, 1))
    y = jnp.minimum(jnp.sum(up_to_row <= rank[..., None], axis=-1), region.shape[-2] - 1)
    row = jnp.take_along_axis(region, y[..., None, None], axis=-2)[..., 0, :]
    before = jnp.take_along_axis(up_to_row - per_row, y[..., None], axis=-1)
    within_row = jnp.cumsum(row, axis=-1, dtype=jnp.int32)
    x = jnp.sum(within_row <= rank[..., None] - before, axis=-1)
    found = (total > 0)[..., None]
    return jnp.where(found, jnp.stack([x, y], axis=-1), 0).astype(jnp.int32)
