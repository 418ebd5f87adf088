"""Attention between few and many: every order of its products gives the definition's values."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.ops.norm import NormWeights
from sam_jax.ops.token_attention import (
    AttentionWeights,
    folding_pays,
    image_to_token_attention,
    token_attention,
    token_to_image_attention,
)

DIM, HEADS = 16, 4


def definition(
    weights: AttentionWeights, queries: Any, keys: Any, values: Any, valid: Any, num_heads: int
) -> np.ndarray:
    """In float64, every projection applied to its input."""
    w = AttentionWeights(*(np.asarray(leaf, np.float64) for leaf in weights))

    def project(x: Any, kernel: Any, bias: Any) -> np.ndarray:
        return np.asarray(x, np.float64) @ kernel + bias

    q, k, v = (
        x.reshape(*x.shape[:3], num_heads, -1)
        for x in (
            project(queries, w.q_kernel, w.q_bias),
            project(keys, w.k_kernel, w.k_bias),
            project(values, w.v_kernel, w.v_bias),
        )
    )
    b, p = np.broadcast_shapes(q.shape[:2], k.shape[:2])
    q, k, v = (np.broadcast_to(x, (b, p, *x.shape[2:])) for x in (q, k, v))
    logits = np.einsum("bpsac,bptac->bpast", q, k) / np.sqrt(q.shape[-1])
    if valid is not None:
        logits = np.where(valid[:, :, None, None], logits, -np.inf)
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    heads = np.einsum("bpast,bptac->bpsac", probs, v)
    return project(heads.reshape(*heads.shape[:3], -1), w.out_kernel, w.out_bias)


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape).astype(np.float32))


def random_weights(rng: np.random.Generator, dim: int, inner: int) -> AttentionWeights:
    inward = [(dim, inner), (inner,)] * 3
    return AttentionWeights(*(normal(rng, *s) / 2 for s in (*inward, (inner, dim), (dim,))))


# (objects, tokens) on either side
@pytest.mark.parametrize(
    ("asking", "asked"),
    [
        ((3, 5), (3, 5)),  # among tokens
        ((3, 2), (3, 70)),  # to image tokens of their own
        ((30, 2), (1, 70)),  # to image tokens that they share
        ((3, 20), (3, 70)),  # too many to be few
        ((3, 70), (3, 2)),  # from image tokens of their own
        ((1, 70), (30, 2)),  # from shared image tokens
        ((3, 70), (3, 20)),
    ],
)
@pytest.mark.parametrize("implementation", ["ordered", "reference"])
def test_definition(asking: tuple[int, int], asked: tuple[int, int], implementation: str) -> None:
    rng = np.random.default_rng(0)
    queries, keys, values = (normal(rng, 2, *x, DIM) for x in (asking, asked, asked))
    weights = random_weights(rng, DIM, DIM // 2)
    objects = max(asking[0], asked[0])
    valid = rng.random((2, objects, asked[1])) < 0.7
    valid[..., 0] = True
    for keys_valid in (None, jnp.asarray(valid)):
        ours = jax.jit(
            functools.partial(token_attention, num_heads=HEADS, implementation=implementation)
        )(weights, queries, keys, values, keys_valid)
        expected = definition(weights, queries, keys, values, keys_valid, HEADS)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_attention_by_hand() -> None:
    """One head, identity projections: a softmax over the keys that are valid."""
    eye, zeros = jnp.eye(2), jnp.zeros(2)
    queries = jnp.array([[[[np.sqrt(2) * np.log(3), 0.0]]]], jnp.float32)
    keys = jnp.array([[[[1.0, 0.0], [0.0, 5.0], [7.0, 7.0]]]])
    values = jnp.array([[[[4.0, 0.0], [0.0, 8.0], [1e9, 1e9]]]])
    valid = jnp.array([[[True, True, False]]])
    weights = AttentionWeights(*[eye, zeros] * 4)
    ours = token_attention(weights, queries, keys, values, valid, num_heads=1)
    np.testing.assert_allclose(ours, [[[[3.0, 2.0]]]], rtol=1e-6)


@pytest.mark.parametrize(
    ("tokens_axis", "image_axis"), [(2, 2), (2, 1), (1, 2)], ids=["own", "image", "tokens"]
)
@pytest.mark.parametrize("implementation", ["kernel", "ordered", "reference"])
def test_tokens_and_image_tokens_by_definition(
    implementation: str, tokens_axis: int, image_axis: int
) -> None:
    """Both directions; an odd number of tokens, some of them invalid, what is shared not copied."""
    rng = np.random.default_rng(1)
    dim, num_heads = 128, 8
    tokens, image_tokens = (
        normal(rng, 1, tokens_axis, 5, dim),
        normal(rng, 1, image_axis, 128, dim),
    )
    image_pe, weights = normal(rng, 128, dim), random_weights(rng, dim, dim // 2)
    weights = AttentionWeights(*(0.3 * x for x in weights))
    valid = jnp.array([[[True, True, True, False, True]]])
    keys = np.asarray(image_tokens, np.float64) + image_pe

    attended, same = jax.jit(
        functools.partial(
            token_to_image_attention, num_heads=num_heads, implementation=implementation
        )
    )(weights, tokens, image_tokens, image_pe)
    expected = definition(weights, tokens, keys, image_tokens, None, num_heads)
    np.testing.assert_allclose(attended, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(same, jnp.broadcast_to(image_tokens, same.shape))

    norm = NormWeights(normal(rng, dim), normal(rng, dim))
    run = functools.partial(
        image_to_token_attention,
        num_heads=num_heads,
        dropout_rate=0.1,
        norm_epsilon=1e-5,
        implementation=implementation,
    )
    tokens_valid = jnp.broadcast_to(valid, tokens.shape[:3])
    ours = jax.jit(run)(weights, norm, image_tokens, image_pe, tokens, tokens, tokens_valid)
    summed = definition(weights, keys, tokens, tokens, valid, num_heads)
    summed += np.asarray(image_tokens, np.float64)
    centred = summed - summed.mean(axis=-1, keepdims=True)
    centred /= np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-5)
    expected = centred * np.asarray(norm.scale) + np.asarray(norm.shift)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("implementation", ["kernel", "ordered"])
def test_shared_image_tokens_get_the_gradients_of_all_objects(implementation: str) -> None:
    """The same, whether they come back once or as a copy for each object."""
    rng = np.random.default_rng(2)
    dim = 128
    tokens, image_tokens = normal(rng, 2, 3, 5, dim), normal(rng, 2, 1, 128, dim)
    weights = AttentionWeights(*(0.3 * x for x in random_weights(rng, dim, dim // 2)))
    image_pe = normal(rng, 128, dim)

    def gradients(implementation: str) -> Any:
        def total(weights: Any, tokens: Any, image_tokens: Any) -> Any:
            attended, same = token_to_image_attention(
                weights, tokens, image_tokens, image_pe, num_heads=8, implementation=implementation
            )
            return jnp.sum(jnp.sin(attended)) + jnp.sum(jnp.sin(same).mean(axis=1))

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(weights, tokens, image_tokens)

    expected = gradients("reference")
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for ours, theirs in zip(
        jax.tree.leaves(gradients(implementation)), jax.tree.leaves(expected), strict=True
    ):
        # The gradient of the keys' bias is nothing but rounding.
        limit = 2e-5 * max(float(jnp.abs(theirs).max()), 0.05 * largest)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit)


def test_folding_pays_for_few() -> None:
    """At the published widths: a click's seven tokens, not twenty, and not where all share."""
    assert folding_pays(7, 4096, 256, 128, 8)
    assert not folding_pays(20, 4096, 256, 128, 8)
    assert not folding_pays(7, 4096, 256, 128, 8, num_sharing=64)
    assert not folding_pays(7, 7, 256, 256, 8)
