import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.errors import ConfigError
from sam_jax.flop_counts import autoencoder_flops
from sam_jax.model_config import ModelConfig, build_autoencoder
from sam_jax.models.image_encoder import ImageEncoderConfig
from sam_jax.models.masked_autoencoder import (
    AutoencoderConfig,
    MaskedAutoencoder,
    blanked,
    init_variables,
    patchify,
    random_masking,
    unpatchify,
)
from tests.golden.tiny import random_autoencoder

# Not square: 3 x 4 patches, of which 3 are seen.
ENCODER = ImageEncoderConfig(image_size=(12, 16), patch_size=4, embed_dim=8, depth=2, num_heads=2)
CONFIG = AutoencoderConfig(decoder_dim=12, decoder_depth=1, decoder_heads=3)
MODEL = MaskedAutoencoder(ENCODER, CONFIG)
NUM_SEEN, NUM_PATCHES = 3, 12


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return random_autoencoder(MODEL)


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 16, 3)).astype(np.float32))


def masks(seed: int = 0, num_images: int = 2):
    noise = np.random.default_rng(seed).random((num_images, NUM_PATCHES), np.float32)
    return random_masking(jnp.asarray(noise), CONFIG.mask_rate)


def test_kept_and_dropped_are_all_patches_and_none_twice() -> None:
    mask = masks(num_images=50)
    assert mask.kept.shape == (50, NUM_SEEN)
    assert mask.dropped.shape == (50, MODEL.num_dropped) == (50, 9)
    both = np.concatenate([mask.kept, mask.dropped], axis=1)
    np.testing.assert_array_equal(np.sort(both, axis=1), np.tile(np.arange(NUM_PATCHES), (50, 1)))
    # What is put in the place that `restore` names comes back in order.
    np.testing.assert_array_equal(
        np.take_along_axis(both, np.asarray(mask.restore), axis=1), np.sort(both, axis=1)
    )
    is_dropped = np.asarray(mask.is_dropped)
    for row, dropped in zip(is_dropped, np.asarray(mask.dropped), strict=True):
        assert set(np.flatnonzero(row)) == set(dropped)
    # Every patch is seen now and then, each image differently.
    assert is_dropped.any(axis=0).all()
    assert not is_dropped.all(axis=0).any()
    assert len(np.unique(is_dropped, axis=0)) > 25


def test_the_patches_with_the_least_noise_are_seen() -> None:
    mask = random_masking(jnp.asarray([[0.4, 0.1, 0.3, 0.2, 0.9, 0.8, 0.7, 0.6]]), 0.75)
    assert mask.kept.tolist() == [[1, 3]]
    assert mask.dropped.tolist() == [[2, 0, 7, 6, 5, 4]]


def test_a_patch_is_its_pixels_row_by_row() -> None:
    image = np.arange(12 * 16 * 3, dtype=np.float32).reshape(1, 12, 16, 3)
    patches = patchify(jnp.asarray(image), 4)
    # The sixth patch: second row of patches, second column.
    np.testing.assert_array_equal(patches[0, 5], image[0, 4:8, 4:8].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, (3, 4), 4), image)


def test_the_encoder_sees_the_kept_patches_and_nothing_else(
    variables: dict[str, Any], images: jax.Array
) -> None:
    mask = masks()
    encode = jax.jit(lambda x, kept: MODEL.apply(variables, x, kept, method="encode"))
    tokens = encode(images, mask.kept)
    assert tokens.shape == (2, 1 + NUM_SEEN, ENCODER.embed_dim)
    blank = blanked(images, mask, ENCODER)
    assert float(jnp.abs(blank - images).max()) > 1
    np.testing.assert_array_equal(encode(blank, mask.kept), tokens)
    # No token is made of all patches before they are dropped: attention is of four.
    jaxpr = jax.make_jaxpr(lambda x, kept: MODEL.apply(variables, x, kept, method="encode"))(
        images, mask.kept
    )
    head_logits = {
        eqn.outvars[0].aval.shape for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name == "exp"
    }
    assert head_logits
    assert {shape[-1] for shape in head_logits} == {1 + NUM_SEEN}


def _equations(jaxpr: Any):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                yield from _equations(value.jaxpr)
            elif isinstance(value, jax.extend.core.Jaxpr):
                yield from _equations(value)


def test_loss_is_of_dropped_patches_alone(images: jax.Array) -> None:
    mask = masks()
    predictions = jnp.asarray(np.random.default_rng(1).standard_normal((2, NUM_PATCHES, 48)))
    errors = MODEL.errors(images, predictions, mask)
    assert errors.shape == (2, 9)
    # By hand, with the deviation of n - 1 of 48 numbers.
    image, patch = 1, int(mask.dropped[1, 2])
    row, column = divmod(patch, 4)
    pixels = np.asarray(images[image, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]).ravel()
    target = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
    expected = np.mean((np.asarray(predictions[image, patch]) - target) ** 2)
    assert float(errors[image, 2]) == pytest.approx(expected, rel=1e-5)
    # Other pixels and other predictions of seen patches change nothing, those of dropped ones do.
    seen = ~mask.is_dropped[..., None]
    other = unpatchify(patchify(images, 4) + 5.0 * seen, (3, 4), 4)
    np.testing.assert_array_equal(MODEL.errors(other, predictions + 3.0 * seen, mask), errors)
    assert np.all(MODEL.errors(images, predictions + 3.0 * ~seen, mask) != errors)


def test_pixels_themselves_may_be_the_target(images: jax.Array) -> None:
    model = dataclasses.replace(
        MODEL, config=dataclasses.replace(CONFIG, normalize_pixels=False), parent=None
    )
    mask = masks()
    errors = model.errors(images, jnp.zeros((2, NUM_PATCHES, 48)), mask)
    patches = np.asarray(patchify(images, 4))
    expected = np.take_along_axis((patches**2).mean(axis=2), np.asarray(mask.dropped), axis=1)
    np.testing.assert_allclose(errors, expected, rtol=1e-5)


def test_perfect_predictions_give_the_image_back(images: jax.Array) -> None:
    patches = np.asarray(patchify(images, 4))
    mean, deviation = (
        patches.mean(axis=2, keepdims=True),
        np.sqrt(patches.var(axis=2, ddof=1, keepdims=True) + 1e-6),
    )
    perfect = jnp.asarray((patches - mean) / deviation)
    np.testing.assert_allclose(MODEL.reconstruction(images, perfect, masks()), images, atol=1e-5)
    # Wrong ones appear where patches were dropped, and nowhere else.
    wrong = MODEL.reconstruction(images, perfect + 1.0, masks())
    np.testing.assert_array_equal(
        np.any(np.abs(patchify(wrong - images, 4)) > 1e-3, axis=2), masks().is_dropped
    )


def test_gradients_are_finite_of_plain_images_and_the_same_in_a_loop(
    variables: dict[str, Any], images: jax.Array
) -> None:
    """An image of one colour has patches without deviation."""
    images = images.at[0].set(0.3)
    noise = jnp.asarray(np.random.default_rng(2).random((2, NUM_PATCHES), np.float32))

    def gradients(model: MaskedAutoencoder) -> Any:
        def loss(params: Any) -> jax.Array:
            predictions, mask = model.apply({"params": params}, images, noise)
            return jnp.mean(model.errors(images, predictions, mask))

        return jax.jit(jax.grad(loss))(variables["params"])

    plain = gradients(MODEL)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(plain))
    looped = gradients(MaskedAutoencoder(ENCODER, CONFIG, remat="blocks", scan=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), plain, looped)


def test_operations_are_counted_as_the_compiler_does(variables: dict[str, Any]) -> None:
    """Most of them are of the encoder here, and would be four times as many with all patches."""
    encoder = dataclasses.replace(ENCODER, image_size=(32, 32), embed_dim=64, num_heads=4)
    model = MaskedAutoencoder(encoder, CONFIG, attention="reference")
    template = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    noise = jax.ShapeDtypeStruct((1, model.num_patches), np.float32)
    lowered = jax.jit(model.apply).lower(template, images, noise)
    counted = autoencoder_flops(encoder, CONFIG)
    # What is done element by element is not in the formula.
    assert counted < lowered.cost_analysis()["flops"] < 1.25 * counted
    everything = dataclasses.replace(CONFIG, mask_rate=1e-9)
    assert autoencoder_flops(encoder, everything) > 2.5 * counted


def test_kernels_start_by_glorot_and_bengios_rule() -> None:
    params = init_variables(MODEL, jax.random.key(0))["params"]
    block = params["image_encoder"]["block_00"]
    for kernel in (block["attn"]["qkv"]["kernel"], params["pixel_decoder"]["embed"]["kernel"]):
        bound = np.sqrt(6 / sum(kernel.shape))
        assert 0.8 * bound < np.abs(kernel).max() <= bound
    assert "rel_pos_h" not in block["attn"]
    assert not np.any(block["mlp"]["dense_0"]["bias"])
    assert np.all(params["image_encoder"]["norm"]["scale"] == 1)
    assert 0 < np.abs(params["pixel_decoder"]["mask_token"]).max() < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "mobile_sam"}, "convolutions, which see the patches"),
        ({"drop_path_rate": 0.1}, "trained without; leave it at 0"),
        ({"image_size": (16, 32)}, "leaves the encoder 0 of 2 patches"),
        ({"dtype": "float16"}, "must be 'float32' or 'bfloat16'"),
    ],
)
def test_what_cannot_be_pre_trained_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_autoencoder(ModelConfig(**{"variant": "vit_ti", **changes}), AutoencoderConfig())


@pytest.mark.parametrize(
    "wrong", [{"mask_rate": 0.0}, {"mask_rate": 1.0}, {"decoder_dim": 510}, {"decoder_dim": 48}]
)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AutoencoderConfig(**{"decoder_heads": 5, **wrong} if "mask_rate" not in wrong else wrong)
