"""Masks and maps by cells: order, words, boxes, uniform sampling."""

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sam_jax.errors import ConfigError
from sam_jax.ops.cells import MaskGrid, bit_at, num_pixels, to_cells, to_image
from sam_jax.ops.images import valid_area

GRIDS = [MaskGrid((2, 3), 1), MaskGrid((2, 3), 2), MaskGrid((3, 2), 4)]


def random_masks(mask_grid: MaskGrid, *batch: int, rate: float = 0.4) -> np.ndarray:
    return np.random.default_rng(0).random((*batch, *mask_grid.image_size)) < rate


def words_of(mask_grid: MaskGrid, masks: np.ndarray) -> jax.Array:
    return mask_grid.pack(jnp.asarray(np.packbits(masks, axis=-1)))


def test_maps_by_cells_hold_each_cells_sub_pixels_row_by_row() -> None:
    maps = np.arange(2 * 8 * 12).reshape(2, 8, 12)
    by_cells = np.asarray(to_cells(jnp.asarray(maps)))
    assert by_cells.shape == (2, 16, 6)
    np.testing.assert_array_equal(by_cells[1, :, 5].reshape(4, 4), maps[1, 4:8, 8:12])
    np.testing.assert_array_equal(to_image(jnp.asarray(by_cells), (2, 3)), maps)


@pytest.mark.parametrize("mask_grid", GRIDS, ids=lambda g: f"scale {g.scale}")
def test_words_hold_every_pixel_and_give_it_back(mask_grid: MaskGrid) -> None:
    masks = random_masks(mask_grid, 2, 3)
    words = words_of(mask_grid, masks)
    assert words.shape == (2, 3, 16, 6)
    np.testing.assert_array_equal(mask_grid.to_masks(words), masks)
    np.testing.assert_array_equal(mask_grid.of_masks(jnp.asarray(masks)), words)
    np.testing.assert_array_equal(num_pixels(words), masks.sum((-2, -1)))


@pytest.mark.parametrize("mask_grid", GRIDS, ids=lambda g: f"scale {g.scale}")
def test_bits_say_where_their_pixel_is(mask_grid: MaskGrid) -> None:
    """Pixel (y, x) of the third sub-pixel in the second row of the last cell."""
    gh, gw = mask_grid.grid
    for bit, (y, x) in mask_grid.bits():
        mask = np.zeros(mask_grid.image_size, bool)
        row, column = 4 * (gh - 1) + 1, 4 * (gw - 1) + 2
        mask[mask_grid.scale * row + y, mask_grid.scale * column + x] = True
        words = np.asarray(words_of(mask_grid, mask))
        assert words[6, -1] == 1 << bit
        assert np.count_nonzero(words) == 1


@pytest.mark.parametrize("mask_grid", GRIDS, ids=lambda g: f"scale {g.scale}")
def test_words_of_the_area(mask_grid: MaskGrid) -> None:
    height, width = mask_grid.image_size
    image_hw = jnp.array([[height, width], [height - 3, width], [1, width - 1]])
    expected = valid_area(image_hw, mask_grid.image_size)
    np.testing.assert_array_equal(mask_grid.to_masks(mask_grid.area(image_hw)), expected)


def test_a_grid_fits_the_image_or_says_why_not() -> None:
    assert MaskGrid.of((64, 64), (1024, 1024)) == MaskGrid((64, 64), 4)
    assert MaskGrid.of((4, 6), (32, 48)) == MaskGrid((4, 6), 2)
    with pytest.raises(ConfigError, match=r"28 x 42 pixels on 2 x 3 cells: .* side of 4, 8, 16"):
        MaskGrid.of((2, 3), (28, 42))


def test_boxes_by_hand() -> None:
    grid = MaskGrid((1, 2), 2)
    masks = np.zeros((4, 8, 16), bool)
    masks[0, 1, 2] = True
    masks[1, 0, 14] = masks[1, 6, 1] = True
    masks[2] = True
    boxes = grid.boxes(words_of(grid, masks).reshape(2, 2, 16, 2))
    assert boxes.dtype == jnp.float32
    expected = [[[2, 1, 2, 1], [1, 0, 14, 6]], [[0, 0, 15, 7], [0, 0, 0, 0]]]
    np.testing.assert_array_equal(boxes, expected)


@hypothesis.given(hnp.arrays(bool, (8, 16)))
def test_boxes_are_tight(mask: np.ndarray) -> None:
    grid = MaskGrid((1, 2), 2)
    ys, xs = np.nonzero(mask)
    expected = [xs.min(), ys.min(), xs.max(), ys.max()] if len(xs) else [0, 0, 0, 0]
    np.testing.assert_array_equal(grid.boxes(words_of(grid, mask)), expected)


@pytest.mark.parametrize("mask_grid", GRIDS, ids=lambda g: f"scale {g.scale}")
def test_sample_pixel_is_uniform(mask_grid: MaskGrid) -> None:
    """A region with holes and an empty row; chi-square test at a fixed seed."""
    region = random_masks(mask_grid, rate=40 / np.prod(mask_grid.image_size))
    region[2] = False
    words = words_of(mask_grid, region)
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda key: mask_grid.sample_pixel(key, words)))
    points, places = draw(keys)
    assert points.shape == (20_000, 2)
    assert points.dtype == jnp.int32
    counts = np.zeros(region.shape, int)
    np.add.at(counts, (np.asarray(points)[:, 1], np.asarray(points)[:, 0]), 1)
    assert counts[~region].sum() == 0
    assert scipy.stats.chisquare(counts[region]).pvalue > 0.01
    other = random_masks(mask_grid, rate=0.5)
    found = jax.vmap(lambda place: bit_at(words_of(mask_grid, other), place))(places)
    np.testing.assert_array_equal(found, other[points[:, 1], points[:, 0]])


def test_sample_pixel_of_small_regions() -> None:
    grid = MaskGrid((1, 2), 1)
    regions = np.zeros((4, 4, 8), bool)
    regions[0, 3, 7] = True  # the last pixel of all
    regions[1, 0, 0] = True
    regions[2, 1, 3] = True
    draw = jax.vmap(lambda words: grid.sample_pixel(jax.random.key(1), words)[0])
    points = draw(words_of(grid, regions))
    np.testing.assert_array_equal(points, [[7, 3], [0, 0], [3, 1], [0, 0]])
