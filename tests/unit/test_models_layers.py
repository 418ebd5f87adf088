"""Shared layers against closed forms."""

from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.models.layers import Dense, Mlp, gelu, layer_norm


def test_layer_norm_is_exact_far_from_zero() -> None:
    """E[x^2] - E[x]^2 would have no correct digit here."""
    x = np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32) + np.float32(5000)
    variables = {"params": {"scale": jnp.full(64, 2.0), "bias": jnp.full(64, 0.5)}}
    ours = layer_norm(1e-6, jnp.float32, "norm").apply(variables, jnp.asarray(x))
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = 2 * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) + 0.5
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-3)


def test_layer_norm_adds_epsilon_to_the_variance() -> None:
    variables = {"params": {"scale": jnp.ones(2), "bias": jnp.zeros(2)}}
    ours = layer_norm(3.0, jnp.float32, "norm").apply(variables, jnp.array([-1.0, 1.0]))
    np.testing.assert_allclose(ours, [-0.5, 0.5], rtol=1e-6)


def test_gelu_is_the_exact_one() -> None:
    """The tanh approximation differs by 1.5e-4 at 1, and by more at 2."""
    values = gelu(jnp.array([-1.0, 0.0, 1.0, 2.0]))
    np.testing.assert_allclose(values, [-0.15865525, 0.0, 0.84134475, 1.9544997], rtol=1e-6)


def test_mlp_by_hand() -> None:
    """The activation stands between the layers and not after the last."""
    eye = jnp.eye(2)
    params = {
        "dense_0": {"kernel": eye, "bias": jnp.array([0.0, 1.0])},
        "dense_1": {"kernel": -eye, "bias": jnp.array([1.0, 0.0])},
        "dense_2": {"kernel": jnp.array([[1.0], [2.0]]), "bias": jnp.array([-9.0])},
    }
    ours = Mlp((2, 2, 1), jax.nn.relu).apply({"params": params}, jnp.array([[-3.0, 4.0]]))
    # (-3, 5) -> (0, 5) -> (1, -5) -> (1, 0) -> 1 - 9
    np.testing.assert_array_equal(ours, [[-8.0]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_is_the_known_one(dtype: Any) -> None:
    """Parameters, values and gradients as linen's; the bias's is summed more exactly."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 7)).astype(dtype)
    ours, linen = Dense(4, dtype=dtype), flax.linen.Dense(4, dtype=dtype)
    variables = linen.init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(1), x)) == jax.tree.map(
        jnp.shape, variables
    )
    values, gradients = zip(
        *(
            jax.value_and_grad(
                lambda v, layer=layer: jnp.sum(jnp.sin(layer.apply(v, x).astype(jnp.float32)))
            )(variables)
            for layer in (ours, linen)
        ),
        strict=True,
    )
    np.testing.assert_array_equal(*values)
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    for o, e in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(o, e, rtol=0, atol=tolerance * np.abs(e).max())
