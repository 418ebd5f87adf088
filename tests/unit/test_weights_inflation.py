"""Weights for other channels than a model takes: inflated at a start, refused elsewhere."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sam_jax import flop_counts
from sam_jax.configuration import from_mapping
from sam_jax.model_config import ModelConfig, build_model, model_config_of
from sam_jax.models.masked_autoencoder import AutoencoderConfig, MaskedAutoencoder
from sam_jax.models.sam import Sam, SamConfig
from sam_jax.ops.images import RGB, ImageChannels, as_pixels, normalize_images
from sam_jax.weights.files import WeightsError, read_tensors, write_safetensors
from sam_jax.weights.geometry import variant_name
from sam_jax.weights.inflation import inflated, with_channels
from sam_jax.weights.load import (
    autoencoder_variables_for,
    convert,
    describe,
    load,
    save,
    variables_for,
)
from sam_jax.weights.mae import mae_tensors
from sam_jax.weights.names import NamesError
from tests.golden import tiny_mobile_sam
from tests.golden.tiny import TINY, random_autoencoder, random_variables

SQUARE = dataclasses.replace(
    TINY,
    image_encoder=dataclasses.replace(TINY.image_encoder, image_size=(40, 40), window_size=4),
)
MODELS = {"vit": TINY, "tiny_vit": tiny_mobile_sam.SMALL}
FOUR = ImageChannels(4, (1000.0, 0.5, -20.0, 7.0), (300.0, 0.1, 400.0, 2.0))


def of_channels(config: SamConfig, count: int) -> SamConfig:
    channels = ImageChannels(count, (0.0,) * count, (1.0,) * count)
    return dataclasses.replace(config, channels=channels)


def encoded(config: SamConfig, variables: Any, images: np.ndarray) -> np.ndarray:
    encode = jax.jit(lambda v, x: Sam(config).apply(v, x, method=Sam.encode))
    return np.asarray(encode(variables, jnp.asarray(images)))


@pytest.mark.parametrize(("name", "counts"), [("vit", (1, 4, 13)), ("tiny_vit", (4,))])
def test_equal_channels_give_the_embeddings_of_a_grey_picture(
    name: str, counts: tuple[int, ...]
) -> None:
    """The closed form of the rule, of which each number of channels is a program of its own."""
    config = MODELS[name]
    variables = random_variables(config)
    # A TinyViT takes images of any size.
    size = (64, 96) if name == "tiny_vit" else config.image_encoder.image_size
    shape = (1, *size, 1)
    grey = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = encoded(config, variables, np.repeat(grey, 3, axis=-1))
    for count in counts:
        other = with_channels(variables, 3, count, "it")
        found = encoded(of_channels(config, count), other, np.repeat(grey, count, axis=-1))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_filters_by_hand() -> None:
    kernel = np.array([[1.0, 2.0, 6.0]])
    np.testing.assert_allclose(inflated(kernel, 1, axis=1), [[9.0]])
    np.testing.assert_allclose(inflated(kernel, 3, axis=1), kernel)
    # As timm's where it is exact.
    np.testing.assert_allclose(inflated(kernel, 6, axis=1), [[0.5, 1, 3, 0.5, 1, 3]])
    # (1, 2, 6, 1) * 3 / 4 lack 1.5 of the sum 9.
    np.testing.assert_allclose(inflated(kernel, 4, axis=1), [[1.125, 1.875, 4.875, 1.125]])
    np.testing.assert_allclose(inflated(kernel, 2, axis=1), [[3.75, 5.25]])


def model_for(config: SamConfig, channels: ImageChannels) -> Sam:
    return Sam(dataclasses.replace(config, channels=channels))


@pytest.mark.parametrize("name", MODELS)
def test_only_a_start_of_training_takes_weights_of_other_channels(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, path = MODELS[name], tmp_path / "rgb.safetensors"
    variables = random_variables(config)
    save(path, config, variables, "official")
    model = model_for(config, FOUR)
    with caplog.at_level(logging.WARNING):
        started = variables_for(model, path, key=jax.random.key(0))
    assert "takes 3 channels, the model 4: the patch embedding is inflated" in caplog.text
    expected = flatten_dict(with_channels(variables, 3, 4, path))
    found = flatten_dict(started)
    assert expected.keys() == found.keys()
    for key, array in expected.items():
        # Batch normalisations of a MobileSAM are folded on the way.
        np.testing.assert_allclose(found[key], array, atol=1e-5)
    with pytest.raises(NamesError, match=r"in_channels is None \(8-bit RGB\), expected 4"):
        variables_for(model, path)
    # And from other channels to RGB.
    other = tmp_path / "four.safetensors"
    save(other, model.config, started, "official")
    assert variables_for(Sam(config), other, key=jax.random.key(0))
    with pytest.raises(NamesError, match=r"in_channels is 4, expected None \(8-bit RGB\)"):
        variables_for(Sam(config), other)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels", [FOUR, ImageChannels(1, (5.0,), (2.0,))])
def test_channels_go_out_and_come_back(name: str, channels: ImageChannels, tmp_path: Path) -> None:
    config = dataclasses.replace(MODELS[name], channels=channels)
    variables = random_variables(config)
    heads = config.mask_decoder.num_heads
    save(tmp_path / "x.safetensors", config, variables, "official")
    model, back = load(tmp_path / "x.safetensors", decoder_heads=heads)
    assert model.config.channels == channels
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), variables, back)
    save(tmp_path / "run", config, variables, "orbax")
    assert load(tmp_path / "run").model.config.channels == channels
    # Without metadata, as in other people's files and in PyTorch's, a config must say it.
    bare = tmp_path / "bare.safetensors"
    write_safetensors(bare, read_tensors(tmp_path / "x.safetensors"))
    with pytest.raises(WeightsError, match=rf"images of {channels.count} channels, and nothing"):
        load(bare, decoder_heads=heads)
    assert variables_for(Sam(config), bare)
    assert describe(tmp_path / "run").config.channels == channels


def test_hugging_faces_form_says_its_channels(tmp_path: Path) -> None:
    config = dataclasses.replace(SQUARE, channels=FOUR)
    variables = random_variables(config)
    save(tmp_path / "hf", config, variables, "hugging-face")
    assert json.loads((tmp_path / "hf/config.json").read_text())["vision_config"][
        "num_channels"
    ] == (4)
    said = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
    assert (said["image_mean"], said["image_std"]) == (list(FOUR.pixel_mean), list(FOUR.pixel_std))
    assert not said["do_rescale"]
    assert not said["do_convert_rgb"]
    model, back = load(tmp_path / "hf")
    assert model.config == config
    jax.tree.map(np.testing.assert_array_equal, variables, jax.device_get(back))
    # By its own config alone, as others write it.
    weights = tmp_path / "hf/model.safetensors"
    write_safetensors(weights, read_tensors(weights))
    assert load(tmp_path / "hf").model.config.channels == FOUR
    save(tmp_path / "rgb", SQUARE, random_variables(SQUARE), "hugging-face")
    rgb = json.loads((tmp_path / "rgb/preprocessor_config.json").read_text())
    assert rgb["image_mean"] == [0.485, 0.456, 0.406]
    assert rgb["do_rescale"]
    assert load(tmp_path / "rgb").model.config.channels == RGB


@pytest.mark.parametrize("in_channels", [None, 3])
def test_hugging_faces_statistics_of_three_channels_are_taken(
    tmp_path: Path, in_channels: int | None
) -> None:
    """Without metadata of ours, as `transformers` writes files: of 8-bit RGB and others."""
    channels = ImageChannels(in_channels, (10.0, 20.0, 30.0), (20.0, 25.5, 51.0))
    config = dataclasses.replace(SQUARE, channels=channels)
    save(tmp_path / "hf", config, random_variables(config), "hugging-face")
    weights = tmp_path / "hf/model.safetensors"
    write_safetensors(weights, read_tensors(weights))
    found = load(tmp_path / "hf").model.config.channels
    assert found.in_chans == in_channels
    assert found.pixel_mean == pytest.approx(channels.pixel_mean, abs=1e-3)
    assert found.pixel_std == pytest.approx(channels.pixel_std, abs=1e-3)


def test_what_is_converted_says_its_channels(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, channels=FOUR)
    save(tmp_path / "run", config, random_variables(config), "orbax")
    said = convert(tmp_path / "run", tmp_path / "x.safetensors", "official")
    assert "channels: 4, values as stored; mean 1000, 0.5, -20, 7; deviation 300" in said


def test_autoencoders_are_inflated_with_what_they_predict(tmp_path: Path) -> None:
    encoder = dataclasses.replace(TINY.image_encoder, image_size=(16, 16))
    small = AutoencoderConfig(decoder_dim=16, decoder_depth=1, decoder_heads=2)
    rgb, two = (
        MaskedAutoencoder(encoder, small, channels)
        for channels in (RGB, ImageChannels(2, (0.0, 0.0), (1.0, 1.0)))
    )
    variables = random_autoencoder(rgb)
    tensors = mae_tensors(rgb, variables)
    write_safetensors(tmp_path / "mae.safetensors", tensors)
    found = autoencoder_variables_for(two, tmp_path / "mae.safetensors", inflates=True)
    params, before = found["params"], variables["params"]
    patch = encoder.patch_size
    filters = np.asarray(before["image_encoder"]["patch_embed"]["proj"]["kernel"])
    filters = filters.reshape(patch**2, 3, -1)
    np.testing.assert_array_equal(
        params["image_encoder"]["patch_embed"]["proj"]["kernel"],
        inflated(filters, 2, axis=1).reshape(2 * patch**2, -1),
    )
    for name in ("kernel", "bias"):
        predicted = np.asarray(before["pixel_decoder"]["prediction"][name])
        predicted = predicted.reshape(*predicted.shape[:-1], patch**2, 3)
        np.testing.assert_array_equal(
            params["pixel_decoder"]["prediction"][name].reshape(*predicted.shape[:-1], 2),
            predicted[..., :2],
        )
    with pytest.raises(NamesError, match="misshapen"):
        autoencoder_variables_for(two, tmp_path / "mae.safetensors")
    # Promptable training goes on from it, with yet other channels.
    wider = Sam(
        dataclasses.replace(TINY, image_encoder=encoder, channels=dataclasses.replace(FOUR))
    )
    started = variables_for(wider, tmp_path / "mae.safetensors", key=jax.random.key(0))
    kernel = started["params"]["image_encoder"]["patch_embed"]["proj"]["kernel"]
    np.testing.assert_allclose(
        kernel, inflated(filters, 4, axis=1).reshape(4 * patch**2, -1), atol=1e-6
    )


def test_configs_of_before_are_of_rgb() -> None:
    before = {k: v for k, v in dataclasses.asdict(ModelConfig()).items() if "pixel" not in k}
    del before["in_channels"]
    assert from_mapping(ModelConfig, before, "model").sam.channels == RGB


def test_configs_carry_channels() -> None:
    config = dataclasses.replace(TINY, channels=FOUR)
    assert build_model(model_config_of(config)).config == config
    assert model_config_of(TINY).in_channels is None
    own = ModelConfig(pixel_mean=(1.0, 2.0, 3.0)).sam.channels
    assert (own.in_chans, own.pixel_mean, own.pixel_std) == (None, (1.0, 2.0, 3.0), RGB.pixel_std)
    assert variant_name(dataclasses.replace(ModelConfig("vit_b").sam, channels=FOUR)) == "vit_b"


def test_normalisation_of_values_as_stored() -> None:
    images = np.random.default_rng(0).normal(100, 50, (2, 4, 6, 4)).astype(np.float32)
    found = normalize_images(jnp.asarray(images), jnp.array([[4, 6], [3, 5]]), FOUR)
    expected = (images - np.float32(FOUR.pixel_mean)) / np.float32(FOUR.pixel_std)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1, :3, :5], expected[1, :3, :5], rtol=1e-6)
    assert not np.any(found[1, 3:])
    assert not np.any(found[1, :, 5:])
    np.testing.assert_allclose(as_pixels(np.asarray(found[0]), FOUR), images[0], rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_operations_of_the_patch_embedding_are_counted(name: str) -> None:
    encoder = MODELS[name].image_encoder
    three, four = (flop_counts.encoder_flops(encoder, num_channels=c) for c in (3, 4))
    height, width = encoder.image_size
    if name == "vit":
        gh, gw = encoder.grid
        assert four - three == 2 * gh * gw * encoder.patch_size**2 * encoder.embed_dim
    else:
        assert four - three == 2 * (height // 2) * (width // 2) * 9 * (encoder.embed_dims[0] // 2)
