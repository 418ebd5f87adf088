"""Weights that leave and come back: the published code and ``transformers`` load them strictly."""

import dataclasses
import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from sam_jax.models.mask_decoder import MaskPrediction
from sam_jax.models.prompt_encoder import Prompts
from sam_jax.models.sam import Sam, SamConfig, variable_shapes
from sam_jax.models.variants import VARIANTS
from sam_jax.weights import load as checkpoints
from sam_jax.weights.load import open_weights, save
from sam_jax.weights.names import to_native
from tests.golden.tiny import TINY
from tests.parity import official
from tests.parity.official import torch

pytestmark = pytest.mark.parity


def shallow(name: str) -> SamConfig:
    """A published variant at full width with one windowed and one global block.

    Its depth is what a test cannot wait for: every block is like one of these two.
    """
    config = VARIANTS[name]
    encoder = dataclasses.replace(
        config.image_encoder, depth=2, global_attention_blocks=(1,), image_size=(256, 256)
    )
    return dataclasses.replace(config, image_encoder=encoder)


SQUARE = dataclasses.replace(
    TINY, image_encoder=dataclasses.replace(TINY.image_encoder, image_size=(48, 48))
)
CONFIGS = {"tiny": SQUARE} | {name: shallow(name) for name in ("vit_b", "vit_l", "vit_h")}


@pytest.fixture(scope="module", params=CONFIGS, ids=list(CONFIGS))
def pair(request: pytest.FixtureRequest, segment_anything: ModuleType) -> tuple[Any, SamConfig]:
    config = CONFIGS[request.param]
    return official.build(config), config


@pytest.fixture(scope="module")
def published_file(pair: tuple[Any, SamConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "sam.pth"
    torch.save(pair[0].state_dict(), path)
    return path


def heads(config: SamConfig) -> int:
    return config.mask_decoder.num_heads


def test_published_to_native_to_published_is_the_identity(
    pair: tuple[Any, SamConfig], published_file: Path, tmp_path: Path
) -> None:
    theirs, config = pair
    checkpoints.convert(published_file, tmp_path / "run", "orbax", decoder_heads=heads(config))
    checkpoints.convert(tmp_path / "run", tmp_path / "back.pth", "official")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    expected = theirs.state_dict()
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(back[name], tensor), name
    # A model that has none of them takes them all.
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    for tensor in theirs.state_dict().values():
        tensor.zero_()
    theirs.load_state_dict(back, strict=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_hugging_face_loads_every_tensor_and_gives_it_back(
    pair: tuple[Any, SamConfig], published_file: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    _, config = pair
    checkpoints.convert(
        published_file, tmp_path / "hf", "hugging-face", decoder_heads=heads(config)
    )
    model, info = transformers.SamModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], kind
    model.save_pretrained(tmp_path / "again")
    ours, again = open_weights(tmp_path / "hf"), open_weights(tmp_path / "again")
    assert again.config == ours.config == config_with_tuples(config)
    assert again.tensors.keys() == ours.tensors.keys()
    for name, array in ours.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], array, err_msg=name)
    checkpoints.convert(tmp_path / "again", tmp_path / "back.pth", "official")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    for name, tensor in torch.load(published_file, weights_only=True).items():
        assert torch.equal(back[name], tensor), name


def config_with_tuples(config: SamConfig) -> SamConfig:
    encoder = config.image_encoder
    blocks = tuple(encoder.global_attention_blocks)
    return dataclasses.replace(
        config, image_encoder=dataclasses.replace(encoder, global_attention_blocks=blocks)
    )


@torch.no_grad()
def test_outputs_agree_with_hugging_face(
    pair: tuple[Any, SamConfig], published_file: Path, tmp_path: Path
) -> None:
    """An image that is not square: its lower third is padding, zero after normalising."""
    transformers = pytest.importorskip("transformers")
    _, config = pair
    side = config.image_encoder.image_size[0]
    save_to = tmp_path / "hf"
    checkpoints.convert(published_file, save_to, "hugging-face", decoder_heads=heads(config))
    theirs = transformers.SamModel.from_pretrained(save_to).eval()
    model, variables = checkpoints.load(save_to)

    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, side, side, 3)).astype(np.float32)
    image[:, side * 2 // 3 :] = 0
    embeddings = jax.jit(functools.partial(model.apply, method=Sam.encode))(variables, image)
    their_embeddings = theirs.get_image_embeddings(
        torch.from_numpy(image).permute(0, 3, 1, 2).contiguous()
    )
    np.testing.assert_allclose(
        embeddings, their_embeddings.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-4
    )
    points = rng.uniform(0, side * 2 / 3, (1, 3, 2, 2)).astype(np.float32)
    labels = rng.integers(0, 2, (1, 3, 2)).astype(np.int32)
    corners = np.sort(rng.uniform(0, side * 2 / 3, (1, 3, 2, 2)), axis=2)
    boxes = corners.reshape(1, 3, 4).astype(np.float32)
    everywhere = np.ones((1, 3), bool)
    low_res = model.low_res_size
    logits = 6 * rng.standard_normal((1, 1, *low_res)).astype(np.float32)

    decoders = {
        multimask: jax.jit(
            functools.partial(model.apply, multimask_output=multimask, method=Sam.decode)
        )
        for multimask in (True, False)
    }
    # One program for all: what a prompt has not is there, and not valid.
    nothing = Prompts(
        point_coords=points,
        point_labels=labels,
        point_valid=np.zeros_like(labels, bool),
        boxes_xyxy=boxes,
        box_valid=~everywhere,
        mask_logits=np.tile(logits, (1, 3, 1, 1)),
        mask_valid=~everywhere,
    )
    first = np.array([[True, False, False]])
    clicked = np.ones_like(labels, bool)
    clicks = {"input_points": points, "input_labels": labels.astype(np.int64)}
    for name, their_prompts, our_prompts in (
        ("points", clicks, nothing.replace(point_valid=clicked)),
        ("boxes", {"input_boxes": boxes}, nothing.replace(box_valid=everywhere)),
        (
            "points and masks",
            # That library takes one mask per image, for all of its objects.
            {name: value[:, :1] for name, value in clicks.items()} | {"input_masks": logits},
            nothing.replace(point_valid=clicked & first[..., None], mask_valid=first),
        ),
        (
            "points and boxes",
            clicks | {"input_boxes": boxes},
            nothing.replace(point_valid=clicked, box_valid=everywhere),
        ),
    ):
        for multimask in (True, False):
            expected = theirs(
                image_embeddings=their_embeddings,
                multimask_output=multimask,
                **{key: torch.from_numpy(value) for key, value in their_prompts.items()},
            )
            found: MaskPrediction = decoders[multimask](variables, embeddings, our_prompts)
            for ours, reference in (
                (found.low_res_logits, expected.pred_masks),
                (found.iou_predictions, expected.iou_scores),
            ):
                np.testing.assert_allclose(
                    ours[:, : reference.shape[1]],
                    reference.numpy(),
                    rtol=0,
                    atol=1e-4,
                    err_msg=f"{name}, {multimask=}",
                )


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["vit_b", "vit_l", "vit_h"])
def test_the_published_registry_loads_what_is_written(
    segment_anything: ModuleType, tmp_path: Path, variant: str
) -> None:
    """At full size, strictly; every tensor is told apart by its number."""
    config = VARIANTS[variant]
    template = variable_shapes(config)
    leaves, structure = jax.tree.flatten(template)
    # Of one element each, and of half the size of a float: full size on disk alone.
    numbered = [
        np.broadcast_to(np.float16(number), leaf.shape) for number, leaf in enumerate(leaves)
    ]
    path = tmp_path / "sam.pth"
    save(path, config, jax.tree.unflatten(structure, numbered), "official")
    with torch.device("meta"):
        model = segment_anything.sam_model_registry[variant]()
    state = torch.load(path, weights_only=True, mmap=True)
    model.load_state_dict(state, strict=True, assign=True)
    assert open_weights(path).config == config_with_tuples(config)
    expected = to_native(official.numpy_state(model), template)
    for number, leaf in enumerate(jax.tree.leaves(expected)):
        assert (leaf == np.float16(number)).all(), number
