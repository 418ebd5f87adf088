"""Relative positions and Fourier features, by hand."""

import jax.numpy as jnp
import numpy as np

from sam_jax.ops.positional import (
    fourier_features,
    grid_coords,
    grid_fourier_features,
    relative_positions,
)


def test_relative_positions_by_hand() -> None:
    """Row is the query, column the key: later entries are for queries further along."""
    table = jnp.array([[10.0], [11.0], [12.0], [13.0], [14.0]])
    ours = relative_positions(table, 3)[..., 0]
    np.testing.assert_array_equal(ours, [[12, 11, 10], [13, 12, 11], [14, 13, 12]])


def test_relative_positions_of_a_shorter_table() -> None:
    """Three entries become five: half-pixel centres, so entry i is read at 0.6 i - 0.2."""
    ours = relative_positions(jnp.array([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0]]), 3)
    entries = np.array([0.0, 0.4, 1.0, 1.6, 2.0])
    expected = entries[np.array([[2, 1, 0], [3, 2, 1], [4, 3, 2]])]
    np.testing.assert_allclose(ours[..., 0], expected, atol=1e-6)
    np.testing.assert_allclose(ours[..., 1], 5.0, atol=1e-6)


def test_relative_positions_of_a_longer_table() -> None:
    """Nine entries become three, read at 1, 4 and 7 and not averaged around them."""
    table = jnp.array([0.0, 1, 0, 0, 1, 0, 0, 1, 0])[:, None]
    np.testing.assert_allclose(relative_positions(table, 2)[..., 0], 1.0, atol=1e-6)


def test_grid_coords_are_centres_x_first() -> None:
    coords = grid_coords((2, 4))
    assert coords.shape == (2, 4, 2)
    assert coords.dtype == np.float32
    np.testing.assert_array_equal(coords[0, :, 0], [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_array_equal(coords[:, 1, 1], [0.25, 0.75])
    np.testing.assert_array_equal(coords[1, 3], [0.875, 0.75])


def test_fourier_features_by_hand() -> None:
    frequencies = jnp.array([[0.25, 0.0, 1.0], [0.0, 0.5, 1.0]])
    ours = fourier_features(jnp.array([[0.5, 0.5], [0.75, 1.0]]), frequencies)
    half = np.sqrt(0.5)
    # 2 x - 1 gives (0, 0) and (0.5, 1), hence phases of 0, 0, 0 and of 1/8, 1/2, 3/2 turns.
    expected = [[0, 0, 0, 1, 1, 1], [half, 0, 0, half, -1, -1]]
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_fourier_features_are_float32_whatever_comes_in() -> None:
    frequencies = jnp.full((2, 1), 3.0)
    coords = jnp.array([[0.71875, 0.28125]], jnp.bfloat16)  # exact in bfloat16
    exact = fourier_features(coords.astype(jnp.float32) + 0.001, frequencies)
    ours = fourier_features(coords, frequencies.astype(jnp.bfloat16))
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours, fourier_features(coords.astype(jnp.float32), frequencies))
    assert np.abs(ours - exact).max() > 0.01


def test_features_of_a_grid_are_those_of_its_cells() -> None:
    frequencies = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32))
    expected = fourier_features(jnp.asarray(grid_coords((5, 9))), frequencies)
    ours = grid_fourier_features((5, 9), frequencies)
    assert ours.shape == (5, 9, 32)
    np.testing.assert_allclose(ours, expected, atol=2e-6)
