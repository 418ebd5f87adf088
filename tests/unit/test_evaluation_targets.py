"""Target masks: their boxes, as the model gets them."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam_jax import rle
from sam_jax.evaluation.targets import EvalImage, TargetMask
from sam_jax.inference.prompts import Prompt, check_prompt


def targets(masks: np.ndarray) -> list[TargetMask]:
    """Of an image that is as large as the masks."""
    pixels = np.zeros((*masks.shape[1:], 3), np.uint8)
    image = EvalImage("boxes", "image.png", pixels, masks, tuple(range(len(masks))))
    return [TargetMask(image, position) for position in range(len(masks))]


def model_box(target: TargetMask, resized_hw: tuple[int, int]) -> np.ndarray:
    """The box in pixels of the model's input."""
    checked = check_prompt(
        Prompt(box=target.prompt_box_xyxy(resized_hw)),
        "the prompt",
        original_hw=target.ground_truth.shape,
        resized_hw=resized_hw,
        model_hw=resized_hw,
        low_res_hw=(1, 1),
    )
    assert checked.box is not None
    return checked.box


@pytest.mark.parametrize(
    "resized_hw", [(32, 48), (64, 96), (96, 192), (128, 64), (24, 30), (7, 11)]
)
def test_boxes_are_those_that_training_makes(resized_hw: tuple[int, int]) -> None:
    """The tight box of the resized mask, to the half pixel by which whole pixels miss it.

    Of an object thinner than a pixel of the model's input there is no resized mask, or less of it.
    """
    limit = 0.5 if min(resized_hw[0] / 32, resized_hw[1] / 48) >= 0.5 else 1.0
    rng = np.random.default_rng(0)
    masks = np.zeros((40, 32, 48), bool)
    for mask in masks:
        (y0, y1), (x0, x1) = (np.sort(rng.integers(0, side + 1, 2)) for side in (32, 48))
        mask[y0 : y1 + 1, x0 : x1 + 1] = True
    grid, compared = rle.Grid((32, 48), resized_hw), 0
    for target in targets(masks):
        ours = model_box(target, resized_hw)
        assert (ours[:2] <= ours[2:]).all()
        encoded = coco_mask.encode(np.asfortranarray(target.ground_truth, np.uint8))
        resized = grid.resample(rle.run_lengths(encoded))
        if not resized.any():
            continue
        ys, xs = np.nonzero(resized)
        np.testing.assert_array_less(
            np.abs(ours - [xs.min(), ys.min(), xs.max(), ys.max()]), limit + 1e-6
        )
        compared += 1
    assert compared > 20


def test_the_box_of_an_enlarged_mask_ends_where_the_mask_does() -> None:
    mask = np.zeros((1, 32, 32), bool)
    mask[:, 3:9, 8:24] = True
    (target,) = targets(mask)
    assert target.box_xyxy == (8, 3, 23, 8)
    np.testing.assert_array_equal(model_box(target, (128, 128)), [32, 12, 95, 35])


def test_the_box_of_a_mask_thinner_than_a_pixel_of_the_model_is_where_the_mask_is() -> None:
    mask = np.zeros((3, 40, 40), bool)
    mask[0, 20, 8:32] = mask[1, 0, 8:32] = mask[2, 39, 8:32] = True
    inside, first, last = (model_box(target, (10, 10)) for target in targets(mask))
    # The row's centre is 20.5 original pixels from the top, 5.125 of the model's.
    np.testing.assert_allclose(inside, [2, 4.625, 7, 4.625])
    # A box ends with the image, which its first row is nearer to than half a pixel.
    np.testing.assert_allclose(first, [2, 0, 7, 0])
    np.testing.assert_allclose(last, [2, 9.375, 7, 9.375])
