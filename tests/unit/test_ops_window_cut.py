"""Kernels that cut windows against a LayerNorm and a cut, each by itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.ops.window_cut_kernel import join_and_norm, norm_and_cut, supports
from sam_jax.ops.windows import window_partition, window_unpartition

EPSILON = 1e-6
# Rows and columns that windows fill, that they do not, and several images.
SHAPES = [((1, 64, 64, 128), 14), ((2, 16, 16, 128), 8), ((2, 5, 32, 256), 6)]


def normalised(tokens: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    x = tokens.astype(jnp.float32)
    x -= jnp.mean(x, axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)
    return (x * scale + shift).astype(tokens.dtype)


def assert_alike(ours: Any, plain: Any, inputs: tuple[jax.Array, ...], tolerance: float) -> None:
    """Values, and gradients of a weighted sum of them; the largest of each array is the unit."""
    weights = [
        jax.random.normal(jax.random.key(7), out.shape) for out in jax.eval_shape(plain, *inputs)
    ]

    def run(function: Any) -> Any:
        def total(*inputs: jax.Array) -> tuple[jax.Array, Any]:
            outputs = function(*inputs)
            pairs = zip(weights, outputs, strict=True)
            return sum(jnp.sum(w * out.astype(jnp.float32)) for w, out in pairs), outputs

        return jax.jit(jax.grad(total, argnums=tuple(range(len(inputs))), has_aux=True))(*inputs)

    for o, e in zip(jax.tree.leaves(run(ours)), jax.tree.leaves(run(plain)), strict=True):
        o, e = (np.asarray(x, np.float32) for x in (o, e))
        np.testing.assert_allclose(o, e, rtol=0, atol=tolerance * np.abs(e).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_norm_and_cut(shape: tuple[int, ...], size: int, dtype: Any) -> None:
    assert supports((shape[1], shape[2]), size, shape[3])
    keys = jax.random.split(jax.random.key(0), 3)
    tokens = (3 + jax.random.normal(keys[0], shape)).astype(dtype)
    norm = [jax.random.normal(key, shape[-1:]) for key in keys[1:]]

    def plain(tokens: jax.Array, scale: jax.Array, shift: jax.Array) -> Any:
        return window_partition(normalised(tokens, scale, shift), size), tokens

    def ours(tokens: jax.Array, scale: jax.Array, shift: jax.Array) -> Any:
        return norm_and_cut(tokens, scale, shift, size, epsilon=EPSILON, interpret=True)

    # The plain gradient rounds each branch before it adds them.
    assert_alike(ours, plain, (tokens, *norm), 2e-6 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_join_and_norm(shape: tuple[int, ...], size: int, dtype: Any) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = jax.random.normal(keys[0], shape).astype(dtype)
    windows = window_partition(jax.random.normal(keys[1], shape), size).astype(dtype)
    # What windows say of the padding is left out.
    windows = jnp.where(windows == 0, 5.0, windows)
    norm = [jax.random.normal(key, shape[-1:]) for key in keys[2:]]

    def plain(tokens: jax.Array, windows: jax.Array, scale: jax.Array, shift: jax.Array) -> Any:
        tokens = tokens + window_unpartition(windows, (shape[1], shape[2]))
        return tokens, normalised(tokens, scale, shift)

    def ours(tokens: jax.Array, windows: jax.Array, scale: jax.Array, shift: jax.Array) -> Any:
        return join_and_norm(tokens, windows, scale, shift, epsilon=EPSILON, interpret=True)

    tolerance = 2e-6 if dtype == jnp.float32 else 1e-2
    assert_alike(ours, plain, (tokens, windows, *norm), tolerance)


@pytest.mark.parametrize(
    ("grid", "size", "dim"), [((64, 64), 7, 128), ((64, 64), 14, 96), ((64, 56), 14, 128)]
)
def test_what_kernels_do_not_take(grid: tuple[int, int], size: int, dim: int) -> None:
    assert not supports(grid, size, dim)
