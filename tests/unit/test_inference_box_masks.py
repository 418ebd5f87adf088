"""Masks from boxes: as the predictor answers each box by itself, in whatever calls they come."""

import numpy as np
import pytest

from sam_jax import rle
from sam_jax.errors import ConfigError
from sam_jax.inference.box_masks import BoxedImage, BoxOptions, masks_of_boxes
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.inference.prompts import Prompt
from sam_jax.models.sam import Sam
from tests.golden.tiny import SHALLOW, random_variables

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(Sam(SHALLOW), random_variables(SHALLOW), Buckets((2,), (2,), (3,), (1,)))


@pytest.fixture(scope="module")
def images() -> list[BoxedImage]:
    rng = np.random.default_rng(0)
    sizes, counts = [(30, 40), (20, 24), (9, 50), (40, 40), (10, 10)], [4, 0, 1, 7, 2]
    boxed = []
    for (height, width), count in zip(sizes, counts, strict=True):
        corners = rng.uniform(0, [width, height], (count, 2, 2))
        boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        boxed.append(BoxedImage(pixels, boxes))
    return boxed


@pytest.mark.parametrize("refine", [False, True])
def test_every_box_has_its_own_best_mask(
    predictor: Predictor, images: list[BoxedImage], refine: bool
) -> None:
    options = BoxOptions(refine, images_per_call=2, boxes_per_call=3)
    answers = list(masks_of_boxes(predictor, images, options))
    assert [len(masks) for masks in answers] == [len(image.boxes_xyxy) for image in images]
    for image, masks in zip(images, answers, strict=True):
        embeddings = predictor.embed([image.pixels])
        for box, mask in zip(image.boxes_xyxy, masks, strict=True):
            (expected,) = predictor.predict(embeddings, [[Prompt(box=box)]])
            if refine:
                best = expected.iou_predictions[0].argmax()
                prompt = Prompt(box=box, mask=expected.low_res_logits[0, best])
                (expected,) = predictor.predict(embeddings, [[prompt]], multimask_output=False)
            drawn = rle.decode(rle.run_lengths(mask.mask_rle), image.pixels.shape[:2])
            np.testing.assert_array_equal(drawn, expected.mask(0))
            assert abs(mask.predicted_iou - expected.iou_predictions.max()) < TOLERANCE
            assert 0 <= mask.stability_score <= 1
            if drawn.any():
                rows, columns = np.nonzero(drawn)
                outermost = (columns.min(), rows.min(), columns.max(), rows.max())
                assert mask.mask_box_xyxy == outermost


def test_images_are_read_as_they_are_needed(predictor: Predictor, images: list[BoxedImage]) -> None:
    read = 0

    def stream():
        nonlocal read
        for image in images * 4:
            read += 1
            yield image

    answers = masks_of_boxes(predictor, stream(), BoxOptions(images_per_call=2, boxes_per_call=3))
    next(answers)
    assert read <= 4
    answers.close()


def test_options_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="boxes_per_call must be at least 1, got 0"):
        BoxOptions(boxes_per_call=0)
