"""Float32 products on processors that round what they multiply unless they are told not to.

The other tests are told to take the highest precision by default, which hides who does not ask.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.models.layers import Mlp
from sam_jax.ops.attention import grid_attention
from sam_jax.ops.dispatch import Target, tracing_for
from sam_jax.ops.mask_statistics import mask_statistics
from sam_jax.ops.packed_masks import MaskLayout
from sam_jax.ops.positional import fourier_features, grid_fourier_features, resize_table
from sam_jax.ops.resize import resize_bilinear, resize_positions
from tests.unit.jaxprs import inexact_products, on_one_pass

DIM = 32
RANDOM = np.random.default_rng(0).standard_normal((2, DIM // 2))
FREQUENCIES = jnp.asarray(RANDOM.astype(np.float32))
# Enough image tokens for a kernel.
MASK_LAYOUT = MaskLayout((8, 16), 4)


def ones(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.ones(shape, dtype)


def attend(qkv: Any, table_h: Any, table_w: Any) -> Any:
    qkv = qkv.astype(jnp.bfloat16)
    return grid_attention(qkv, table_h, table_w, 2, implementation="extended")


def statistics(logits: Any) -> Any:
    masks = jnp.zeros((1, 2, 16, 128), jnp.int32)
    found = mask_statistics(logits, masks, masks[:, 0], MASK_LAYOUT, alpha=0.25, gamma=2.0)
    return found.focal_sum, found.soft_intersection


def quality(x: Any) -> Any:
    mlp = Mlp((8, 4), jax.nn.relu, jnp.bfloat16, exact_output=True)
    params = {
        "dense_0": {"kernel": ones(16, 8), "bias": ones(8)},
        "dense_1": {"kernel": ones(8, 4), "bias": ones(4)},
    }
    return mlp.apply({"params": params}, x)


OPERATIONS: dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]] = {
    "coordinates": (fourier_features, (ones(5, 2), FREQUENCIES)),
    "attention": (attend, (ones(1, 4, 6, 24), ones(7, 4), ones(11, 4))),
    "table": (lambda table: resize_table(table, 9), (ones(9, 4),)),
    "positions": (lambda table: resize_positions(table, (6, 10)), (ones(4, 5, 3),)),
    "masks": (lambda maps: resize_bilinear(maps, (24, 20)), (ones(2, 12, 12),)),
    "losses": (statistics, (ones(1, 2, 3, 32, 64),)),
    "quality": (quality, (ones(3, 16),)),
}


@pytest.mark.parametrize(
    "target",
    [Target("tpu", kernels="none"), Target("tpu", described=True)],
    ids=["plain", "kernels"],
)
@pytest.mark.parametrize(("operation", "inputs"), OPERATIONS.values(), ids=OPERATIONS)
def test_products_of_full_numbers_say_so_to_a_tpu(
    operation: Callable[..., Any], inputs: tuple[jax.Array, ...], target: Target
) -> None:
    """Forward and backward, in the program that a TPU's compiler gets, and inside of kernels."""

    def forward_and_backward(*inputs: Any) -> Any:
        out, pull = jax.vjp(operation, *inputs)
        return out, pull(out)

    with jax.default_matmul_precision("default"), tracing_for(target):
        traced = jax.jit(forward_and_backward).trace(*inputs)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert not inexact_products(traced.jaxpr.jaxpr)
    products = re.findall(r"stablehlo\.dot_general .*", text)
    full = [line for line in products if line.count("xf32>") >= 2 and "bf16" not in line]
    assert full or "tpu_custom_call" in text
    for line in full:
        assert "precision = [HIGHEST, HIGHEST]" in line


def features_of_columns(precision: str | None) -> tuple[Any, np.ndarray]:
    """Features of the centres of 1,024 columns, and what a TPU makes of them."""
    columns = (jnp.arange(1024, dtype=jnp.float32) + 0.5) / 1024
    coords = jnp.stack([columns, jnp.full(1024, 0.5)], axis=-1)
    with jax.default_matmul_precision("default"):
        if precision is None:
            traced = jax.make_jaxpr(fourier_features)(coords, FREQUENCIES)
        else:
            traced = jax.make_jaxpr(lambda c, f: (2 * c - 1) @ f)(coords, FREQUENCIES)
    (found,) = on_one_pass(traced, coords, FREQUENCIES)
    return fourier_features(coords, FREQUENCIES), np.asarray(found)


def test_all_columns_stay_distinct_where_products_are_rounded() -> None:
    exact, found = features_of_columns(None)
    np.testing.assert_array_equal(found, exact)
    assert len(np.unique(found, axis=0)) == 1024
    # A product that does not ask loses a third of them, so the test would tell.
    _, rounded = features_of_columns("default")
    assert len(np.unique(rounded, axis=0)) < 700


def test_clicks_at_the_centres_of_tokens_get_the_grids_encoding() -> None:
    with jax.default_matmul_precision("default"):
        columns = (np.arange(64, dtype=np.float32) + 0.5) / 64
        coords = jnp.stack(jnp.meshgrid(columns, columns), axis=-1)
        traced = jax.make_jaxpr(fourier_features)(coords, FREQUENCIES)
    (clicks,) = on_one_pass(traced, coords, FREQUENCIES)
    grid = grid_fourier_features((64, 64), FREQUENCIES)
    np.testing.assert_allclose(clicks, grid, atol=2e-5)
