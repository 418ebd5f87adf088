"""All masks of an image against the published generator: the same records."""

import dataclasses
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from benchmarks import published
from sam_jax.inference.automatic import AutomaticOptions, generate_masks
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.models.sam import Sam
from tests.golden.tiny import TINY
from tests.parity import official

pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    # The published generator hands tensors to numpy in an old way.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SQUARE = dataclasses.replace(
    TINY, image_encoder=dataclasses.replace(TINY.image_encoder, image_size=(48, 48))
)
# Random weights give faint masks all over the image: these thresholds let some pass and some not.
RELAXED = AutomaticOptions(
    points_per_side=8,
    points_per_batch=16,
    pred_iou_thresh=0.28,
    stability_score_thresh=0.4,
    stability_score_offset=0.005,
    box_nms_thresh=0.99,
)
SEARCHES = {
    "whole": RELAXED,
    "crops": dataclasses.replace(
        RELAXED, crop_n_layers=1, crop_n_points_downscale_factor=2, crop_nms_thresh=0.6
    ),
    "clean": dataclasses.replace(RELAXED, box_nms_thresh=1.0, min_mask_region_area=5),
    "all": dataclasses.replace(RELAXED, box_nms_thresh=1.0),
}


@pytest.fixture(scope="module")
def theirs(segment_anything: ModuleType) -> Any:
    return official.build(SQUARE)


@pytest.fixture(scope="module")
def ours(theirs: Any) -> Predictor:
    variables = official.native_variables(theirs, SQUARE)
    return Predictor(Sam(SQUARE), variables, Buckets(images=(1,), rows=(1,), prompts=(16,)))


@pytest.mark.parametrize("size", [(60, 90), (48, 48)])
@pytest.mark.parametrize("name", SEARCHES)
def test_records_are_the_same(
    segment_anything: ModuleType, theirs: Any, ours: Predictor, name: str, size: tuple[int, int]
) -> None:
    options = SEARCHES[name]
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    arguments = published.generator_arguments(options)
    for mode in ("uncompressed_rle", "binary_mask"):
        generator = segment_anything.SamAutomaticMaskGenerator(
            theirs, **arguments, output_mode=mode
        )
        expected = generator.generate(image)
        found = generate_masks(ours, image, options, output_mode=mode)
        # Faint masks have nearly the same box, so suppression leaves few.
        assert len(expected) > (20 if options.box_nms_thresh == 1.0 else 0)
        assert len(found) == len(expected)
        for record, reference in zip(found, expected, strict=True):
            assert record.keys() == reference.keys()
            for field in ("bbox", "crop_box", "point_coords"):
                np.testing.assert_allclose(record[field], reference[field], atol=1e-6)
            for field in ("predicted_iou", "stability_score"):
                assert record[field] == pytest.approx(reference[field], abs=1e-3)
            assert abs(record["area"] - reference["area"]) <= 1
            if mode == "binary_mask":
                assert (record["segmentation"] != reference["segmentation"]).sum() <= 1
            else:
                assert record["segmentation"]["size"] == list(reference["segmentation"]["size"])
