"""The mask decoder through TPU kernels, interpreted, against its plain form."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.models.mask_decoder import MaskDecoder, MaskDecoderConfig
from sam_jax.models.prompt_encoder import PromptEmbeddings
from sam_jax.ops.placement import Kernels

DIM, GRID = 256, (8, 32)
CONFIG = MaskDecoderConfig(depth=2, mlp_dim=32, dropout_rate=0.2, iou_head_dim=16)
# With the output tokens sixteen, of which objects lack some.
NUM_PROMPTS = 11


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((*shape, seed)).standard_normal(shape), jnp.float32)


VALID = jnp.asarray(np.random.default_rng(0).random((1, 2, NUM_PROMPTS)) < 0.6)


def prompts(sparse: jax.Array, cells: jax.Array) -> PromptEmbeddings:
    valid = VALID[:, :, : sparse.shape[2]]
    return PromptEmbeddings(sparse, valid, cells, normal(*GRID, DIM))


def inputs(num_prompts: int, num_grids: int) -> dict[str, jax.Array]:
    return {
        "sparse": normal(1, 2, num_prompts, DIM),
        "cells": normal(1, num_grids, *GRID, DIM, seed=1),
    }


# Each object with a mask; none with one, and an odd number of tokens.
INPUTS = [inputs(NUM_PROMPTS, 2), inputs(NUM_PROMPTS - 1, 1)]


@functools.cache
def params() -> Any:
    decoder = MaskDecoder(CONFIG, DIM)
    shapes = jax.eval_shape(
        lambda: decoder.init(
            jax.random.key(0),
            prompts(**INPUTS[0]),
            multimask_output=True,
        )
    )["params"]
    rng = np.random.default_rng(3)

    def weights(path: Any, leaf: Any) -> jax.Array:
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        fan_in = 1 if len(leaf.shape) < 2 else leaf.shape[0]
        offset = 1.0 if jax.tree_util.keystr(path).endswith("['scale']") else 0.0
        return jnp.asarray(offset + 0.5 * values * fan_in**-0.5)

    return jax.tree_util.tree_map_with_path(weights, shapes)


def run(kernels: Kernels, dtype: Any, multimask_output: bool, given: Any) -> Any:
    """Logits and predictions, and gradients of a sum of them by all that has one."""
    decoder = MaskDecoder(CONFIG, DIM, dtype, kernels)
    seeds = jnp.array([[3, 4]], jnp.uint32)

    def total(params: Any, inputs: Any) -> Any:
        out = decoder.apply(
            {"params": params},
            prompts(**inputs),
            multimask_output=multimask_output,
            dropout_seeds=seeds,
        )
        weights = normal(*out.low_res_logits.shape, seed=2)
        mean = jnp.vdot(weights, out.low_res_logits) / out.low_res_logits.size
        return mean + jnp.sum(jnp.square(out.iou_predictions)), out

    function = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, out), gradients = function(params(), given)
    return out, gradients


@pytest.mark.parametrize(
    ("dtype", "multimask_output", "given"),
    [
        (jnp.float32, False, INPUTS[0]),
        (jnp.float32, True, INPUTS[1]),
        (jnp.bfloat16, False, INPUTS[0]),
    ],
    ids=["masks", "no-masks", "bfloat16"],
)
def test_kernels_decode_as_the_plain_form_does(
    dtype: Any, multimask_output: bool, given: Any
) -> None:
    """Values and gradients, dropout and all, against float32's.

    In half precision a sum that is not summed in float32 is off by tens of percent.
    """
    out, gradients = run("interpreted", dtype, multimask_output, given)
    expected, expected_gradients = run("none", jnp.float32, multimask_output, given)
    is_half = dtype == jnp.bfloat16
    for name in ("low_res_logits", "iou_predictions"):
        ours, theirs = getattr(out, name), getattr(expected, name)
        limit = 0.02 if is_half else 1e-4
        assert np.abs(ours - theirs).max() <= limit * np.abs(theirs).max(), name
    ours, theirs = (jax.tree.leaves_with_path(x) for x in (gradients, expected_gradients))
    wrong = []
    # Biases of keys change nothing but through rounding.
    largest = max(float(jnp.linalg.norm(x)) for _, x in theirs)
    tolerance = 0.08 if is_half else 1e-4
    for (path, mine), (_, other) in zip(ours, theirs, strict=True):
        error = float(jnp.linalg.norm(mine - other))
        limit = tolerance * float(jnp.linalg.norm(other)) + 1e-5 * tolerance * largest
        if error > limit:
            wrong.append((jax.tree_util.keystr(path), error, float(jnp.linalg.norm(other))))
    assert not wrong
