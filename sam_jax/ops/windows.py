"""Windows of a grid of tokens, as a vision transformer attends in them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sam_jax.arrays import Array, Float, GridShape
from sam_jax.ops import dispatch
from sam_jax.ops.norm import NormWeights, layer_norm
from sam_jax.ops.tpu import window_partition as kernel


def window_partition(
    tokens: Float[Array, "b gh gw d"], window_size: int
) -> Float[Array, "bw {window_size} {window_size} d"]:
    """Windows of the grid, zero-padded at the bottom and right to whole windows.

    Windows of one image are consecutive and in row-major order. The padding takes part in the
    attention, as in the published model: masking it instead moves the outputs by several percent.
    """
    _, gh, gw, _ = tokens.shape
    pad_h, pad_w = -gh % window_size, -gw % window_size
    tokens = jnp.pad(tokens, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)))
    return rearrange(
        tokens, "b (nh sh) (nw sw) d -> (b nh nw) sh sw d", sh=window_size, sw=window_size
    )


def window_unpartition(
    windows: Float[Array, "bw s s d"], grid: GridShape
) -> Float[Array, "b gh gw d"]:
    """The grid of ``window_partition`` again, without its padding."""
    gh, gw = grid
    size = windows.shape[1]
    tokens = rearrange(
        windows,
        "(b nh nw) sh sw d -> b (nh sh) (nw sw) d",
        nh=-(-gh // size),
        nw=-(-gw // size),
    )
    return tokens[:, :gh, :gw]


def norm_partition(
    tokens: Float[Array, "b gh gw d"],
    norm: NormWeights,
    window_size: int,
    *,
    epsilon: float,
    implementation: str = dispatch.AUTO,
) -> tuple[Float[Array, "n sh sw d"], Float[Array, "b gh gw d"]]:
    """Windows of the LayerNorm of tokens, or all of it if ``window_size`` is 0; and the tokens.

    What follows should use the tokens that are returned: a kernel then adds up the gradients of
    both uses.
    """
    if not window_size:
        return layer_norm(tokens, norm, epsilon), tokens
    return NORM_PARTITION(
        tokens, norm, window_size=window_size, epsilon=epsilon, implementation=implementation
    )


def unpartition_add_norm(
    tokens: Float[Array, "b gh gw d"],
    branch: Float[Array, "n sh sw d"],
    norm: NormWeights,
    window_size: int,
    *,
    epsilon: float,
    implementation: str = dispatch.AUTO,
) -> tuple[Float[Array, "b gh gw d"], Float[Array, "b gh gw d"]]:
    """Tokens plus a branch in windows, or on the grid for size 0; and the LayerNorm of the sum."""
    if not window_size:
        tokens = tokens + branch
        return tokens, layer_norm(tokens, norm, epsilon)
    return UNPARTITION_ADD_NORM(
        tokens, branch, norm, epsilon=epsilon, implementation=implementation
    )


def _norm_partition(tokens, norm, *, window_size, epsilon):
    return window_partition(layer_norm(tokens, norm, epsilon), window_size), tokens


def _unpartition_add_norm(tokens, windows, norm, *, epsilon):
    tokens = tokens + window_unpartition(windows, tokens.shape[1:3])
    return tokens, layer_norm(tokens, norm, epsilon)


def _norm_partition_on_tpu(tokens, norm, *, window_size, epsilon, interpret):
    return kernel.norm_partition(
        tokens, norm.scale, norm.shift, window_size, epsilon=epsilon, interpret=interpret
    )


def _unpartition_add_norm_on_tpu(tokens, windows, norm, *, epsilon, interpret):
    return kernel.unpartition_add_norm(
        tokens, windows, norm.scale, norm.shift, epsilon=epsilon, interpret=interpret
    )


def _kernel_supports(tokens: Array, window_size: int) -> bool:
    _, gh, gw, dim = tokens.shape
    return kernel.supports((gh, gw), window_size, dim)


def _examples(dtype: Any) -> tuple[Array, Array, NormWeights]:
    """Tokens on a grid that its windows do not divide, windows of it, and a norm."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    tokens, windows = normal(2, 9, 16, 128), normal(2 * 3 * 4, 4, 4, 128)
    return tokens, windows, NormWeights(1 + 0.1 * normal(128), 0.1 * normal(128))


def _norm_partition_examples(dtype: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    tokens, _, norm = _examples(dtype)
    return [((tokens, norm), {"window_size": 4, "epsilon": 1e-6})]


def _unpartition_add_norm_examples(dtype: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    return [(_examples(dtype), {"epsilon": 1e-6})]


NORM_PARTITION = dispatch.Operation(
    "norm_partition",
    [
        dispatch.Form(
            "kernel",
            _norm_partition_on_tpu,
            supports=lambda tokens, norm, *, window_size, **_: _kernel_supports(
                tokens, window_size
            ),
            is_kernel=True,
        ),
        dispatch.Form("reference", _norm_partition),
    ],
    examples=_norm_partition_examples,
)
UNPARTITION_ADD_NORM = dispatch.Operation(
    "unpartition_add_norm",
    [
        dispatch.Form(
            "kernel",
            _unpartition_add_norm_on_tpu,
            supports=lambda tokens, windows, *_, **__: _kernel_supports(tokens, windows.shape[1]),
            is_kernel=True,
        ),
        dispatch.Form("reference", _unpartition_add_norm),
    ],
    examples=_unpartition_add_norm_examples,
)
