"""Prompts are checked one by one, brought to the model's frame, and padded with their validity."""

import numpy as np
import pytest

from sam_jax.inference.prompts import (
    MASK_LOGIT,
    Prompt,
    PromptError,
    check_prompt,
    mask_logits,
    pad_rows,
    rows_of,
)

# An image of 20 x 40 in a model input of 32 x 32: half as large again would not fit.
FRAME = {
    "original_hw": (20, 40),
    "resized_hw": (16, 32),
    "model_hw": (32, 32),
    "low_res_hw": (8, 8),
}


def check(prompt: Prompt):
    return check_prompt(prompt, "image 3, prompt 4", **FRAME)


def test_coordinates_are_scaled_to_the_models_frame() -> None:
    checked = check(Prompt(points=[(10, 5), (39, 19)], labels=[1, 0], box=(0, 2, 40, 10)))
    np.testing.assert_allclose(checked.points, [[8, 4], [31.2, 15.2]], rtol=1e-6)
    np.testing.assert_array_equal(checked.labels, [1, 0])
    np.testing.assert_allclose(checked.box, [0, 1.6, 32, 8], rtol=1e-6)
    assert check(Prompt(points=np.array([[1.0, 2.0]]))).labels.tolist() == [1]


def test_a_box_is_cut_at_the_images_edge() -> None:
    checked = check(Prompt(box=(-5, -5, 400, 400)))
    np.testing.assert_allclose(checked.box, [0, 0, 32, 16])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Prompt(), "is empty: give points, a box or a mask"),
        (Prompt(points=[(1, 2, 3)]), r"points have shape \(1, 3\)"),
        (Prompt(points=[(1, float("nan"))]), "not finite"),
        (Prompt(points=[("a", 1)]), "expected numbers"),
        (Prompt(points=[(40, 3)]), r"point \(40, 3\) lies outside of the image, which is 40 wide"),
        (Prompt(points=[(3, -1)]), "lies outside"),
        (Prompt(points=[(1, 2)], labels=[1, 0]), "1 points come with 2 labels"),
        (Prompt(points=[(1, 2)], labels=[2]), "label 2 must be 1 .* or 0"),
        (Prompt(points=[(1, 2)], labels=[0.5]), r"label 0\.5 must be"),
        (Prompt(labels=[1]), "0 points come with 1 labels"),
        (Prompt(box=(1, 2, 3)), r"the box has shape \(3,\)"),
        (Prompt(box=(9, 2, 3, 8)), r"box \(9, 2, 3, 8\) is reversed.*not width and height"),
        (Prompt(box=(1, 2, float("inf"), 8)), "not finite"),
        (Prompt(box=(50, 2, 60, 8)), "lies outside of the image"),
        (Prompt(mask=np.zeros((3, 3), bool)), r"the mask is bool \(3, 3\); expected float logits"),
        (Prompt(mask=np.zeros((20, 40))), r"the mask is float64 \(20, 40\)"),
        (Prompt(mask=np.full((8, 8), np.nan)), "values that are not finite"),
    ],
)
def test_what_is_wrong_is_named(prompt: Prompt, words: str) -> None:
    with pytest.raises(PromptError, match=f"^image 3, prompt 4.*{words}"):
        check(prompt)


def test_a_binary_mask_becomes_logits_of_the_models_size() -> None:
    mask = np.zeros((20, 40), bool)
    mask[:10, :20] = True
    logits = mask_logits(mask, (16, 32), (32, 32), (8, 8))
    expected = np.full((8, 8), -MASK_LOGIT)
    expected[:2, :4] = MASK_LOGIT
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_array_equal(check(Prompt(mask=mask)).mask_logits, logits)
    np.testing.assert_array_equal(
        check(Prompt(mask=mask.astype(np.uint8) * 255)).mask_logits, logits
    )
    given = np.linspace(-3, 3, 64).reshape(8, 8)
    np.testing.assert_allclose(check(Prompt(mask=given)).mask_logits, given, rtol=1e-6)


def test_rows_and_padding() -> None:
    one, two = check(Prompt(points=[(1, 2)])), check(Prompt(box=(0, 0, 9, 9)))
    rows = list(rows_of([[one, two, one], [], [two]], 2))
    assert [(row.image, len(row.prompts)) for row in rows] == [(0, 2), (0, 1), (2, 1)]
    padded = pad_rows(rows, num_rows=4, row_length=2, num_points=3, low_res_hw=None)
    assert padded.point_coords.shape == (4, 2, 3, 2)
    assert padded.point_valid.sum() == 2
    np.testing.assert_array_equal(
        padded.box_valid, [[False, True], [False, False], [True, False], [False, False]]
    )
    assert padded.mask_logits is None
    assert padded.mask_valid is None
