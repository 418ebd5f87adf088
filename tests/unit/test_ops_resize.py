"""Resizing against closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.ops.resize import enlarge, resize_bilinear, resize_positions


def test_enlarging_by_hand() -> None:
    """Half-pixel centres: the outermost outputs lie beyond the first centre and are clamped."""
    ours = resize_bilinear(jnp.array([[0.0, 1.0]]), (1, 4))
    np.testing.assert_allclose(ours, [[0.0, 0.25, 0.75, 1.0]], atol=1e-7)
    ours = resize_bilinear(jnp.array([[0.0], [3.0]]), (3, 2))
    np.testing.assert_allclose(ours, [[0.0, 0.0], [1.5, 1.5], [3.0, 3.0]], atol=1e-6)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_enlarging_by_a_whole_factor_is_resizing(scale: int) -> None:
    maps = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 7)).astype(np.float32))
    expected = resize_bilinear(maps, (5 * scale, 7 * scale))
    np.testing.assert_allclose(enlarge(maps, scale), expected, atol=5e-6)
    broken = enlarge(maps.at[0, 4, 6].set(jnp.inf), scale)
    assert np.isfinite(broken[:, : 3 * scale]).all()
    assert np.isfinite(broken[:, :, : 5 * scale]).all()
    assert np.isposinf(broken[0, -1, -1])


def test_shrinking_by_hand() -> None:
    """Without antialiasing an output sees its two neighbours and nothing else."""
    spikes = jnp.array([[0.0, 8.0, 0.0, 0.0, 4.0, 0.0]])
    np.testing.assert_allclose(resize_bilinear(spikes, (1, 2)), [[8.0, 4.0]], atol=1e-6)
    np.testing.assert_allclose(resize_bilinear(spikes, (1, 3)), [[4.0, 0.0, 2.0]], atol=1e-6)


@pytest.mark.parametrize("size", [(12, 20), (5, 7), (3, 25), (6, 10)])
def test_planes_stay_planes(size: tuple[int, int]) -> None:
    def plane(height: int, width: int) -> np.ndarray:
        ys = (np.arange(height) + 0.5) / height
        xs = (np.arange(width) + 0.5) / width
        inside_y, inside_x = np.clip(ys, 0.5 / 6, 1 - 0.5 / 6), np.clip(xs, 0.05, 0.95)
        return (3 * inside_y[:, None] - 2 * inside_x[None]).astype(np.float32)

    maps = jnp.asarray(np.stack([plane(6, 10), -plane(6, 10)])[:, None])
    ours = resize_bilinear(maps, size)
    assert ours.shape == (2, 1, *size)
    np.testing.assert_allclose(ours[0, 0], plane(*size), atol=1e-6)
    np.testing.assert_allclose(ours[1, 0], -plane(*size), atol=1e-6)


def test_positions_that_fit_are_untouched() -> None:
    table = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 2)), jnp.bfloat16)
    assert resize_positions(table, (3, 5)) is table


def test_positions_are_interpolated_by_a_cubic() -> None:
    """Keys' kernel (a = -0.5) reproduces quadratics; edges aside, where it has no neighbours."""

    def surface(height: int, width: int) -> np.ndarray:
        ys = (np.arange(height) + 0.5) / height
        xs = (np.arange(width) + 0.5) / width
        return np.stack([ys[:, None] ** 2 + 0 * xs, 0 * ys[:, None] + xs**2 - xs], -1)

    ours = resize_positions(jnp.asarray(surface(8, 12), jnp.float32), (16, 30))
    assert ours.shape == (16, 30, 2)
    inside = slice(4, -4), slice(6, -6)
    np.testing.assert_allclose(ours[inside], surface(16, 30)[inside], atol=1e-6)


def test_positions_keep_their_type() -> None:
    table = jnp.ones((4, 6, 3), jnp.bfloat16)
    ours = resize_positions(table, (7, 5))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, jnp.ones((7, 5, 3), jnp.bfloat16))
