"""Average precision by LVIS's rules beside what the published tool gave, kept in a file.

The tool binds what it does not need (a second OpenCV), so that it is no part of the environment.
Where it is installed, `SAM_JAX_UPDATE_GOLDEN=1` writes the file again; tests/unit compares live.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.scenes import CATEGORIES, SIDES, Scene, lvis_eval, results
from tests.unit.test_evaluation_average_precision import tables

FROZEN = Path(__file__).parent / "lvis.npz"
NUM_SETS = 60


def random_scenes(seed: int) -> list[Scene]:
    """Images with few places and scores: ties, duplicates, objects on the border of sizes."""
    rng = np.random.default_rng(seed)

    def pick(values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    def shape() -> tuple[int, int, int, int]:
        return pick((0, 4, 8)), pick((0, 4, 8)), pick(SIDES), pick(SIDES)

    images = []
    for number in range(1, 2 + int(rng.integers(4))):
        truths = [(pick(CATEGORIES), shape(), False) for _ in range(rng.integers(5))]
        found = [
            (pick(CATEGORIES), shape(), pick((0.1, 0.2, 0.5, 0.9))) for _ in range(rng.integers(9))
        ]
        # Half of what is found is an object that is there, in its place or beside it.
        for category, (x, y, *sides), _ in truths:
            if rng.random() < 0.5:
                beside = (x + int(rng.integers(2)), y, *sides)
                found.append((category, beside, pick((0.1, 0.2, 0.5, 0.9))))
        present = {category for category, _, _ in truths}
        others = [category for category in CATEGORIES if category not in present]
        images.append(
            {
                "id": number,
                "truths": truths,
                "found": found,
                "negative": [category for category in others if rng.random() < 0.5],
                "not_exhaustive": [c for c in sorted(present) if rng.random() < 0.5],
            }
        )
    return images


# The tool is older than what it is told here.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning")
def test_precision_is_the_published_tools() -> None:
    """To the last bit: every threshold, recall, category and size."""
    if os.environ.get("SAM_JAX_UPDATE_GOLDEN"):
        sets = [images for seed in range(NUM_SETS) if results(images := random_scenes(seed))]
        precisions = [lvis_eval(images).eval["precision"] for images in sets]
        np.savez_compressed(FROZEN, scenes=json.dumps(sets), precision=np.stack(precisions))
    with np.load(FROZEN) as file:
        kept, expected = json.loads(str(file["scenes"])), file["precision"]
    assert len(kept) == len(expected) > NUM_SETS // 2
    # What is frozen has right and wrong answers of every size and category.
    assert ((expected > 0) & (expected < 1)).any(axis=(0, 1, 2)).all()
    for images, precision in zip(kept, expected, strict=True):
        for image in images:
            for name in ("truths", "found"):
                image[name] = [
                    (category, tuple(shape), last) for category, shape, last in image[name]
                ]
        np.testing.assert_array_equal(tables(images, "lvis")[0], precision)
