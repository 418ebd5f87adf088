"""Attention between few and many: every order of its products gives the definition's values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.models.token_attention import Attention, folding_pays

DIM, HEADS = 16, 4


def definition(params: Any, queries: Any, keys: Any, values: Any, valid: Any) -> np.ndarray:
    """In float64, every projection applied to its input."""

    def project(name: str, x: Any) -> np.ndarray:
        p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[name])
        return np.asarray(x, np.float64) @ p["kernel"] + p["bias"]

    q, k, v = (
        project(name, x).reshape(*x.shape[:3], HEADS, -1)
        for name, x in (("q_proj", queries), ("k_proj", keys), ("v_proj", values))
    )
    b, p = np.broadcast_shapes(q.shape[:2], k.shape[:2])
    q, k, v = (np.broadcast_to(x, (b, p, *x.shape[2:])) for x in (q, k, v))
    logits = np.einsum("bpsac,bptac->bpast", q, k) / np.sqrt(q.shape[-1])
    if valid is not None:
        logits = np.where(valid[:, :, None, None], logits, -np.inf)
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    heads = np.einsum("bpast,bptac->bpsac", probs, v)
    return project("out_proj", heads.reshape(*heads.shape[:3], -1))


# (objects, tokens) on either side
@pytest.mark.parametrize(
    ("asking", "asked"),
    [
        ((3, 5), (3, 5)),  # among tokens
        ((3, 2), (3, 70)),  # to cells of their own
        ((30, 2), (1, 70)),  # to cells that they share
        ((3, 20), (3, 70)),  # too many to be few
        ((3, 70), (3, 2)),  # from cells of their own
        ((1, 70), (30, 2)),  # from shared cells
        ((3, 70), (3, 20)),
    ],
)
def test_definition(asking: tuple[int, int], asked: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    queries, keys, values = normal(2, *asking, DIM), normal(2, *asked, DIM), normal(2, *asked, DIM)
    module = Attention(HEADS, 2)
    shapes = jax.eval_shape(module.init, jax.random.key(0), queries, keys, values)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape) / 2, shapes["params"])
    objects = max(asking[0], asked[0])
    valid = rng.random((2, objects, asked[1])) < 0.7
    valid[..., 0] = True
    for keys_valid in (None, jnp.asarray(valid)):
        ours = jax.jit(module.apply)({"params": params}, queries, keys, values, keys_valid)
        expected = definition(params, queries, keys, values, keys_valid)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_folding_pays_for_few() -> None:
    """At the published widths: a click's seven tokens, not twenty, and not where all share."""
    assert folding_pays(7, 4096, 256, 128, 8)
    assert not folding_pays(20, 4096, 256, 128, 8)
    assert not folding_pays(7, 4096, 256, 128, 8, num_sharing=64)
    assert not folding_pays(7, 7, 256, 256, 8)
