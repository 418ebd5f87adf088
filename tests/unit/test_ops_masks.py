"""Masks on the device: packing, overlap, boxes, uniform sampling."""

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from sam_jax.ops import masks as ops
from sam_jax.ops.masks import mask_iou, masks_to_boxes, unpack_masks

sample_pixel = jax.jit(ops.sample_pixel)


def test_unpack_masks_inverts_packbits() -> None:
    masks = np.random.default_rng(0).random((2, 3, 5, 24)) < 0.5
    packed = jnp.asarray(np.packbits(masks, axis=-1))
    ours = unpack_masks(packed)
    assert ours.dtype == bool
    np.testing.assert_array_equal(ours, masks)


def test_mask_iou_by_hand() -> None:
    empty = np.zeros((3, 4), bool)
    left, middle = empty.copy(), empty.copy()
    left[:, :2] = True  # 6 pixels
    middle[:2, 1:3] = True  # 4 pixels, 2 of them shared
    masks = jnp.asarray(np.stack([left, left, left, empty, ~left]))
    others = jnp.asarray(np.stack([left, middle, empty, empty, left]))
    np.testing.assert_allclose(mask_iou(masks, others), [1, 2 / 8, 0, 0, 0], rtol=1e-6)


def test_masks_to_boxes_by_hand() -> None:
    masks = np.zeros((4, 3, 5), bool)
    masks[0, 1, 2] = True
    masks[1, 0, 4] = masks[1, 2, 1] = True
    masks[2] = True
    boxes = masks_to_boxes(jnp.asarray(masks).reshape(2, 2, 3, 5))
    assert boxes.dtype == jnp.float32
    expected = [[[2, 1, 2, 1], [1, 0, 4, 2]], [[0, 0, 4, 2], [0, 0, 0, 0]]]
    np.testing.assert_array_equal(boxes, expected)


@hypothesis.given(hnp.arrays(bool, (4, 7)))
def test_masks_to_boxes_is_tight(mask: np.ndarray) -> None:
    ys, xs = np.nonzero(mask)
    expected = [xs.min(), ys.min(), xs.max(), ys.max()] if len(xs) else [0, 0, 0, 0]
    np.testing.assert_array_equal(masks_to_boxes(jnp.asarray(mask)), expected)


def test_sample_pixel_is_uniform() -> None:
    """A region with holes and an empty row; chi-square test at a fixed seed."""
    region = np.random.default_rng(0).random((6, 9)) < 0.5
    region[2] = False
    draws = 20_000
    points = sample_pixel(jax.random.key(0), jnp.broadcast_to(region, (draws, *region.shape)))
    assert points.shape == (draws, 2)
    assert points.dtype == jnp.int32
    counts = np.zeros(region.shape, int)
    np.add.at(counts, (np.asarray(points)[:, 1], np.asarray(points)[:, 0]), 1)
    assert counts[~region].sum() == 0
    assert scipy.stats.chisquare(counts[region]).pvalue > 0.01


def test_sample_pixel_of_small_regions() -> None:
    regions = np.zeros((2, 2, 3, 5), bool)
    regions[0, 0, 2, 4] = True  # the last pixel of all
    regions[0, 1, 0, 0] = True
    regions[1, 0, 1, 3] = True
    points = sample_pixel(jax.random.key(1), jnp.asarray(regions))
    np.testing.assert_array_equal(points, [[[4, 2], [0, 0]], [[3, 1], [0, 0]]])


def test_sample_pixel_draws_for_each_region_by_itself() -> None:
    points = sample_pixel(jax.random.key(0), jnp.ones((64, 32, 48), bool))
    assert len(np.unique(np.asarray(points), axis=0)) > 56
