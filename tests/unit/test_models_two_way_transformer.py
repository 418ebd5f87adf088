"""The two-way transformer: what is shared, what is invalid, what is random."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.models.two_way_transformer import AttentionParams, TwoWayTransformer
from tests.golden.tiny import TINY, random_variables

DIM = TINY.image_encoder.output_dim
DECODER = TINY.mask_decoder
PARAMS = random_variables(TINY)["params"]["mask_decoder"]["transformer"]
NUM_IMAGE_TOKENS = 6 * 4


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape).astype(np.float32))


def transformer(dropout_rate: float = 0.0) -> TwoWayTransformer:
    # One layer and the last look: every kind of attention there is.
    return TwoWayTransformer(1, DECODER.num_heads, DECODER.mlp_dim, dropout_rate=dropout_rate)


@jax.jit
def run(tokens: jax.Array, image_tokens: jax.Array, tokens_valid: jax.Array) -> Any:
    return transformer().apply(
        {"params": PARAMS}, tokens, image_tokens, normal(NUM_IMAGE_TOKENS, DIM), tokens_valid
    )


def test_attention_starts_as_a_kernel_on_positions() -> None:
    """Queries and keys are projected alike at first, values otherwise."""
    init = jax.jit(AttentionParams(2).init, static_argnums=1)
    params = init(jax.random.key(0), DIM)["params"]
    kernels = {name: np.asarray(params[name]["kernel"]) for name in ("q_proj", "k_proj", "v_proj")}
    np.testing.assert_array_equal(kernels["q_proj"], kernels["k_proj"])
    assert np.abs(kernels["q_proj"] - kernels["v_proj"]).max() > 0.1
    # Of order one over the root of the inputs
    np.testing.assert_allclose(kernels["q_proj"].std(), DIM**-0.5, rtol=0.2)


def test_invalid_tokens_are_attended_to_by_nothing() -> None:
    tokens, image_tokens = normal(2, 3, 7, DIM), normal(2, 1, NUM_IMAGE_TOKENS, DIM)
    valid = np.ones((2, 3, 7), bool)
    valid[0, 1, 5:] = valid[1, 2, 2] = False
    ours = run(tokens, image_tokens, jnp.asarray(valid))
    garbage = jnp.where(valid[..., None], tokens, 1e4)
    other = run(garbage, image_tokens, jnp.asarray(valid))
    np.testing.assert_array_equal(ours[0][valid], other[0][valid])
    np.testing.assert_array_equal(ours[1], other[1])
    # They would matter if they were valid.
    everything = run(tokens, image_tokens, jnp.ones((2, 3, 7), bool))
    assert np.abs(everything[1][0, 1] - ours[1][0, 1]).max() > 1e-2


@pytest.mark.parametrize(("tokens_axis", "image_axis"), [(3, 1), (1, 3)])
def test_what_objects_share_equals_copies(tokens_axis: int, image_axis: int) -> None:
    """Image tokens are shared where there is no mask, output tokens where there is nothing else."""
    tokens, image_tokens = (
        normal(2, tokens_axis, 7, DIM),
        normal(2, image_axis, NUM_IMAGE_TOKENS, DIM),
    )
    ours = run(tokens, image_tokens, jnp.ones((2, tokens_axis, 7), bool))
    copies = run(
        jnp.tile(tokens, (1, 3 // tokens_axis, 1, 1)),
        jnp.tile(image_tokens, (1, 3 // image_axis, 1, 1)),
        jnp.ones((2, 3, 7), bool),
    )
    for part, expected in zip(ours, copies, strict=True):
        np.testing.assert_allclose(part, expected, atol=1e-5)


def test_dropout_acts_in_training_alone() -> None:
    tokens, image_tokens, valid = (
        normal(2, 3, 7, DIM),
        normal(2, 1, NUM_IMAGE_TOKENS, DIM),
        jnp.ones((2, 3, 7), bool),
    )
    apply = functools.partial(
        transformer(0.5).apply,
        {"params": PARAMS},
        tokens,
        image_tokens,
        normal(NUM_IMAGE_TOKENS, DIM),
        valid,
    )
    drop = jax.jit(lambda seeds: apply(dropout_seeds=seeds))
    seeds = jnp.arange(6, dtype=jnp.uint32).reshape(2, 3)
    one, other = drop(seeds), drop(seeds.at[1, 2].set(7))
    plain = run(tokens, image_tokens, valid)
    for index in range(2):
        assert np.abs(one[index] - plain[index]).max() > 0.1
        # A seed is one object's.
        assert np.abs(one[index][1, 2] - other[index][1, 2]).max() > 0.1
        np.testing.assert_array_equal(one[index][0], other[index][0])
