"""Functions without parameters against the published code and against torch itself."""

from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.ops.images import normalize_images
from sam_jax.ops.positional import fourier_features, grid_coords, relative_positions
from sam_jax.ops.resize import resize_bilinear
from sam_jax.ops.windows import window_partition, window_unpartition
from tests.parity import official
from tests.parity.conftest import Pair

pytestmark = pytest.mark.parity

torch = official.torch


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("grid", [(8, 12), (9, 13), (3, 2)])
def test_windows(segment_anything: ModuleType, grid: tuple[int, int]) -> None:
    theirs = segment_anything.modeling.image_encoder
    tokens = normal(2, *grid, 3)
    windows, padded = theirs.window_partition(torch.from_numpy(tokens), 4)
    ours = window_partition(jnp.asarray(tokens), 4)
    np.testing.assert_array_equal(ours, windows)
    back = theirs.window_unpartition(windows, 4, padded, grid)
    np.testing.assert_array_equal(window_unpartition(ours, grid), back)


@pytest.mark.parametrize("entries", [13, 27, 7, 1])
def test_relative_positions(segment_anything: ModuleType, entries: int) -> None:
    table = normal(entries, 4)
    theirs = segment_anything.modeling.image_encoder.get_rel_pos(7, 7, torch.from_numpy(table))
    official.assert_equal(relative_positions(jnp.asarray(table), 7), theirs)


@pytest.mark.parametrize("size", [(24, 20), (3, 4), (7, 31), (12, 5)])
def test_resize_bilinear(size: tuple[int, int]) -> None:
    maps = normal(2, 3, 6, 10)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(maps), size, mode="bilinear", align_corners=False
    )
    official.assert_equal(resize_bilinear(jnp.asarray(maps), size), theirs)


def test_fourier_features(tiny: Pair) -> None:
    layer = tiny.official.prompt_encoder.pe_layer
    frequencies = jnp.asarray(layer.positional_encoding_gaussian_matrix.numpy())
    image_pe = fourier_features(jnp.asarray(grid_coords((5, 9))), frequencies)
    official.assert_equal(image_pe, layer((5, 9)).permute(1, 2, 0))
    coords = np.random.default_rng(0).uniform(-5, 60, (4, 3, 2)).astype(np.float32)
    theirs = layer.forward_with_coords(torch.from_numpy(coords), (40, 48))
    ours = fourier_features(jnp.asarray(coords) / jnp.array([48.0, 40.0]), frequencies)
    official.assert_equal(ours, theirs)


def test_normalize_images(tiny: Pair) -> None:
    size = tiny.official.image_encoder.img_size
    assert size == 40
    image = np.random.default_rng(0).integers(0, 256, (33, 40, 3), np.uint8)
    theirs = tiny.official.preprocess(torch.from_numpy(image).permute(2, 0, 1))
    padded = np.full((1, size, size, 3), 77, np.uint8)
    padded[0, :33, :40] = image
    ours = normalize_images(jnp.asarray(padded), jnp.array([[33, 40]]))
    official.assert_equal(ours[0], theirs.permute(1, 2, 0))
