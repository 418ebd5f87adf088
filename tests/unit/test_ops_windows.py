"""Windows: order and padding by hand, round trips on grids of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.ops.windows import window_partition, window_unpartition


def test_order_and_padding_by_hand() -> None:
    tokens = jnp.arange(1.0, 1 + 2 * 3 * 5).reshape(2, 3, 5, 1)
    windows = window_partition(tokens, 2)[..., 0]
    assert windows.shape == (2 * 2 * 3, 2, 2)
    np.testing.assert_array_equal(windows[0], [[1, 2], [6, 7]])
    np.testing.assert_array_equal(windows[1], [[3, 4], [8, 9]])
    np.testing.assert_array_equal(windows[2], [[5, 0], [10, 0]])
    np.testing.assert_array_equal(windows[5], [[15, 0], [0, 0]])
    np.testing.assert_array_equal(windows[6], [[16, 17], [21, 22]])


@pytest.mark.parametrize(("grid", "window_size"), [((4, 8), 4), ((5, 7), 4), ((3, 2), 1)])
def test_round_trip(grid: tuple[int, int], window_size: int) -> None:
    tokens = jax.random.normal(jax.random.key(0), (3, *grid, 2))
    windows = window_partition(tokens, window_size)
    rows, columns = (-(-side // window_size) for side in grid)
    assert windows.shape == (3 * rows * columns, window_size, window_size, 2)
    # Nothing but zeros was added.
    assert jnp.sum(windows != 0) == tokens.size
    np.testing.assert_array_equal(window_unpartition(windows, grid), tokens)


def test_gradient_of_a_round_trip_is_the_identity() -> None:
    tokens = jax.random.normal(jax.random.key(0), (1, 3, 5, 2))
    weights = jax.random.normal(jax.random.key(1), tokens.shape)

    def loss(tokens: jax.Array) -> jax.Array:
        return jnp.sum(weights * window_unpartition(window_partition(tokens, 4), (3, 5)))

    np.testing.assert_array_equal(jax.grad(loss)(tokens), weights)
