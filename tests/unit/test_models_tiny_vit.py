"""TinyViT: its windows, biases and convolutions, and what it shares with the other encoder."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import JaxprEqn

from sam_jax.errors import ConfigError
from sam_jax.flop_counts import encoder_flops
from sam_jax.model_config import ModelConfig, build_model, model_config_of
from sam_jax.models.sam import Sam, init_variables
from sam_jax.models.tiny_vit import TinyViT, TinyViTConfig
from sam_jax.models.variants import VARIANTS
from sam_jax.ops.bias_attention import bias_attention, biases_of_pairs
from sam_jax.ops.convolution import conv, depthwise_conv
from sam_jax.ops.dispatch import Target, tracing_for
from sam_jax.training.optimizer import OptimizerConfig, parameter_groups
from tests.unit.jaxprs import equations, half_sums

SMALL = TinyViTConfig(
    image_size=(64, 96),
    embed_dims=(8, 12, 16, 20),
    depths=(1, 1, 1, 1),
    num_heads=(1, 3, 2, 4),
    window_sizes=(7, 3, 5, 3),
    output_dim=16,
)


def images(height: int, width: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, height, width, 3))


@pytest.fixture(scope="module")
def params() -> dict:
    """Parameters without a compiled initialiser, activations of order one."""
    template = jax.eval_shape(TinyViT(SMALL).init, jax.random.key(0), images(64, 96))
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = max(math.prod(leaf.shape[:-1]), 4) ** -0.5
        return jnp.asarray((scale * rng.standard_normal(leaf.shape)).astype(np.float32))

    return jax.tree.map(draw, template)


@functools.cache
def encoder(**options: object) -> Callable[..., jax.Array]:
    return jax.jit(TinyViT(SMALL, **options).apply)


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def encode(params: dict, x: jax.Array, **options: object) -> jax.Array:
    return encoder(**options)(params, x)


def test_a_token_for_each_16_pixels_at_any_size(params: dict) -> None:
    assert encode(params, images(64, 96)).shape == (2, 4, 6, 16)
    # There is no table of positions: other sizes need no other parameters.
    assert encode(params, images(48, 32)).shape == (2, 3, 2, 16)
    with pytest.raises(ValueError, match="70 x 96 pixels: height and width must be multiples"):
        encode(params, images(70, 96))


def test_images_of_a_batch_do_not_meet(params: dict) -> None:
    x = images(64, 96)
    np.testing.assert_allclose(encode(params, x[::-1])[::-1], encode(params, x), atol=1e-5)


def test_gradients_do_not_depend_on_what_is_kept(params: dict) -> None:
    x = images(32, 48)

    def gradients(remat: str) -> dict:
        model = TinyViT(SMALL, remat)
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply(p, x)))))(params)

    kept, again = gradients("none"), gradients("products")
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=5e-5 * (1 + np.abs(one).max()))


def test_all_variables_are_trained_but_the_frequencies() -> None:
    """There are no running statistics that training could move."""
    variables = jax.eval_shape(
        lambda: init_variables(Sam(VARIANTS["mobile_sam"]), jax.random.key(0))
    )
    assert set(variables) == {"params", "constants"}
    assert set(variables["constants"]) == {"prompt_encoder"}


def test_half_precision_stays_close(params: dict) -> None:
    x = images(64, 96)
    exact, half = encode(params, x), encode(params, x, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    error = np.linalg.norm(half.astype(jnp.float32) - exact) / np.linalg.norm(exact)
    assert error < 0.1


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_by_hand(stride: int) -> None:
    x, kernel, bias = (normal(*shape) for shape in ((1, 5, 6, 2), (3, 3, 2, 4), (4,)))
    padded = np.pad(x[0], ((1, 1), (1, 1), (0, 0)))
    expected = [
        [np.tensordot(padded[i : i + 3, j : j + 3], kernel, 3) + bias for j in range(0, 6, stride)]
        for i in range(0, 5, stride)
    ]
    np.testing.assert_allclose(conv(x, kernel, bias, stride)[0], expected, atol=1e-5)
    # Of each channel by itself: a kernel without the products of different channels.
    each = np.stack([kernel[:, :, c, c] for c in range(2)], axis=-1)[:, :, None]
    whole = np.zeros((3, 3, 2, 2), np.float32)
    whole[:, :, [0, 1], [0, 1]] = each[:, :, 0]
    summed = conv(x, jnp.asarray(whole), bias[:2], stride)
    for implementation in ("auto", "reference", "shifted"):
        out = depthwise_conv(x, jnp.asarray(each), bias[:2], stride, implementation=implementation)
        np.testing.assert_allclose(out, summed, atol=1e-5)


def test_attention_by_hand() -> None:
    size, heads, channels = 3, 2, 4
    qkv, table = normal(2, size, size, heads * 3 * channels), normal(heads, size, size)
    expected = np.zeros((2, size, size, heads * channels))
    places = [(i, j) for i in range(size) for j in range(size)]
    for window in range(2):
        for head in range(heads):
            q, k, v = np.split(np.asarray(qkv)[window].reshape(9, heads, -1)[:, head], 3, axis=-1)
            logits = q @ k.T / 2
            for a, (ai, aj) in enumerate(places):
                for b, (bi, bj) in enumerate(places):
                    logits[a, b] += table[head, abs(ai - bi), abs(aj - bj)]
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            out = weights @ v / weights.sum(axis=1, keepdims=True)
            expected[window, ..., head * channels : (head + 1) * channels] = out.reshape(3, 3, -1)
    np.testing.assert_allclose(bias_attention(qkv, table), expected, atol=1e-5)
    np.testing.assert_array_equal(biases_of_pairs(table)[:, 0], table.reshape(heads, -1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scan": True}, "model.scan = True is for a vision transformer's blocks"),
        ({"attention": "chunked"}, "model.attention = 'chunked' is for"),
        ({"drop_path_rate": 0.1}, "no field 'drop_path_rate'"),
        ({"image_size": (1000, 1024)}, "not a multiple of the patch size 16"),
        ({"encoder": {"depths": (2, 2)}}, "expected values for 4 stages"),
        ({"encoder": {"num_heads": (2, 4, 7, 10)}}, "160 is not divisible by num_heads 7"),
    ],
)
def test_what_it_cannot_do_is_refused(settings: dict, message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        build_model(ModelConfig("mobile_sam", **settings))


def test_a_config_describes_its_shape() -> None:
    changed = dataclasses.replace(VARIANTS["mobile_sam"], image_encoder=SMALL)
    assert model_config_of(changed).sam == changed


def test_layers_follow_the_blocks() -> None:
    """Those of the ViT's rule, through the stages; tables of biases do not decay."""
    shapes = jax.eval_shape(lambda: init_variables(Sam(VARIANTS["mobile_sam"]), jax.random.key(0)))
    groups = parameter_groups(shapes["params"], OptimizerConfig(layer_decay=0.8))
    expected = {
        "patch_embed/conv2/kernel": 0,
        "stage_0_block_1/conv2/kernel": 2,
        "stage_0_merge/conv1/kernel": 2,
        "stage_1_block_0/attn/qkv/kernel": 3,
        "stage_2_block_5/mlp/dense_0/kernel": 10,
        "stage_2_merge/conv3/bias": 10,
        "stage_3_block_1/local_conv/kernel": 12,
        "neck_conv1/kernel": 13,
    }
    assert {path: groups[f"image_encoder/{path}"].layer for path in expected} == expected
    assert not groups["image_encoder/stage_1_block_0/attn/attention_biases"].decayed
    assert groups["image_encoder/stage_1_block_0/local_conv/kernel"].decayed


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_half_precision_sums_in_float32(params: dict, platform: str) -> None:
    """In both directions: what many places share has a gradient that is their sum."""
    model = TinyViT(SMALL, dtype=jnp.bfloat16)

    def loss(params: dict, x: jax.Array) -> jax.Array:
        return jnp.sum(model.apply(params, x).astype(jnp.float32))

    with tracing_for(Target(platform)):
        jaxpr = jax.make_jaxpr(jax.grad(loss))(params, images(64, 96))
    assert not half_sums(jaxpr.jaxpr, 4)


def test_flops_are_those_of_its_products() -> None:
    x = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    model = TinyViT(SMALL)
    jaxpr = jax.make_jaxpr(model.apply)(jax.eval_shape(model.init, jax.random.key(0), x), x)
    # Convolutions of each channel by itself are sums of shifted products on a CPU.
    counted = sum(map(products, equations(jaxpr.jaxpr))) + 2 * depthwise_products()
    assert encoder_flops(SMALL) == counted
    assert encoder_flops(SMALL, useful=True) < counted


def products(equation: JaxprEqn) -> int:
    """Operations of a matrix product or a convolution."""
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        factors = [equation.invars[0].aval.shape[axis] for axis in contracted]
    elif equation.primitive.name == "conv_general_dilated":
        factors = equation.invars[1].aval.shape[:3]
    else:
        return 0
    return 2 * equation.outvars[0].aval.size * math.prod(factors)


def depthwise_products() -> int:
    """Multiply-adds of the convolutions of each channel by itself, of ``SMALL``."""
    tokens = [16 * 24, 8 * 12, 4 * 6, 4 * 6]
    blocks = [tokens[0] * 32, tokens[1] * 12, tokens[2] * 16, tokens[3] * 20]
    merges = [tokens[1] * 12, tokens[2] * 16, tokens[3] * 20]
    return 9 * (sum(blocks) + sum(merges))
