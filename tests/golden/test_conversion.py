"""Weights to the published names and back: identity on every tensor, and errors that list all."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from sam_jax.models.masked_autoencoder import AutoencoderConfig, MaskedAutoencoder
from sam_jax.models.sam import SamConfig, variable_shapes
from sam_jax.models.variants import VARIANTS
from sam_jax.weights.names import (
    KINDS,
    RULES,
    TABLE,
    Rule,
    foreign_names,
    from_native,
    native_path,
    to_native,
)
from tests.golden.tiny import TINY, random_autoencoder
from tests.golden.tiny_mobile_sam import SMALL as MOBILE_SAM

AUTOENCODER = MaskedAutoencoder(
    TINY.image_encoder, AutoencoderConfig(decoder_dim=16, decoder_depth=1, decoder_heads=2)
)


def shapes(config: SamConfig) -> dict[str, Any]:
    return variable_shapes(config)


def two_blocks(config: SamConfig) -> SamConfig:
    """One block with windows and one without, at full width."""
    encoder = dataclasses.replace(config.image_encoder, depth=2, global_attention_blocks=(1,))
    return dataclasses.replace(config, image_encoder=encoder)


def integers(template: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    dtype = np.int16  # whole numbers survive every float format; a small type saves memory
    return jax.tree.map(lambda leaf: rng.integers(-(2**15), 2**15, leaf.shape, dtype), template)


@pytest.mark.parametrize(
    "config",
    [VARIANTS["vit_b"], two_blocks(VARIANTS["vit_l"]), two_blocks(VARIANTS["vit_h"]), TINY],
    ids=["vit_b", "vit_l-two-blocks", "vit_h-two-blocks", "tiny"],
)
def test_round_trip_is_the_identity(config: SamConfig) -> None:
    template = shapes(config)
    ours = integers(template)
    theirs = from_native(ours)
    again = to_native(theirs, template)
    back = from_native(again)

    expected, found = flatten_dict(ours, sep="/"), flatten_dict(again, sep="/")
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype
        assert np.array_equal(found[path], array), path
    assert back.keys() == theirs.keys()
    for name, array in theirs.items():
        assert np.array_equal(back[name], array), name


def test_every_row_serves_and_no_two_overlap() -> None:
    both = [list(flatten_dict(shapes(config), sep="/")) for config in (TINY, MOBILE_SAM)]
    for paths in both:
        layers: dict[str, str] = {}
        for path in paths:
            names = foreign_names(path)
            assert names
            assert path in {native_path(name) for name in names}
            for name in names:
                # Kernel and bias of one layer may share tensors, of a normalisation.
                layer = layers.setdefault(name, path.rpartition("/")[0])
                assert layer == path.rpartition("/")[0]
    # No row is there for nothing, and no kind of layer.
    both.append(list(flatten_dict(random_autoencoder(AUTOENCODER), sep="/")))
    for scheme, rules in RULES.items():
        served = {name for path in itertools.chain(*both) for name in foreign_names(path, scheme)}
        for rule in rules:
            own = filter(pattern_of(rule).fullmatch, served)
            assert any(native_path(name, scheme) for name in own), rule
    assert {row.kind for row in TABLE} == set(KINDS)


def pattern_of(rule: Rule) -> re.Pattern[str]:
    """What a rule's names match, their fields being words or numbers."""
    return re.compile(
        "|".join(re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(name)) for name in rule.foreign)
    )


def test_published_names() -> None:
    """Some by hand, one of each kind; tests/parity compares all of them."""
    attention = "block_11/attn/qkv/kernel"
    assert foreign_names(f"params/image_encoder/{attention}") == (
        "image_encoder.blocks.11.attn.qkv.weight",
    )
    assert native_path("image_encoder.blocks.3.norm1.weight") == (
        "params/image_encoder/block_03/norm1/scale"
    )
    assert foreign_names("constants/prompt_encoder/frequencies") == (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    )
    assert foreign_names("params/mask_decoder/output_tokens") == (
        "mask_decoder.iou_token.weight",
        "mask_decoder.mask_tokens.weight",
    )
    assert native_path("prompt_encoder.point_embeddings.2.weight") == (
        "params/prompt_encoder/point_kinds"
    )
    assert foreign_names("params/image_encoder/cls_token") == ()
    assert native_path("image_encoder.cls_token") is None


def test_layouts_by_hand() -> None:
    template = shapes(TINY)
    theirs = from_native(integers(template))
    ours = to_native(theirs, template)
    params = ours["params"]
    encoder, prompts, decoder = (
        params[part] for part in ("image_encoder", "prompt_encoder", "mask_decoder")
    )

    dense = theirs["image_encoder.blocks.0.attn.qkv.weight"]
    assert encoder["block_00"]["attn"]["qkv"]["kernel"][5, 7] == dense[7, 5]
    # Row 1, column 2, channel 0 of a 4 x 4 patch
    patch = theirs["image_encoder.patch_embed.proj.weight"]
    assert encoder["patch_embed"]["proj"]["kernel"][(1 * 4 + 2) * 3 + 0, 9] == patch[9, 0, 1, 2]
    conv = theirs["image_encoder.neck.2.weight"]
    assert encoder["neck_conv2"]["kernel"][0, 2, 4, 9] == conv[9, 4, 0, 2]
    positions = theirs["image_encoder.pos_embed"]
    assert encoder["pos_embed"][9, 11, 3] == positions[0, 9, 11, 3]
    # Row 1, column 0, channel 2 of a 2 x 2 block
    block = theirs["prompt_encoder.mask_downscaling.3.weight"]
    kernel = prompts["mask_downscaling"]["conv2"]["kernel"]
    assert kernel[(1 * 2 + 0) * 3 + 2, 7] == block[7, 2, 1, 0]
    split = theirs["mask_decoder.output_upscaling.0.weight"]
    assert decoder["upscaling"]["split1"]["conv"]["kernel"][20, 0, 1, 6] == split[20, 6, 0, 1]
    tokens = theirs["mask_decoder.mask_tokens.weight"]
    assert decoder["output_tokens"][3, 8] == tokens[2, 8]
    kinds = theirs["prompt_encoder.point_embeddings.3.weight"]
    assert prompts["point_kinds"][3, 8] == kinds[0, 8]


def test_one_error_lists_every_problem_by_both_names() -> None:
    template = shapes(TINY)
    theirs = from_native(integers(template))
    del theirs["mask_decoder.iou_token.weight"]
    del theirs["image_encoder.neck.1.bias"]
    theirs["image_encoder.pos_embed"] = theirs["image_encoder.pos_embed"][:, :5]
    theirs["image_encoder.neck.2.weight"] = theirs["image_encoder.neck.2.weight"][0]
    theirs["image_encoder.blocks.3.mlp.lin1.bias"] = np.zeros(48)
    theirs["optimizer.step"] = np.zeros(())
    with pytest.raises(ValueError, match="6 problems") as error:
        to_native(theirs, template)
    lines = sorted(line.strip() for line in str(error.value).splitlines()[1:])
    assert lines == [
        (
            "misshapen: image_encoder.neck.2.weight (32, 3, 3)"
            " (native params/image_encoder/neck_conv2/kernel is (3, 3, 32, 32))"
        ),
        (
            "misshapen: image_encoder.pos_embed (1, 5, 12, 24)"
            " (native params/image_encoder/pos_embed is (10, 12, 24))"
        ),
        "missing: image_encoder.neck.1.bias (native params/image_encoder/neck_norm1/bias)",
        "missing: mask_decoder.iou_token.weight (native params/mask_decoder/output_tokens)",
        (
            "unexpected: image_encoder.blocks.3.mlp.lin1.bias"
            " (native params/image_encoder/block_03/mlp/dense_0/bias)"
        ),
        "unexpected: optimizer.step (native none)",
    ]


def test_variables_without_a_published_name_are_listed() -> None:
    variables = integers(shapes(TINY))
    flat = flatten_dict(variables, sep="/")
    flat["params/image_encoder/cls_token"] = np.zeros((1, 24))
    flat["params/image_encoder/pos_embed"] = np.zeros((120, 24))
    with pytest.raises(ValueError, match="2 problems") as error:
        from_native(unflatten_dict(flat, sep="/"))
    assert "unexpected: params/image_encoder/cls_token (official none)" in str(error.value)
    assert (
        "misshapen: params/image_encoder/pos_embed (120, 24) (official image_encoder.pos_embed)"
        in str(error.value)
    )


def test_a_part_converts_alone() -> None:
    variables = integers(shapes(TINY))
    encoder = {"params": {"image_encoder": variables["params"]["image_encoder"]}}
    theirs = from_native(encoder)
    assert all(name.startswith("image_encoder.") for name in theirs)
    back = to_native(theirs, encoder)
    jax.tree.map(np.testing.assert_array_equal, back, encoder)
