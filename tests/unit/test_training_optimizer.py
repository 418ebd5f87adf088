"""The optimizer: schedule, groups and the step that it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.configuration import from_mapping
from sam_jax.errors import ConfigError
from sam_jax.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    is_decayed,
    layer_of,
    learning_rate_schedule,
    parameter_groups,
)


def test_the_paper_s_schedule():
    config = OptimizerConfig()
    rate = learning_rate_schedule(config, 90_000)
    for step, factor in {
        0: 0.0,
        125: 0.5,
        250: 1.0,
        59_999: 1.0,
        60_001: 0.1,
        86_665: 0.1,
        86_667: 0.01,
        89_999: 0.01,
    }.items():
        assert rate(step) == pytest.approx(8e-4 * factor, rel=1e-5), step


def test_cosine_falls_to_zero():
    config = OptimizerConfig(schedule="cosine", warmup_steps=10, peak_learning_rate=1.0)
    rate = learning_rate_schedule(config, 110)
    assert rate(10) == pytest.approx(1.0)
    assert rate(60) == pytest.approx(0.5)
    assert rate(110) == pytest.approx(0.0, abs=1e-7)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="warmup_steps = 100 must be less than"):
        learning_rate_schedule(OptimizerConfig(warmup_steps=100), 100)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ConfigError, match="linear"):
        from_mapping(OptimizerConfig, {"schedule": "linear"}, "optimizer")


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("image_encoder/patch_embed/proj/kernel", 0),
        ("image_encoder/pos_embed", 0),
        ("image_encoder/block_00/attn/qkv/kernel", 1),
        ("image_encoder/block_11/mlp/dense_0/bias", 12),
        ("image_encoder/neck_conv1/kernel", 13),
        ("prompt_encoder/no_mask", 13),
        ("mask_decoder/transformer/layer_0/self_attn/q_proj/kernel", 13),
        # Adapters are of the layer that they adapt.
        ("lora/image_encoder/block_00/attn/qkv/a", 1),
        ("lora/image_encoder/block_11/attn/proj/b", 12),
    ],
)
def test_layers_are_those_of_vitdet(path, layer):
    assert layer_of(path, [(0, block) for block in range(12)]) == layer


def test_what_decays():
    assert is_decayed("image_encoder/block_00/attn/qkv/kernel", 2)
    assert is_decayed("image_encoder/block_00/attn/rel_pos_h", 2)
    assert not is_decayed("image_encoder/block_00/attn/qkv/bias", 1)
    assert not is_decayed("image_encoder/block_00/norm1/scale", 1)
    assert not is_decayed("image_encoder/pos_embed", 3)
    # Learned tokens alike, tables and single vectors.
    assert is_decayed("prompt_encoder/point_kinds", 2)
    assert is_decayed("prompt_encoder/not_a_point", 1)
    assert is_decayed("prompt_encoder/no_mask", 1)
    assert is_decayed("mask_decoder/output_tokens", 2)
    assert not is_decayed("prompt_encoder/mask_downscaling/conv1/bias", 1)


@pytest.fixture
def params():
    return {
        "image_encoder": {
            "patch_embed": {"proj": {"kernel": jnp.full((2, 3), 2.0)}},
            "block_00": {"norm1": {"scale": jnp.full((3,), 2.0)}},
        },
        "mask_decoder": {"output_tokens": jnp.full((5, 3), 2.0)},
    }


def test_groups_of_a_tree(params):
    groups = parameter_groups(params, OptimizerConfig(layer_decay=0.5))
    assert groups["image_encoder/patch_embed/proj/kernel"].rate_scale == 0.25
    assert groups["image_encoder/block_00/norm1/scale"].rate_scale == 0.5
    assert not groups["image_encoder/block_00/norm1/scale"].decayed
    assert groups["mask_decoder/output_tokens"].rate_scale == 1.0


def test_adapters_learn_as_slowly_as_what_they_adapt(params):
    adapters = {"image_encoder": {"block_00": {"attn": {"qkv": {"a": jnp.ones((3, 2))}}}}}
    groups = parameter_groups({**params, "lora": adapters}, OptimizerConfig(layer_decay=0.5))
    # They are no blocks themselves, and move no other layer.
    assert groups["image_encoder/patch_embed/proj/kernel"].rate_scale == 0.25
    assert groups["lora/image_encoder/block_00/attn/qkv/a"].rate_scale == 0.5


def test_the_first_step_by_hand(params):
    """Adam's first step is the sign of the gradient; decay adds weight_decay * weight to it."""
    config = OptimizerConfig(
        peak_learning_rate=0.1,
        warmup_steps=1,
        step_boundaries=(50,),
        layer_decay=0.5,
        weight_decay=0.25,
    )
    optimizer = build_optimizer(params, config, 100)
    state = optimizer.init(params)
    grads = jax.tree.map(lambda x: jnp.full(x.shape, -3.0), params)
    updates, state = optimizer.update(grads, state, params)
    # The warm-up starts from a rate of zero.
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    updates, state = optimizer.update(grads, state, params)
    encoder = updates["image_encoder"]
    expected_kernel = -0.1 * 0.25 * (-1.0 + 0.25 * 2.0)
    np.testing.assert_allclose(encoder["patch_embed"]["proj"]["kernel"], expected_kernel, rtol=1e-4)
    np.testing.assert_allclose(encoder["block_00"]["norm1"]["scale"], 0.1 * 0.5, rtol=1e-4)
    expected_tokens = -0.1 * (-1.0 + 0.25 * 2.0)
    np.testing.assert_allclose(updates["mask_decoder"]["output_tokens"], expected_tokens, rtol=1e-4)


def test_gradients_are_clipped_by_their_global_norm(params):
    config = OptimizerConfig(warmup_steps=1, clip_norm=1.0, epsilon=1.0)
    optimizer = build_optimizer(params, config, 100)
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 5.0), params)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    first_moments = jax.tree.leaves(state[1].mu)
    norm = np.sqrt(sum(np.sum(np.square(m)) for m in first_moments))
    assert norm == pytest.approx((1 - 0.9) * 1.0, rel=1e-5)
