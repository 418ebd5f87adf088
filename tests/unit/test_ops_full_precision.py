"""Sums, factors and products that half precision would spoil."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.ops.dispatch import Target, tracing_for
from sam_jax.ops.full_precision import add_bias, add_shared, broadcast_to, multiply

MANY = 2**16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("add", "shape"),
    [
        (add_bias, (3,)),
        (add_shared, (3,)),
        (add_shared, (1, 3)),
        (lambda x, shared: x + broadcast_to(shared, x.shape, x.dtype), (1, 3)),
    ],
)
def test_gradient_of_what_is_shared_is_a_full_sum(
    add: Callable[..., Any], shape: tuple[int, ...], dtype: Any
) -> None:
    """65,536 ones are 65,536, of which a sum in bfloat16 has 256."""
    x, shared = jnp.zeros((MANY, 3), dtype), jnp.arange(3.0).reshape(shape)
    out, pull = jax.vjp(add, x, shared)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out[7], [0, 1, 2])
    d_x, d_shared = pull(jnp.ones_like(out))
    np.testing.assert_array_equal(d_x, 1)
    assert d_shared.dtype == jnp.float32
    np.testing.assert_array_equal(d_shared, np.full(shape, MANY))


def test_shared_numbers_may_be_halves_themselves() -> None:
    """Their gradient is rounded once, when it is complete."""
    x, shared = jnp.zeros((4, 1000, 3), jnp.bfloat16), jnp.ones((4, 1, 3), jnp.bfloat16)
    (gradient,) = jax.grad(lambda s: jnp.sum(add_shared(x, s).astype(jnp.float32)), (0,))(shared)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient.astype(jnp.float32), 1000)


def test_a_tpu_takes_the_gradient_of_a_bias_as_a_product() -> None:
    def gradient(x: Any, bias: Any) -> Any:
        return jax.vjp(add_bias, x, bias)[1](x)[1]

    for platform, primitive in (("tpu", "dot_general"), ("gpu", "reduce"), ("cpu", "reduce")):
        with tracing_for(Target(platform)):
            text = jax.jit(gradient).lower(jnp.zeros((64, 8), jnp.bfloat16), jnp.zeros(8)).as_text()
        assert [name for name in ("dot_general", "reduce") if f"stablehlo.{name}" in text] == [
            primitive
        ]


def test_a_factor_keeps_its_digits() -> None:
    """1.109 in place of 1 / 0.9 would make the mean of what is enlarged a thousandth too small."""
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, 4096), jnp.bfloat16)
    wide = x.astype(jnp.float32)
    ours = multiply(x, 1 / 0.9)
    assert ours.dtype == jnp.bfloat16
    ratio = jnp.sum(ours, dtype=jnp.float32) / jnp.sum(wide)
    assert ratio == pytest.approx(1 / 0.9, rel=2e-4)
    gradient = jax.grad(lambda x: jnp.sum(multiply(x, 1 / 0.9).astype(jnp.float32)))(x)
    np.testing.assert_array_equal(gradient, jnp.full(4096, 1 / 0.9, jnp.bfloat16))
