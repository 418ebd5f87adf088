"""The model section: published shapes, and configs that change them."""

import dataclasses

import jax.numpy as jnp
import pytest

from sam_jax.errors import ConfigError
from sam_jax.model_config import ModelConfig, build_model
from sam_jax.models.variants import VARIANTS

# (width, depth, heads, global blocks), as the published code builds them
PUBLISHED = {
    "vit_b": (768, 12, 12, (2, 5, 8, 11)),
    "vit_l": (1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": (1280, 32, 16, (7, 15, 23, 31)),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_shapes(variant: str) -> None:
    encoder = VARIANTS[variant].image_encoder
    found = encoder.embed_dim, encoder.depth, encoder.num_heads, encoder.global_attention_blocks
    assert found == PUBLISHED[variant]
    assert (encoder.image_size, encoder.patch_size) == ((1024, 1024), 16)
    assert (encoder.window_size, encoder.mlp_rate, encoder.output_dim) == (14, 4.0, 256)
    decoder = VARIANTS[variant].mask_decoder
    assert (decoder.depth, decoder.num_heads, decoder.mlp_dim, decoder.iou_head_dim) == (
        2, 8, 2048, 256,
    )  # fmt: skip
    assert VARIANTS[variant].mask_channels == 16


@pytest.mark.parametrize("variant", ["vit_ti", "vit_s"])
def test_windows_of_the_small_variants_divide_their_grid(variant: str) -> None:
    encoder = VARIANTS[variant].image_encoder
    assert all(side % encoder.window_size == 0 for side in encoder.grid)


def test_the_default_is_the_variant_itself() -> None:
    assert ModelConfig().sam == VARIANTS["vit_b"]
    model = build_model(ModelConfig("vit_l", dtype="bfloat16", remat="blocks", attention="chunked"))
    assert model.config == VARIANTS["vit_l"]
    assert (model.dtype, model.remat, model.attention) == (jnp.bfloat16, "blocks", "chunked")


def test_changes_reach_their_part_and_leave_the_rest() -> None:
    config = ModelConfig(
        "vit_ti",
        image_size=(128, 192),
        drop_path_rate=0.1,
        encoder={"depth": 3, "global_attention_blocks": (2,)},
        decoder={"mlp_dim": 64},
    )
    base = VARIANTS["vit_ti"]
    assert config.sam == dataclasses.replace(
        base,
        image_encoder=dataclasses.replace(
            base.image_encoder,
            image_size=(128, 192),
            drop_path_rate=0.1,
            depth=3,
            global_attention_blocks=(2,),
        ),
        mask_decoder=dataclasses.replace(base.mask_decoder, mlp_dim=64),
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig("vit_g"), "'vit_g' does not exist; there are vit_ti, vit_s, vit_b"),
        (ModelConfig(encoder={"dept": 3}), "model.encoder has no field 'dept'.*'depth'"),
        (ModelConfig(decoder={"embed_dim": 3}), "model.decoder has no field 'embed_dim'"),
        (ModelConfig(dtype="float64"), "model.dtype = 'float64' must be"),
        (
            ModelConfig(image_size=(60, 64)),
            r"config.model: image_size \(60, 64\) is not a",
        ),
        (ModelConfig(image_size=(0, 64)), r"image_size = \(0, 64\): expected height and width"),
    ],
)
def test_mistakes_are_named(config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(config)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("remat", "none, products, blocks"),
        ("attention", "auto, reference, extended, chunked, window_kernel, flash_kernel, cudnn"),
        ("kernels", "auto, none, interpret"),
    ],
)
def test_a_choice_that_there_is_not_is_named_with_those_there_are(name: str, kinds: str) -> None:
    config = ModelConfig()
    # As a config file does, which nothing checks the types of.
    object.__setattr__(config, name, "some")
    with pytest.raises(ConfigError, match=f"model.{name} = 'some' must be one of {kinds}$"):
        build_model(config)
