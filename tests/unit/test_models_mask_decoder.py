"""The mask decoder: which candidates, where sub-pixels go, which parameters exist."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.models.mask_decoder import HyperNetworks, MaskDecoder, MaskPrediction
from sam_jax.models.prompt_encoder import SparseEmbeddings
from tests.golden.tiny import TINY, random_variables

DIM = TINY.image_encoder.output_dim
# What is tested here comes after the layers of the transformer.
CONFIG = dataclasses.replace(TINY.mask_decoder, depth=0)
GRID = (3, 5)
PARAMS = random_variables(dataclasses.replace(TINY, mask_decoder=CONFIG))["params"]["mask_decoder"]


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape).astype(np.float32))


SPARSE = SparseEmbeddings(normal(2, 3, 4, DIM), jnp.ones((2, 3, 4), bool))
# Embeddings of images with those of masks added, their positional encoding, and prompts.
INPUTS = (normal(2, 3, *GRID, DIM), normal(*GRID, DIM), SPARSE)


def decode(params: Any, multimask_output: bool, dtype: Any = jnp.float32) -> MaskPrediction:
    return MaskDecoder(CONFIG, DIM, dtype).apply(
        {"params": params}, *INPUTS, multimask_output=multimask_output
    )


@jax.jit
def decode_both(params: Any) -> tuple[MaskPrediction, MaskPrediction]:
    return decode(params, False), decode(params, True)


def test_the_single_mask_and_the_three_are_different_candidates() -> None:
    """Token 0 makes the single mask: what its own network makes shows there and nowhere else."""
    other = dict(PARAMS["hyper_networks"])
    other["mlp_0"] = jax.tree.map(lambda x: x + 0.1, other["mlp_0"])
    other = {**PARAMS, "hyper_networks": other}
    (single, three), (single_other, three_other) = decode_both(PARAMS), decode_both(other)
    assert single.low_res_logits.shape == (2, 3, 1, 12, 20)
    assert three.low_res_logits.shape == (2, 3, 3, 12, 20)
    assert single.iou_predictions.shape == (2, 3, 1)
    assert three.iou_predictions.shape == (2, 3, 3)
    np.testing.assert_array_equal(three.low_res_logits, three_other.low_res_logits)
    assert np.abs(single.low_res_logits - single_other.low_res_logits).min(axis=(2, 3, 4)).max() > 0


def test_sub_pixels_are_put_in_order() -> None:
    """With constant filters, a mask is the sum of the upscaled channels, place by place."""
    params = jax.tree.map(lambda x: x, PARAMS)
    filters = DIM // 8
    for index in range(4):
        last = params["hyper_networks"][f"mlp_{index}"]["dense_2"]
        params["hyper_networks"][f"mlp_{index}"]["dense_2"] = {
            "kernel": jnp.zeros_like(last["kernel"]),
            "bias": jnp.ones(filters, jnp.float32),
        }
    # The second split multiplies by 10 in its lower row and adds 1 times in its right column.
    split2 = params["upscaling"]["split2"]
    places = jnp.array([[0.0, 1.0], [10.0, 11.0]])
    kernel = jnp.zeros_like(split2["conv"]["kernel"]) + places[:, :, None] / len(
        split2["conv"]["kernel"]
    )
    params["upscaling"]["split2"] = {
        "conv": {"kernel": kernel},
        "bias": jnp.full(filters, 100.0, jnp.float32),
    }
    # Equal sub-pixels from the first split: a norm without scale gives its bias, 20 after GELU.
    norm = params["upscaling"]["norm"]
    params["upscaling"]["norm"] = {
        "scale": jnp.zeros_like(norm["scale"]),
        "bias": jnp.full_like(norm["bias"], 20.0),
    }
    logits = decode_both(params)[1].low_res_logits
    block = filters * (100 + 20 * np.array([[0, 1], [10, 11]]))
    np.testing.assert_allclose(logits[1, 2, 1], np.tile(block, (6, 10)), rtol=1e-5)


@pytest.mark.parametrize("multimask_output", [True, False])
def test_parameters_are_the_same_however_the_decoder_is_first_called(
    multimask_output: bool,
) -> None:
    decoder = MaskDecoder(CONFIG, DIM)
    variables = jax.eval_shape(
        lambda: decoder.init(jax.random.key(0), *INPUTS, multimask_output=multimask_output)
    )
    shapes = jax.tree.map(lambda x: x.shape, variables["params"])
    assert shapes == jax.tree.map(lambda x: x.shape, PARAMS)


def test_hyper_networks_answer_the_same_when_initialised() -> None:
    networks, tokens = HyperNetworks(4), normal(1, 2, 4, DIM)
    key = jax.random.key(0)
    wanted = slice(1, None)
    first, variables = jax.jit(lambda x: networks.init_with_output(key, x, wanted))(tokens)
    later = jax.jit(lambda v, x: networks.apply(v, x, wanted))(variables, tokens)
    np.testing.assert_allclose(later, first, atol=1e-6)


def test_answers_are_float32_in_half_precision() -> None:
    ours = jax.eval_shape(lambda p: decode(p, True, jnp.bfloat16), PARAMS)
    assert {x.dtype for x in jax.tree.leaves(ours)} == {jnp.dtype("float32")}


def test_predictions_have_more_digits_than_half_precision() -> None:
    """Near 0.9 bfloat16 has four numbers in a hundredth and float32 thousands: 192 objects."""
    last = PARAMS["iou_head"]["dense_2"]
    params = PARAMS | {
        "iou_head": PARAMS["iou_head"]
        | {"dense_2": {"kernel": 1e-3 * last["kernel"], "bias": jnp.full_like(last["bias"], 0.9)}}
    }
    sparse = normal(1, 64, 3, DIM)
    inputs = (
        normal(1, 64, *GRID, DIM),
        INPUTS[1],
        SparseEmbeddings(sparse, jnp.ones(sparse.shape[:3], bool)),
    )

    def predictions(dtype: Any) -> np.ndarray:
        decoder = MaskDecoder(CONFIG, DIM, dtype)
        return np.asarray(
            jax.jit(lambda p: decoder.apply({"params": p}, *inputs, multimask_output=True))(
                params
            ).iou_predictions
        )

    ours, exact = predictions(jnp.bfloat16), predictions(jnp.float32)
    assert ours.dtype == np.float32
    assert np.ptp(ours) < 0.02
    assert len(np.unique(ours)) > 180
    # So the best of three is the best: half precision chooses another for one in ten.
    chosen = np.take_along_axis(exact, ours.argmax(-1)[..., None], axis=-1)[..., 0]
    assert np.mean(ours.argmax(-1) != exact.argmax(-1)) < 0.05
    assert np.max(exact.max(-1) - chosen) < 1e-4
