"""Convolutions whose stride is not their kernel, as functions of their weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.arrays import Array, Float
from sam_jax.ops import dispatch
from sam_jax.ops.full_precision import add_bias


def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k c d"],
    bias: Float[Array, " d"],
    stride: int = 1,
) -> Float[Array, "b oh ow d"]:
    """A convolution in the type of ``x``, zero-padded by half its kernel, which has an odd side."""
    return add_bias(_convolve(x, kernel, stride, groups=1), bias)


def depthwise_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "3 3 1 c"],
    bias: Float[Array, " c"],
    stride: int = 1,
    *,
    implementation: str = dispatch.AUTO,
) -> Float[Array, "b oh ow c"]:
    """A 3 x 3 convolution of each channel by itself, zero-padded by one pixel.

    - ``reference``: a convolution with as many groups as channels.
    - ``shifted``: nine products of the image, shifted, added up in float32. A CPU has no fast
      convolution with groups.
    """
    out = DEPTHWISE_CONV(x, kernel, stride=stride, implementation=implementation)
    return add_bias(out, bias)


def _convolve(x, kernel, stride, *, groups):
    half = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        ((half, half), (half, half)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _grouped(x, kernel, *, stride):
    return _convolve(x, kernel, stride, groups=x.shape[-1])


def _shifted(x, kernel, *, stride):
    _, height, width, _ = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    # In float32 from here on, so that the gradient, too, is summed in it and rounded once.
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0)))
    # Rounded like the factors of a convolution.
    factors = kernel.astype(x.dtype).astype(jnp.float32)[:, :, 0]
    total = jnp.zeros((), jnp.float32)
    for i in range(3):
        for j in range(3):
            part = padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
            total += part * factors[i, j]
    return total.astype(x.dtype)


def _examples(dtype: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 1, 8)), dtype)
    return [
        ((jnp.asarray(rng.standard_normal((2, height, width, 8)), dtype), kernel), {"stride": s})
        for height, width, s in ((6, 9, 1), (6, 8, 2), (5, 7, 2))
    ]


DEPTHWISE_CONV = dispatch.Operation(
    "depthwise_conv",
    [
        dispatch.Form("shifted", _shifted, platforms=("cpu",)),
        dispatch.Form("reference", _grouped),
    ],
    examples=_examples,
)
