"""The predictor against the published one: the same image and prompts, the same masks."""

import dataclasses
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sam_jax.inference.images import ImageEmbeddings
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.inference.prompts import Prompt
from sam_jax.models.sam import Sam
from tests.golden.tiny import TINY
from tests.parity import official

pytestmark = pytest.mark.parity

# The published predictor knows square models only; its images may have any shape.
SQUARE = dataclasses.replace(
    TINY, image_encoder=dataclasses.replace(TINY.image_encoder, image_size=(48, 48))
)
SIZES = ((48, 48), (30, 45), (200, 77), (11, 7))


@pytest.fixture(scope="module")
def theirs(segment_anything: ModuleType) -> Any:
    return segment_anything.SamPredictor(official.build(SQUARE))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


@pytest.fixture(scope="module")
def ours(theirs: Any) -> Predictor:
    variables = official.native_variables(theirs.model, SQUARE)
    return Predictor(Sam(SQUARE), variables, Buckets(images=(4,), rows=(4,), prompts=(8,)))


@pytest.fixture(scope="module")
def embeddings(ours: Predictor, images: list[np.ndarray]) -> ImageEmbeddings:
    return ours.embed(images)


def prompts_for(size: tuple[int, int]) -> list[dict[str, Any]]:
    """Arguments of the published ``predict``."""
    rng = np.random.default_rng(size[0])
    height, width = size
    points = rng.uniform(0, (width - 1, height - 1), (3, 2))
    box = np.array([0.1 * width, 0.2 * height, 0.8 * width, 0.9 * height])
    logits = rng.normal(0, 6, (1, 48, 48)).astype(np.float32)
    one = {"point_coords": points[:1], "point_labels": np.array([1])}
    three = {"point_coords": points, "point_labels": np.array([1, 0, 1])}
    return [
        one,
        three,
        {"box": box},
        {**three, "box": box},
        {"mask_input": logits, **one},
        {"mask_input": logits, "box": box},
    ]


@pytest.mark.parametrize("multimask_output", [True, False])
def test_masks_scores_and_logits(
    theirs: Any,
    ours: Predictor,
    images: list[np.ndarray],
    embeddings: ImageEmbeddings,
    multimask_output: bool,
) -> None:
    prompts = [
        [
            Prompt(
                points=arguments.get("point_coords", ()),
                labels=arguments.get("point_labels"),
                box=arguments.get("box"),
                mask=arguments["mask_input"][0] if "mask_input" in arguments else None,
            )
            for arguments in prompts_for(size)
        ]
        for size in SIZES
    ]
    found = ours.predict(embeddings, prompts, multimask_output=multimask_output)
    for size, image, prediction in zip(SIZES, images, found, strict=True):
        theirs.set_image(image)
        for number, arguments in enumerate(prompts_for(size)):
            masks, scores, logits = theirs.predict(**arguments, multimask_output=multimask_output)
            official.assert_equal(prediction.low_res_logits[number], logits)
            official.assert_equal(prediction.iou_predictions[number], scores)
            differing = prediction.masks()[number] != masks
            # Only pixels whose interpolated logit is zero to the last bits may fall otherwise.
            assert differing.mean() < 2e-3, (size, number)
