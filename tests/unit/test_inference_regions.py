"""Crops, tiles and grids of points, against known answers."""

import itertools

import numpy as np
import pytest

from sam_jax.inference.automatic import SA1B_OPTIONS
from sam_jax.inference.regions import crop_boxes, point_grid, tile_boxes


def test_crops_are_those_of_the_released_annotations() -> None:
    """An image of SA-1B, 2000 x 1500, in whose annotations these boxes stand."""
    boxes, layers = crop_boxes((1500, 2000), 2, SA1B_OPTIONS.crop_overlap_ratio)
    assert [layers.count(layer) for layer in range(3)] == [1, 4, 16]
    first = {box for box, layer in zip(boxes, layers, strict=True) if layer == 1}
    assert {(x1 - x0, y1 - y0) for x0, y0, x1, y1 in first} == {(1256, 1006)}
    assert {x0 for x0, *_ in first} == {0, 744}
    second = {box for box, layer in zip(boxes, layers, strict=True) if layer == 2}
    assert {x0 for x0, *_ in second} == {0, 436, 872, 1308}
    assert {(x1 - x0, y1 - y0) for x0, y0, x1, y1 in second} == {(692, 567)}
    assert max(x1 for _, _, x1, _ in boxes) == 2000
    assert max(y1 for *_, y1 in boxes) == 1500


def test_grid() -> None:
    np.testing.assert_allclose(
        point_grid(2), [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    )


@pytest.mark.parametrize("size", [(100, 100), (101, 257), (64, 300), (20, 30), (1000, 65)])
def test_tiles_cover_the_image_and_share_their_halo(size: tuple[int, int]) -> None:
    tiles = tile_boxes(size, 64, 16)
    covered = np.zeros(size, bool)
    for x0, y0, x1, y1 in tiles:
        assert (x1 - x0, y1 - y0) == (min(64, size[1]), min(64, size[0]))
        covered[y0:y1, x0:x1] = True
    assert covered.all()
    for low, high in ((0, 2), (1, 3)):
        edges = sorted({(tile[low], tile[high]) for tile in tiles})
        for (_, end), (start, _) in itertools.pairwise(edges):
            assert end - start >= 16
    assert len(tile_boxes((64, 64), 64, 16)) == 1
