"""The two-way transformer: what is shared, what is invalid, what is random."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.models.token_attention import Attention
from sam_jax.models.two_way_transformer import TwoWayTransformer
from tests.golden.tiny import TINY, random_variables

DIM = TINY.image_encoder.output_dim
DECODER = TINY.mask_decoder
PARAMS = random_variables(TINY)["params"]["mask_decoder"]["transformer"]
GRID_CELLS = 6 * 4


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), jnp.float32)


def transformer(dropout_rate: float = 0.0) -> TwoWayTransformer:
    # One layer and the last look: every kind of attention there is.
    return TwoWayTransformer(1, DECODER.num_heads, DECODER.mlp_dim, dropout_rate=dropout_rate)


@jax.jit
def run(tokens: jax.Array, cells: jax.Array, tokens_valid: jax.Array) -> Any:
    return transformer().apply(
        {"params": PARAMS}, tokens, cells, normal(GRID_CELLS, DIM), tokens_valid
    )


def test_attention_by_hand() -> None:
    """One head, identity projections: a softmax over the keys that are valid."""
    eye = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
    params = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), eye)
    queries = jnp.array([[[[np.sqrt(2) * np.log(3), 0.0]]]], jnp.float32)
    keys = jnp.array([[[[1.0, 0.0], [0.0, 5.0], [7.0, 7.0]]]])
    values = jnp.array([[[[4.0, 0.0], [0.0, 8.0], [1e9, 1e9]]]])
    valid = jnp.array([[[True, True, False]]])
    ours = Attention(1).apply({"params": params}, queries, keys, values, valid)
    np.testing.assert_allclose(ours, [[[[3.0, 2.0]]]], rtol=1e-6)


def test_attention_starts_as_a_kernel_on_positions() -> None:
    """Queries and keys are projected alike at first, values otherwise."""
    tokens = normal(1, 1, 3, DIM)
    params = jax.jit(Attention(4, 2).init)(jax.random.key(0), tokens, tokens, tokens)["params"]
    kernels = {name: np.asarray(params[name]["kernel"]) for name in ("q_proj", "k_proj", "v_proj")}
    np.testing.assert_array_equal(kernels["q_proj"], kernels["k_proj"])
    assert np.abs(kernels["q_proj"] - kernels["v_proj"]).max() > 0.1
    # Of order one over the root of the inputs
    np.testing.assert_allclose(kernels["q_proj"].std(), DIM**-0.5, rtol=0.2)


def test_invalid_tokens_are_attended_to_by_nothing() -> None:
    tokens, cells = normal(2, 3, 7, DIM), normal(2, 1, GRID_CELLS, DIM)
    valid = np.ones((2, 3, 7), bool)
    valid[0, 1, 5:] = valid[1, 2, 2] = False
    ours = run(tokens, cells, jnp.asarray(valid))
    garbage = jnp.where(valid[..., None], tokens, 1e4)
    other = run(garbage, cells, jnp.asarray(valid))
    np.testing.assert_array_equal(ours[0][valid], other[0][valid])
    np.testing.assert_array_equal(ours[1], other[1])
    # They would matter if they were valid.
    everything = run(tokens, cells, jnp.ones((2, 3, 7), bool))
    assert np.abs(everything[1][0, 1] - ours[1][0, 1]).max() > 1e-2


@pytest.mark.parametrize(("tokens_axis", "cells_axis"), [(3, 1), (1, 3)])
def test_what_objects_share_equals_copies(tokens_axis: int, cells_axis: int) -> None:
    """Cells are shared where there is no mask, output tokens where there is nothing else."""
    tokens, cells = normal(2, tokens_axis, 7, DIM), normal(2, cells_axis, GRID_CELLS, DIM)
    ours = run(tokens, cells, jnp.ones((2, tokens_axis, 7), bool))
    copies = run(
        jnp.tile(tokens, (1, 3 // tokens_axis, 1, 1)),
        jnp.tile(cells, (1, 3 // cells_axis, 1, 1)),
        jnp.ones((2, 3, 7), bool),
    )
    for part, expected in zip(ours, copies, strict=True):
        np.testing.assert_allclose(part, expected, atol=1e-5)


def test_dropout_acts_in_training_alone() -> None:
    tokens, cells, valid = (
        normal(2, 3, 7, DIM),
        normal(2, 1, GRID_CELLS, DIM),
        jnp.ones((2, 3, 7), bool),
    )
    apply = functools.partial(
        transformer(0.5).apply, {"params": PARAMS}, tokens, cells, normal(GRID_CELLS, DIM), valid
    )
    drop = jax.jit(lambda seeds: apply(dropout_seeds=seeds))
    seeds = jnp.arange(6, dtype=jnp.uint32).reshape(2, 3)
    one, other = drop(seeds), drop(seeds.at[1, 2].set(7))
    plain = run(tokens, cells, valid)
    for index in range(2):
        assert np.abs(one[index] - plain[index]).max() > 0.1
        # A seed is one object's.
        assert np.abs(one[index][1, 2] - other[index][1, 2]).max() > 0.1
        np.testing.assert_array_equal(one[index][0], other[index][0])
