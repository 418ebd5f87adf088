"""The parts of the automatic search, each against a plain or a known answer."""

import numpy as np
import pytest

from sam_jax.data import rle
from sam_jax.errors import ConfigError
from sam_jax.inference.automatic import SA1B_OPTIONS, AutomaticOptions, generate_masks
from sam_jax.inference.candidates import box_nms, remove_small_regions
from sam_jax.inference.images import ImageError
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.inference.regions import crop_boxes, point_grid
from sam_jax.models.sam import Sam
from tests.golden.tiny import TINY, random_variables

RNG = np.random.default_rng(0)


def plain_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    def iou(a: np.ndarray, b: np.ndarray) -> float:
        sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        overlap = np.prod(np.maximum(sides, 0))
        return overlap / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - overlap)

    kept: list[int] = []
    for index in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[index], boxes[other]) <= threshold for other in kept):
            kept.append(index)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.7, 0.95])
def test_nms_is_the_greedy_one_at_any_threshold(threshold: float) -> None:
    for _ in range(10):
        corners = RNG.integers(0, 20, (40, 2))
        boxes = np.concatenate([corners, corners + RNG.integers(1, 20, (40, 2))], axis=1)
        # Few values, so that there are ties, which the earlier box wins.
        scores = RNG.integers(0, 8, 40).astype(float)
        assert box_nms(boxes.astype(float), scores, threshold) == plain_nms(
            boxes, scores, threshold
        )


def test_nms_of_nothing_and_of_boxes_without_area() -> None:
    assert box_nms(np.zeros((0, 4)), np.zeros(0), 0.5) == []
    assert sorted(box_nms(np.zeros((2, 4)), np.zeros(2), 0.5)) == [0, 1]


def test_crops_are_those_of_the_released_annotations() -> None:
    """An image of SA-1B, 2000 x 1500, in whose annotations these boxes stand."""
    boxes, layers = crop_boxes((1500, 2000), 2, SA1B_OPTIONS.crop_overlap_ratio)
    assert [layers.count(layer) for layer in range(3)] == [1, 4, 16]
    first = {box for box, layer in zip(boxes, layers, strict=True) if layer == 1}
    assert {(x1 - x0, y1 - y0) for x0, y0, x1, y1 in first} == {(1256, 1006)}
    assert {x0 for x0, *_ in first} == {0, 744}
    second = {box for box, layer in zip(boxes, layers, strict=True) if layer == 2}
    assert {x0 for x0, *_ in second} == {0, 436, 872, 1308}
    assert {(x1 - x0, y1 - y0) for x0, y0, x1, y1 in second} == {(692, 567)}
    assert max(x1 for _, _, x1, _ in boxes) == 2000
    assert max(y1 for *_, y1 in boxes) == 1500


def test_grid() -> None:
    np.testing.assert_allclose(
        point_grid(2), [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    )


def test_small_holes_are_filled_and_small_islands_removed() -> None:
    mask = np.zeros((12, 12), bool)
    mask[1:9, 1:9] = True
    mask[3, 3] = mask[5:8, 5:8] = False
    mask[11, 11] = True
    filled, changed = remove_small_regions(mask, 5, "holes")
    assert changed
    assert filled[3, 3]
    assert not filled[6, 6]
    cleaned, changed = remove_small_regions(filled, 5, "islands")
    assert changed
    assert not cleaned[11, 11]
    assert cleaned[1, 1]
    same, changed = remove_small_regions(cleaned, 5, "islands")
    assert not changed
    np.testing.assert_array_equal(same, cleaned)


def test_the_largest_of_small_islands_stays() -> None:
    mask = np.zeros((9, 9), bool)
    mask[0, 0] = mask[4, 4:6] = True
    cleaned, changed = remove_small_regions(mask, 50, "islands")
    assert changed
    assert np.argwhere(cleaned).tolist() == [[4, 4], [4, 5]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"points_per_side": 0}, "points_per_side must be at least 1, got 0"),
        ({"crop_n_layers": -1}, "must not be negative"),
        ({"max_area_rate": 0.0}, "max_area_rate must be in"),
        (
            {"points_per_side": 3, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2},
            "layer 2 of crops has no points left",
        ),
    ],
)
def test_impossible_options_are_named(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AutomaticOptions(**changes)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(Sam(TINY), random_variables(TINY), Buckets((1,), (1,), (16,), (1,)))


EVERYTHING = AutomaticOptions(
    points_per_side=4,
    points_per_batch=16,
    pred_iou_thresh=0.0,
    stability_score_thresh=0.0,
    box_nms_thresh=1.0,
)


def test_embeddings_at_hand_are_used(predictor: Predictor) -> None:
    image = RNG.integers(0, 256, (30, 50, 3), np.uint8)
    embeddings = predictor.embed([image])
    found = generate_masks(predictor, image, EVERYTHING, embeddings=embeddings)
    again = generate_masks(predictor, image, EVERYTHING)
    assert len(found) == len(again) == 48
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one["segmentation"], other["segmentation"])
    with pytest.raises(ImageError, match="embeddings must be those of this image alone"):
        generate_masks(predictor, image[:20], EVERYTHING, embeddings=embeddings)


def test_run_lengths_are_of_one_mask_in_every_form(predictor: Predictor) -> None:
    image = RNG.integers(0, 256, (30, 50, 3), np.uint8)
    forms = [
        generate_masks(predictor, image, EVERYTHING, output_mode=mode)
        for mode in ("binary_mask", "uncompressed_rle", "coco_rle")
    ]
    for array, runs, string in zip(*forms, strict=True):
        mask = array["segmentation"]
        size = runs["segmentation"]["size"]
        flat = np.repeat(
            np.arange(len(runs["segmentation"]["counts"])) % 2, runs["segmentation"]["counts"]
        )
        np.testing.assert_array_equal(flat.reshape(size[::-1]).T, mask)
        decoded = rle.decode(rle.run_lengths(string["segmentation"]), tuple(size))
        np.testing.assert_array_equal(decoded, mask)
        assert array["area"] == mask.sum()


def test_masks_of_nearly_everything_may_be_dropped(predictor: Predictor) -> None:
    import dataclasses

    image = RNG.integers(0, 256, (30, 50, 3), np.uint8)
    limited = dataclasses.replace(EVERYTHING, max_area_rate=0.5)
    every = generate_masks(predictor, image, EVERYTHING)
    areas = [record["area"] for record in every]
    assert min(areas) < 750 < max(areas)
    found = generate_masks(predictor, image, limited)
    assert [record["area"] for record in found] == [area for area in areas if area < 750]
