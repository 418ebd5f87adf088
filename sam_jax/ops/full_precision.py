"""Float32 where half precision would not do: sums over many numbers, factors, exact products.

A bfloat16 number has eight binary digits. A sum that is kept in one stands still when it is 256
times as large as what is added to it: 65,536 ones make 256. Processors sum inside a product in
float32, but a sum has the type that it is written in, and so has the one that differentiation
makes: whatever many places share, such as a bias, has the sum over these places as its gradient.
What is written with the functions below is summed in float32 and rounded once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sam_jax.arrays import Array, DimSize, Float
from sam_jax.ops import dispatch

# Precision of float32 products that need all digits, such as those of coordinates. By default a TPU
# rounds the operands to bfloat16, an NVIDIA GPU to TensorFloat-32 (10 bits of mantissa).
EXACT = jax.lax.Precision.HIGHEST


def broadcast_to(
    x: Float[Array, "..."], shape: tuple[DimSize, ...], dtype: DTypeLike
) -> Float[Array, "..."]:
    """``x`` at every place of a larger shape; its gradient is their sum, in float32."""
    return jnp.broadcast_to(x.astype(jnp.float32), shape).astype(dtype)


def add_shared(x: Float[Array, "*shape"], shared: Float[Array, "..."]) -> Float[Array, "*shape"]:
    """``x + shared`` in the type of ``x``, for what many places of ``x`` share."""
    return x + broadcast_to(shared, x.shape, x.dtype)


def add_bias(x: Float[Array, "*batch c"], bias: Float[Array, " c"]) -> Float[Array, "*batch c"]:
    """``add_shared`` of the bias of a dense layer, whose gradient is the operation ``sum_rows``."""
    return _add_bias(x, bias)


@jax.custom_vjp
def _add_bias(x, bias):
    return x + bias.astype(x.dtype)


def _add_bias_backward(bias, d_out):
    total = SUM_ROWS(d_out.reshape(-1, d_out.shape[-1]))
    return d_out, total.astype(bias.dtype)


_add_bias.defvjp(lambda x, bias: (_add_bias(x, bias), bias), _add_bias_backward)


def _sum_rows(rows: Float[Array, "n c"]) -> Float[Array, " c"]:
    return jnp.sum(rows, axis=0, dtype=jnp.float32)


def _product_with_ones(rows: Float[Array, "n c"]) -> Float[Array, " c"]:
    # With a single row of ones XLA would turn the product into a sum again.
    return product(jnp.ones((8, rows.shape[0]), rows.dtype), rows, (1, 0))[0]


def _row_examples(dtype: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    return [((jnp.asarray(np.random.default_rng(0).standard_normal((64, 8)), dtype),), {})]


# Of a sum the TPU's compiler makes a pass of its own over the gradient of a layer's output, by its
# count as long as the layer's product. A CPU takes ten times longer for the product.
SUM_ROWS = dispatch.Operation(
    "sum_rows",
    [
        dispatch.Form("product", _product_with_ones, platforms=("tpu",)),
        dispatch.Form("reference", _sum_rows),
    ],
    examples=_row_examples,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """A product in float32; ``contracted`` are the axes that are summed over.

    Its gradients are products of operands of the same type.
    """
    precisions = jax.lax.Precision
    return jax.lax.dot_general(
        a,
        b,
        (((contracted[0],), (contracted[1],)), ((), ())),
        # Always given, as JAX's configured default may be one that TPU kernels do not have.
        precision=precisions.HIGHEST if a.dtype == jnp.float32 else precisions.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _product_backward(contracted, operands, d_out):
    a, b = operands
    of_a, of_b = contracted
    d_out = d_out.astype(a.dtype)
    d_a = product(d_out, b, (1, 1 - of_b)) if of_a else product(b, d_out, (1 - of_b, 1))
    d_b = product(d_out, a, (0, 1 - of_a)) if of_b else product(a, d_out, (1 - of_a, 0))
    return d_a.astype(a.dtype), d_b.astype(b.dtype)


product.defvjp(lambda a, b, contracted: (product(a, b, contracted), (a, b)), _product_backward)


def multiply(
    x: Float[Array, "..."], factor: Float[Array | np.ndarray, "..."] | float
) -> Float[Array, "..."]:
    """``x * factor`` in the type of ``x``, for a factor that has more digits.

    1 / 0.9 as a bfloat16 number is 1.109: all that is enlarged by it would be too small.
    """
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
