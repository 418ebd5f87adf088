"""Masked autoencoding against the transformers library's, which is the published code's port."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.model_config import ModelConfig, build_autoencoder
from sam_jax.models.image_encoder import ImageEncoderConfig
from sam_jax.models.masked_autoencoder import (
    AutoencoderConfig,
    MaskedAutoencoder,
    init_variables,
)
from sam_jax.ops.positional import sincos_positions
from sam_jax.weights.mae import mae_tensors
from tests.golden.tiny import random_autoencoder
from tests.parity import official

pytestmark = pytest.mark.parity

torch = official.torch

ENCODER = ImageEncoderConfig(image_size=(40, 40), patch_size=8, embed_dim=24, depth=2, num_heads=3)
DECODER = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 4}
# Beginnings of published names, and what the library calls them.
RENAMED = (
    (r"cls_token$", "vit.embeddings.cls_token"),
    (r"pos_embed$", "vit.embeddings.position_embeddings"),
    (r"patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"),
    (r"norm\.", "vit.layernorm."),
    (r"mask_token$", "decoder.mask_token"),
    (r"decoder_blocks\.", "decoder.decoder_layers."),
    (r"blocks\.", "vit.layers."),
    (r"decoder_", "decoder.decoder_"),
)
WITHIN_BLOCKS = (
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.proj", "attention.o_proj"),
)


def library_names(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Tensors by published names under the library's."""
    renamed = {}
    for name, array in tensors.items():
        pattern, beginning = next(pair for pair in RENAMED if re.match(pair[0], name))
        new = re.sub(f"^{pattern}", beginning, name)
        for theirs, librarys in WITHIN_BLOCKS:
            new = new.replace(theirs, librarys)
        parts = np.split(array, 3) if "attn.qkv" in new else [array]
        for letter, part in zip("qkv", parts, strict=False):
            key = new.replace("attn.qkv", f"attention.{letter}_proj")
            renamed[key] = torch.from_numpy(np.array(part))
    return renamed


def test_fixed_positions() -> None:
    """Those that published weights were trained with, which have columns before rows."""
    from transformers.models.vit_mae import modeling_vit_mae

    rows, columns, dim = 3, 5, ENCODER.embed_dim
    theirs = modeling_vit_mae.build_2d_sinusoidal_position_embedding(rows, columns, dim)
    by_row, by_column = np.split(theirs.reshape(rows, columns, dim), 2, axis=-1)
    expected = np.concatenate([by_column, by_row], axis=-1)
    official.assert_equal(sincos_positions((rows, columns), dim), expected)


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    """Random weights in which biases, norms and tokens are none that a start would have."""
    return random_autoencoder(MaskedAutoencoder(ENCODER, AutoencoderConfig(**DECODER)))


@pytest.mark.parametrize("normalize_pixels", [True, False])
def test_masks_predictions_and_loss(variables: dict[str, Any], normalize_pixels: bool) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = AutoencoderConfig(normalize_pixels=normalize_pixels, **DECODER)
    model = MaskedAutoencoder(ENCODER, config)
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=ENCODER.embed_dim,
            num_hidden_layers=ENCODER.depth,
            num_attention_heads=ENCODER.num_heads,
            intermediate_size=int(ENCODER.mlp_rate * ENCODER.embed_dim),
            image_size=ENCODER.image_size[0],
            patch_size=ENCODER.patch_size,
            # The published code's; the library's own default is its own.
            layer_norm_eps=1e-6,
            decoder_hidden_size=config.decoder_dim,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_heads,
            decoder_intermediate_size=int(config.decoder_mlp_rate * config.decoder_dim),
            mask_ratio=config.mask_rate,
            norm_pix_loss=normalize_pixels,
        )
    ).eval()
    tensors = library_names(mae_tensors(model, variables))
    theirs.load_state_dict(tensors, strict=True)

    rng = np.random.default_rng(1)
    images = rng.standard_normal((3, *ENCODER.image_size, 3)).astype(np.float32)
    noise = rng.random((3, model.num_patches), np.float32)
    with torch.no_grad():
        found = theirs(torch.from_numpy(images).permute(0, 3, 1, 2), noise=torch.from_numpy(noise))

    @jax.jit
    def reconstruct(images: Any, noise: Any) -> Any:
        predictions, mask = model.apply(variables, images, noise)
        return predictions, mask, model.errors(images, predictions, mask)

    predictions, mask, errors = reconstruct(jnp.asarray(images), jnp.asarray(noise))
    np.testing.assert_array_equal(mask.restore, found.ids_restore)
    np.testing.assert_array_equal(mask.is_dropped, found.mask == 1)
    official.assert_equal(predictions, found.logits)
    official.assert_equal(np.mean(errors), found.loss)


@pytest.mark.parametrize("variant", ["vit_b", "vit_l", "vit_h"])
def test_counts_of_parameters(variant: str) -> None:
    """Of the sizes that are published, with patches of 16 pixels; what is trained alone."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model = build_autoencoder(ModelConfig(variant, image_size=(224, 224)), AutoencoderConfig())
    encoder = model.encoder
    with torch.device("meta"):
        theirs = ViTMAEForPreTraining(
            ViTMAEConfig(
                hidden_size=encoder.embed_dim,
                num_hidden_layers=encoder.depth,
                num_attention_heads=encoder.num_heads,
                intermediate_size=4 * encoder.embed_dim,
            )
        )
    ours = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))["params"]
    expected = sum(p.numel() for name, p in theirs.named_parameters() if "pos" not in name)
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == expected
