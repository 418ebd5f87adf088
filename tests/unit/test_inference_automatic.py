"""Automatic masks: one image or many, whole, in crops or in tiles, on one device or several."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from sam_jax import rle
from sam_jax.errors import ConfigError
from sam_jax.images import ImageError
from sam_jax.inference import automatic
from sam_jax.inference.automatic import AutomaticOptions, generate_masks, generate_masks_of_many
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.inference.prompts import PromptError
from sam_jax.models.sam import Sam
from tests.golden.tiny import SHALLOW, random_variables

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pred_iou_thresh": float("nan")}, "pred_iou_thresh must be a finite number, got nan"),
        ({"points_per_side": 0}, "points_per_side must be at least 1, got 0"),
        ({"crop_n_layers": -1}, "must not be negative"),
        ({"max_area_rate": 0.0}, "max_area_rate must be in"),
        ({"filter_at": "middle"}, "filter_at must be 'original' or 'low_resolution'"),
        ({"tile_px": 64, "crop_n_layers": 1}, "exclude each other"),
        ({"tile_px": 64, "tile_halo_px": 64}, "less than tile_px, 64; got 64"),
        ({"tile_px": 64, "tile_halo_px": 40}, "tile_halo_px must be above 40"),
        ({"tile_join_iou": 0.0}, "tile_join_iou must be in"),
        ({"host_memory_mib": 0}, "host_memory_mib must be at least 1"),
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
    return Predictor(Sam(SHALLOW), random_variables(SHALLOW), Buckets((1,), (1,), (16,), (1,)))


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
    image = RNG.integers(0, 256, (30, 50, 3), np.uint8)
    limited = dataclasses.replace(EVERYTHING, max_area_rate=0.5)
    every = generate_masks(predictor, image, EVERYTHING)
    areas = [record["area"] for record in every]
    assert min(areas) < 750 < max(areas)
    found = generate_masks(predictor, image, limited)
    assert [record["area"] for record in found] == [area for area in areas if area < 750]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for record, reference in zip(found, expected, strict=True):
        assert record.keys() == reference.keys()
        assert record["point_coords"] == reference["point_coords"]
        assert record["predicted_iou"] == pytest.approx(reference["predicted_iou"], abs=1e-5)
        assert abs(record["area"] - reference["area"]) <= 1


CROPS = dataclasses.replace(EVERYTHING, crop_n_layers=1, crop_nms_thresh=1.0)


@pytest.mark.parametrize("regions_per_batch", [1, 3])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_stream_of_images_is_answered_as_each_alone(
    predictor: Predictor, num_devices: int, regions_per_batch: int
) -> None:
    """Batches hold regions of one image or of several, and devices share them."""
    if jax.local_device_count() < num_devices:
        pytest.skip(f"needs {num_devices} devices")
    images = [RNG.integers(0, 256, (*size, 3), np.uint8) for size in ((30, 50), (48, 40), (7, 9))]
    spread = Predictor(
        Sam(SHALLOW),
        random_variables(SHALLOW),
        Buckets((regions_per_batch,), (1,), (1,), (1,)),
        devices=jax.local_devices()[:num_devices],
    )
    options = dataclasses.replace(CROPS, regions_per_batch=regions_per_batch)
    # It is a stream: the first answer comes before the last image is asked for.
    asked = []

    def stream() -> Any:
        for number, image in enumerate(images):
            asked.append(number)
            yield image

    answers = generate_masks_of_many(spread, stream(), options, output_mode="uncompressed_rle")
    together = [next(answers)]
    assert len(asked) < 3 or regions_per_batch * num_devices > 5
    together += answers
    assert len(together) == 3
    for image, found in zip(images, together, strict=True):
        expected = generate_masks(predictor, image, CROPS, output_mode="uncompressed_rle")
        assert len(expected) > 3
        assert_same(found, expected)


def test_points_without_a_good_candidate_are_not_drawn(predictor: Predictor) -> None:
    embeddings = predictor.embed([RNG.integers(0, 256, (30, 50, 3), np.uint8)])
    points = [RNG.uniform(0, 29, (21, 2))]
    (everything,) = predictor.predict_points(
        embeddings, points, points_per_batch=32, iou_threshold=-np.inf
    )
    assert everything.points.tolist() == np.repeat(np.arange(21), 3).tolist()
    ious = everything.iou_predictions
    # Between two of them: chunks of another size round otherwise.
    threshold = float(np.sort(ious)[40:42].mean())
    batches = list(
        predictor.predict_points(embeddings, points, points_per_batch=8, iou_threshold=threshold)
    )
    assert len(batches) == 3
    numbers = np.concatenate([batch.points for batch in batches])
    assert numbers.tolist() == everything.points[ious > threshold].tolist()
    np.testing.assert_allclose(
        np.concatenate([batch.low_res_logits for batch in batches]),
        everything.low_res_logits[ious > threshold],
        rtol=0,
        atol=2e-5,
    )


def test_filters_may_look_at_low_resolution(predictor: Predictor) -> None:
    """Scores are nearly the same there, and boxes of what stays are those of the full masks."""
    image = RNG.integers(0, 256, (30, 50, 3), np.uint8)
    low = dataclasses.replace(EVERYTHING, filter_at="low_resolution")
    found = generate_masks(predictor, image, low)
    expected = generate_masks(predictor, image, EVERYTHING)
    assert_same(found, expected)
    for record, reference in zip(found, expected, strict=True):
        assert record["bbox"] == reference["bbox"]
        np.testing.assert_array_equal(record["segmentation"], reference["segmentation"])
        assert record["stability_score"] == pytest.approx(reference["stability_score"], abs=0.15)


def test_tiles_search_a_large_image_besides_the_whole(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Masks of random weights are all over their tile.
    monkeypatch.setattr(automatic, "cut_sides", lambda *args: [])
    image = RNG.integers(0, 256, (80, 100, 3), np.uint8)
    tiled = dataclasses.replace(
        EVERYTHING, points_per_side=2, tile_px=64, tile_halo_px=41, crop_nms_thresh=1.0
    )
    found = generate_masks(predictor, image, tiled, output_mode="coco_rle")
    boxes = {tuple(record["crop_box"]) for record in found}
    assert (0, 0, 100, 80) in boxes
    assert {box[2:] for box in boxes} == {(100, 80), (64, 64)}
    assert len(boxes) == 1 + 2 * 3
    for record in found:
        mask = rle.decode(rle.run_lengths(record["segmentation"]), (80, 100))
        assert record["area"] == mask.sum()
        rows, columns = np.nonzero(mask)
        x, y, width, height = record["bbox"]
        if mask.any():
            assert (columns.min(), rows.min()) == (x, y)
            assert (columns.max(), rows.max()) == (x + width, y + height)
    # An image no larger than a tile has none.
    small = generate_masks(predictor, image[:40, :40], tiled)
    assert {tuple(record["crop_box"]) for record in small} == {(0, 0, 40, 40)}


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2), (5, 5), (3, 200)])
def test_tiny_images_have_masks(predictor: Predictor, size: tuple[int, int]) -> None:
    """Some of their crops would be empty."""
    options = dataclasses.replace(EVERYTHING, crop_n_layers=2)
    image = RNG.integers(0, 256, (*size, 3), np.uint8)
    for record in generate_masks(predictor, image, options):
        assert record["segmentation"].shape == size


def test_what_came_before_a_bad_image_is_answered(predictor: Predictor) -> None:
    images = [np.zeros((9, 9, 3), np.uint8)] * 2 + [np.zeros((9, 9, 3), np.float32)]
    answered: list[Any] = []
    together = dataclasses.replace(EVERYTHING, regions_per_batch=4)
    with pytest.raises(ImageError, match="image 2 has type float32"):
        answered.extend(generate_masks_of_many(predictor, images, together))
    assert len(answered) == 2


def test_embeddings_of_another_model_are_refused(predictor: Predictor) -> None:
    image = np.zeros((9, 9, 3), np.uint8)
    embeddings = predictor.embed([image])
    other = dataclasses.replace(embeddings, features=embeddings.features[:, :2])
    with pytest.raises(PromptError, match="another model's"):
        generate_masks(predictor, image, EVERYTHING, embeddings=other)
    other = dataclasses.replace(embeddings, model_hw=(64, 64))
    with pytest.raises(PromptError, match="another model's"):
        generate_masks(predictor, image, EVERYTHING, embeddings=other)


def test_an_error_waits_for_nothing(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that wait to be measured are dropped, and few of them ever wait."""
    measured = []

    def fail(self: Any, *args: Any) -> None:
        measured.append(args)
        raise RuntimeError("measuring")

    monkeypatch.setattr(automatic._Measure, "measured", fail)
    many = dataclasses.replace(EVERYTHING, points_per_side=16)
    with pytest.raises(RuntimeError, match="measuring"):
        generate_masks(predictor, np.zeros((9, 9, 3), np.uint8), many)
    assert len(measured) < 16 * 16 * 3 / 4
