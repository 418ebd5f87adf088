"""Packed masks and maps by sub-pixels: order, bits, boxes, uniform sampling."""

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sam_jax.errors import ConfigError
from sam_jax.ops.images import valid_area
from sam_jax.ops.packed_masks import MaskLayout, bit_at, num_pixels, to_image, to_subpixels

LAYOUTS = [MaskLayout((2, 3), 1), MaskLayout((2, 3), 2), MaskLayout((3, 2), 4)]


def random_masks(mask_layout: MaskLayout, *batch: int, rate: float = 0.4) -> np.ndarray:
    return np.random.default_rng(0).random((*batch, *mask_layout.image_size)) < rate


def packed(mask_layout: MaskLayout, masks: np.ndarray) -> jax.Array:
    return mask_layout.pack(jnp.asarray(np.packbits(masks, axis=-1)))


def test_maps_hold_the_sub_pixels_of_each_image_token_row_by_row() -> None:
    maps = np.arange(2 * 8 * 12).reshape(2, 8, 12)
    by_token = np.asarray(to_subpixels(jnp.asarray(maps)))
    assert by_token.shape == (2, 16, 6)
    np.testing.assert_array_equal(by_token[1, :, 5].reshape(4, 4), maps[1, 4:8, 8:12])
    np.testing.assert_array_equal(to_image(jnp.asarray(by_token), (2, 3)), maps)


@pytest.mark.parametrize("mask_layout", LAYOUTS, ids=lambda g: f"scale {g.scale}")
def test_packed_masks_hold_every_pixel_and_give_it_back(mask_layout: MaskLayout) -> None:
    masks = random_masks(mask_layout, 2, 3)
    packed_masks = packed(mask_layout, masks)
    assert packed_masks.shape == (2, 3, 16, 6)
    np.testing.assert_array_equal(mask_layout.to_masks(packed_masks), masks)
    np.testing.assert_array_equal(mask_layout.of_masks(jnp.asarray(masks)), packed_masks)
    np.testing.assert_array_equal(num_pixels(packed_masks), masks.sum((-2, -1)))


@pytest.mark.parametrize("mask_layout", LAYOUTS, ids=lambda g: f"scale {g.scale}")
def test_bits_say_where_their_pixel_is(mask_layout: MaskLayout) -> None:
    """Pixel (y, x) of the third sub-pixel in the second row of the last image token."""
    gh, gw = mask_layout.grid
    for bit, (y, x) in mask_layout.bits():
        mask = np.zeros(mask_layout.image_size, bool)
        row, column = 4 * (gh - 1) + 1, 4 * (gw - 1) + 2
        mask[mask_layout.scale * row + y, mask_layout.scale * column + x] = True
        packed_masks = np.asarray(packed(mask_layout, mask))
        assert packed_masks[6, -1] == 1 << bit
        assert np.count_nonzero(packed_masks) == 1


@pytest.mark.parametrize("mask_layout", LAYOUTS, ids=lambda g: f"scale {g.scale}")
def test_packed_masks_of_the_area(mask_layout: MaskLayout) -> None:
    height, width = mask_layout.image_size
    image_hw = jnp.array([[height, width], [height - 3, width], [1, width - 1]])
    expected = valid_area(image_hw, mask_layout.image_size)
    np.testing.assert_array_equal(mask_layout.to_masks(mask_layout.area(image_hw)), expected)


def test_a_layout_fits_the_image_or_says_why_not() -> None:
    assert MaskLayout.of((64, 64), (1024, 1024)) == MaskLayout((64, 64), 4)
    assert MaskLayout.of((4, 6), (32, 48)) == MaskLayout((4, 6), 2)
    with pytest.raises(ConfigError, match=r"28 x 42 pixels on 2 x 3 tokens: .* side of 4, 8, 16"):
        MaskLayout.of((2, 3), (28, 42))


def test_boxes_by_hand() -> None:
    layout = MaskLayout((1, 2), 2)
    masks = np.zeros((4, 8, 16), bool)
    masks[0, 1, 2] = True
    masks[1, 0, 14] = masks[1, 6, 1] = True
    masks[2] = True
    boxes = layout.boxes(packed(layout, masks).reshape(2, 2, 16, 2))
    assert boxes.dtype == jnp.float32
    expected = [[[2, 1, 2, 1], [1, 0, 14, 6]], [[0, 0, 15, 7], [0, 0, 0, 0]]]
    np.testing.assert_array_equal(boxes, expected)


@hypothesis.given(hnp.arrays(bool, (8, 16)))
def test_boxes_are_tight(mask: np.ndarray) -> None:
    layout = MaskLayout((1, 2), 2)
    ys, xs = np.nonzero(mask)
    expected = [xs.min(), ys.min(), xs.max(), ys.max()] if len(xs) else [0, 0, 0, 0]
    np.testing.assert_array_equal(layout.boxes(packed(layout, mask)), expected)


@pytest.mark.parametrize("mask_layout", LAYOUTS, ids=lambda g: f"scale {g.scale}")
def test_sample_pixel_is_uniform(mask_layout: MaskLayout) -> None:
    """A region with holes and an empty row; chi-square test at a fixed seed."""
    region = random_masks(mask_layout, rate=40 / np.prod(mask_layout.image_size))
    region[2] = False
    packed_masks = packed(mask_layout, region)
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda key: mask_layout.sample_pixel(key, packed_masks)))
    points, places = draw(keys)
    assert points.shape == (20_000, 2)
    assert points.dtype == jnp.int32
    counts = np.zeros(region.shape, int)
    np.add.at(counts, (np.asarray(points)[:, 1], np.asarray(points)[:, 0]), 1)
    assert counts[~region].sum() == 0
    assert scipy.stats.chisquare(counts[region]).pvalue > 0.01
    other = random_masks(mask_layout, rate=0.5)
    found = jax.vmap(lambda place: bit_at(packed(mask_layout, other), place))(places)
    np.testing.assert_array_equal(found, other[points[:, 1], points[:, 0]])


def test_sample_pixel_of_small_regions() -> None:
    layout = MaskLayout((1, 2), 1)
    regions = np.zeros((4, 4, 8), bool)
    regions[0, 3, 7] = True  # the last pixel of all
    regions[1, 0, 0] = True
    regions[2, 1, 3] = True
    draw = jax.vmap(lambda packed_masks: layout.sample_pixel(jax.random.key(1), packed_masks)[0])
    points = draw(packed(layout, regions))
    np.testing.assert_array_equal(points, [[7, 3], [0, 0], [3, 1], [0, 0]])
