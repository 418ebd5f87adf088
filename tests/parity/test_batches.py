"""Batches with ragged prompts against the published code, one image or object at a time."""

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.models.prompt_encoder import Prompts
from sam_jax.models.sam import Sam
from sam_jax.ops.images import normalize_images
from tests.golden.tiny import EVERY_COMBINATION, TINY, ragged_batch, random_prompts
from tests.parity import official
from tests.parity.conftest import Pair

pytestmark = pytest.mark.parity

torch = official.torch


@pytest.mark.parametrize("multimask_output", [True, False])
def test_every_combination_in_one_batch(
    tiny: Pair, tiny_embeddings: np.ndarray, multimask_output: bool
) -> None:
    low_res = tiny.model.low_res_size
    every = [
        random_prompts(kinds, 1, tiny.model.image_size, low_res)
        for kinds in EVERY_COMBINATION.values()
    ]
    objects = [every[:6], every[6:]]
    predictions = jax.jit(
        lambda v, e, p: tiny.model.apply(
            v, e, p, multimask_output=multimask_output, method=Sam.decode
        )
    )(tiny.variables, jnp.asarray(tiny_embeddings), ragged_batch(objects, low_res))
    for image, prompts_of_image in enumerate(objects):
        for index, prompts in enumerate(prompts_of_image):
            logits, iou = official.decode(
                tiny.official, tiny_embeddings[image], prompts, multimask_output=multimask_output
            )
            official.assert_equal(predictions.low_res_logits[image, index], logits[0])
            official.assert_equal(predictions.iou_predictions[image, index], iou[0])


def test_whole_model(segment_anything: ModuleType) -> None:
    """The published entry point, from bytes: two images of different sizes, prompts of each."""
    config = dataclasses.replace(
        TINY, image_encoder=dataclasses.replace(TINY.image_encoder, image_size=(48, 48))
    )
    theirs = official.build(config, seed=1)
    ours = Sam(config)
    variables = official.native_variables(theirs, config)
    rng = np.random.default_rng(0)
    sizes = [(48, 35), (29, 48)]
    images = np.zeros((2, 48, 48, 3), np.uint8)
    records, objects = [], []
    for index, (size, names) in enumerate(
        zip(sizes, (["box_and_points"] * 3, ["n_points"] * 2), strict=True)
    ):
        images[index, : size[0], : size[1]] = rng.integers(0, 256, (*size, 3))
        image = torch.from_numpy(images[index, : size[0], : size[1]]).permute(2, 0, 1)
        prompts = random_prompts(
            EVERY_COMBINATION[names[0]], len(names), config.image_encoder.image_size, (48, 48)
        )
        given = {key: torch.from_numpy(value) for key, value in prompts.items()}
        records.append({"image": image, "original_size": size, **given})
        objects.append(
            [{key: value[[i]] for key, value in prompts.items()} for i in range(len(names))]
        )
    expected = theirs(records, multimask_output=True)

    @jax.jit
    def predict(variables: Any, images: Any, image_hw: Any, prompts: Prompts) -> Any:
        normalized = normalize_images(images, image_hw)
        return ours.apply(variables, normalized, prompts, multimask_output=True)

    predictions = predict(
        variables, jnp.asarray(images), jnp.asarray(sizes), ragged_batch(objects, ours.low_res_size)
    )
    for image, record in enumerate(expected):
        count = len(objects[image])
        logits = predictions.low_res_logits[image, :count]
        official.assert_equal(logits, record["low_res_logits"])
        official.assert_equal(predictions.iou_predictions[image, :count], record["iou_predictions"])
