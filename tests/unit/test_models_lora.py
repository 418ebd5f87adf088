"""Low-rank adapters: what they change, and that without training it is nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sam_jax.configuration import from_mapping
from sam_jax.errors import ConfigError
from sam_jax.models.layers import Dense
from sam_jax.models.lora import LoraConfig, adapted_kernels, merged, with_adapters
from sam_jax.models.sam import variable_shapes
from sam_jax.models.variants import VARIANTS

LORA = LoraConfig(rank=2, alpha=6.0)


def kernels_of(variant: str, *targets: str) -> dict[str, Any]:
    shapes = variable_shapes(VARIANTS[variant])["params"]
    return adapted_kernels(shapes, LoraConfig(rank=4, targets=targets or LoraConfig.targets))


@pytest.mark.parametrize(
    ("variant", "targets", "num_kernels", "first"),
    [
        ("vit_b", (), 24, "image_encoder/block_00/attn/proj/kernel"),
        ("vit_b", ("attn/qkv",), 12, "image_encoder/block_00/attn/qkv/kernel"),
        ("vit_b", ("mlp/dense_.",), 24, "image_encoder/block_00/mlp/dense_0/kernel"),
        # Ten blocks with attention; the first two are convolutions.
        ("mobile_sam", (), 20, "image_encoder/stage_1_block_0/attn/proj/kernel"),
        (
            "mobile_sam",
            (r"stage_\d_block_0/attn/qkv",),
            3,
            "image_encoder/stage_1_block_0/attn/qkv/kernel",
        ),
    ],
)
def test_targets_are_layers_of_both_encoders(
    variant: str, targets: tuple[str, ...], num_kernels: int, first: str
) -> None:
    kernels = kernels_of(variant, *targets)
    assert len(kernels) == num_kernels
    assert next(iter(kernels)) == first


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("attn/q_proj", "'attn/q_proj' is the end of no layer.*attn/proj, attn/qkv, mlp/dense_0"),
        ("qk", "'qk' is the end of no layer"),
        ("neck_conv1", "neck_conv1/kernel as well, which is a convolution"),
        ("(", r"'\(' is no regular expression"),
    ],
)
def test_targets_that_are_no_dense_layers_are_refused(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kernels_of("vit_b", "attn/qkv", target)


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config.lora: rank must be at least 0, got -1"):
        from_mapping(LoraConfig, {"rank": -1}, "lora")


@pytest.fixture
def params() -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def dense(inputs: int, outputs: int) -> dict[str, Any]:
        kernel = jnp.asarray(rng.standard_normal((inputs, outputs)).astype(np.float32))
        return {"kernel": kernel, "bias": jnp.ones(outputs, jnp.float32)}

    attention = {"qkv": dense(6, 18), "proj": dense(6, 6)}
    block = {"attn": attention, "mlp": {"dense_0": dense(6, 24)}}
    return {"image_encoder": {"block_00": block}, "mask_decoder": {"attn": {"qkv": dense(6, 18)}}}


def test_fresh_adapters_change_nothing(params: dict[str, Any]) -> None:
    adapters = with_adapters(params, LORA, jax.random.key(0))
    assert {path: leaf.shape for path, leaf in flatten_dict(adapters["lora"], sep="/").items()} == {
        "image_encoder/block_00/attn/proj/a": (6, 2),
        "image_encoder/block_00/attn/proj/b": (2, 6),
        "image_encoder/block_00/attn/qkv/a": (6, 2),
        "image_encoder/block_00/attn/qkv/b": (2, 18),
    }
    first, second = (
        layer["a"] for layer in adapters["lora"]["image_encoder"]["block_00"]["attn"].values()
    )
    assert not np.array_equal(first, second)
    assert 0.3 < float(jnp.abs(first).max()) <= 6**-0.5
    jax.tree.map(np.testing.assert_array_equal, merged(adapters, LORA), params)
    none = LoraConfig(rank=0)
    assert with_adapters(params, none, jax.random.key(0)) == params == merged(params, none)


def test_a_merged_layer_is_the_layer_with_its_adapter_beside_it(params: dict[str, Any]) -> None:
    adapters = with_adapters(params, LORA, jax.random.key(0))
    adapters["lora"] = jax.tree.map(lambda leaf: leaf + 0.25, adapters["lora"])
    plain = merged(adapters, LORA)
    assert flatten_dict(plain).keys() == flatten_dict(params).keys()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32))
    layer = params["image_encoder"]["block_00"]["attn"]["qkv"]
    beside = adapters["lora"]["image_encoder"]["block_00"]["attn"]["qkv"]
    expected = Dense(18).apply({"params": layer}, x) + 6.0 / 2 * (x @ beside["a"]) @ beside["b"]
    found = Dense(18).apply({"params": plain["image_encoder"]["block_00"]["attn"]["qkv"]}, x)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-6, atol=1e-5)
    # Nothing else is another.
    for path, leaf in flatten_dict(plain, sep="/").items():
        before = flatten_dict(params, sep="/")[path]
        is_adapted = path.startswith("image_encoder/block_00/attn") and path.endswith("kernel")
        assert np.array_equal(leaf, before) != is_adapted, path
