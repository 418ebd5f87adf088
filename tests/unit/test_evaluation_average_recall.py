"""Average recall of proposals: pycocotools without classes, hand-made cases, and lvis's traps."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from sam_jax.evaluation.detection.average_precision import FREQUENCIES
from sam_jax.evaluation.detection.average_recall import (
    average_recalls,
    found_objects,
    groups_of,
    ranked,
)
from sam_jax.evaluation.detection.matching import SIZES
from tests.unit.scenes import (
    CATEGORIES,
    Scene,
    annotations,
    coco_eval,
    lvis_eval,
    rectangle,
    results,
    scenes,
)

pytestmark = [
    # pycocotools and lvis are older than what they are told here.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning"),
]
FREQUENCY = dict(zip(CATEGORIES, "rcf", strict=True))


def found_in(image: Scene) -> dict[str, list[int | None]]:
    """What our evaluation records of an image."""
    truths = sorted(image["truths"], key=lambda t: t[0])
    order = np.argsort([-f[2] for f in image["found"]], kind="stable")
    predicted = [rectangle(*image["found"][place][1]) for place in order]
    true = [rectangle(*shape) for _, shape, _ in truths]
    crowd = np.array([t[2] for t in truths], bool)
    ious = np.zeros((len(predicted), len(true)))
    if predicted and true:
        ious = coco_mask.iou(predicted, true, crowd.astype(int).tolist())
    areas = np.array([coco_mask.area(mask) for mask in true], float)
    return found_objects(ious, groups_of(areas, [FREQUENCY[t[0]] for t in truths]), crowd)


def recalls(images: list[Scene], weights: np.ndarray | None = None) -> dict[str, float]:
    weights = np.ones(len(images)) if weights is None else weights
    return average_recalls([found_in(image) for image in images])(weights)


def coco_recalls(images: list[Scene], truth: dict[str, Any]) -> list[float]:
    """pycocotools' mean recall without classes, of each size; NaN of nothing."""
    found = [result | {"category_id": CATEGORIES[0]} for result in results(images)]
    expected = coco_eval(images, truth, found, useCats=0, maxDets=[1000])
    by_size = expected.eval["recall"][:, 0, :, 0].mean(axis=0)
    return [math.nan if value == -1 else value for value in by_size.tolist()]


@given(scenes(max_images=3))
@settings(max_examples=40)
def test_it_is_pycocotools_without_classes(images: list[Scene]) -> None:
    ours, truth = recalls(images), annotations(images)
    expected = dict(zip(SIZES, coco_recalls(images, truth), strict=True))
    for size, value in expected.items():
        name = "AR" if size == "all" else f"AR_{size}"
        np.testing.assert_allclose(ours.get(name, math.nan), value, rtol=0, atol=1e-12)
    # Of a frequency: the same proposals, and a truth of no other categories.
    for category, letter in FREQUENCY.items():
        only = truth | {
            "annotations": [a for a in truth["annotations"] if a["category_id"] == category]
        }
        (value, *_) = coco_recalls(images, only)
        found = ours.get(f"AR_{FREQUENCIES[letter]}", math.nan)
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-12)


@given(scenes(max_images=3), st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_images_may_come_in_any_order(images: list[Scene], random: Any) -> None:
    images = [*images, {"id": 99, "truths": [], "found": []}]
    shuffled = random.sample(images, len(images))
    ours, same = recalls(images), recalls(shuffled)
    assert ours.keys() == same.keys()
    for name, value in ours.items():
        assert value == pytest.approx(same[name], abs=1e-12)
    weights = np.array([random.randrange(3) for _ in images], float)
    repeated = [i for i, times in zip(images, weights, strict=True) for _ in range(int(times))]
    for name, value in recalls(repeated).items() if repeated else ():
        assert value == pytest.approx(recalls(images, weights)[name], abs=1e-12)


def image(truths: list[Any], found: list[Any]) -> Scene:
    return {"id": 1, "truths": truths, "found": found, "negative": [], "not_exhaustive": []}


WHOLE, LEFT = (0, 0, 40, 40), (0, 0, 30, 40)  # their IoU is 0.75: 6 of 10 thresholds


def test_cases_by_hand() -> None:
    frequent, rare = CATEGORIES[2], CATEGORIES[0]
    assert recalls([image([(frequent, WHOLE, False)], [(1, WHOLE, 0.9)])])["AR"] == 1.0
    assert recalls([image([(frequent, WHOLE, False)], [(1, LEFT, 0.9)])])["AR"] == 0.6
    # A proposal finds one object only, of equal ones too; two of them find both.
    twins = [(frequent, WHOLE, False), (rare, WHOLE, False)]
    assert recalls([image(twins, [(1, WHOLE, 0.9)])])["AR"] == 0.5
    assert recalls([image(twins, [(1, WHOLE, 0.9), (1, WHOLE, 0.8)])])["AR"] == 1.0
    # In each frequency's own truth it finds that one.
    both = recalls([image(twins, [(1, WHOLE, 0.9)])])
    assert (both["AR_rare"], both["AR_frequent"]) == (1.0, 1.0)
    assert "AR_common" not in both
    # Pooled over objects: an image with three counts three times as much as one with one.
    three = image([(rare, WHOLE, False)] * 3, [])
    one = image([(rare, WHOLE, False)], [(1, WHOLE, 0.9)])
    assert recalls([three, one])["AR"] == 0.25
    # A group of things need not be found.
    assert recalls([image([(rare, WHOLE, True), (rare, LEFT, False)], [])])["AR"] == 0.0
    assert recalls([image([(rare, WHOLE, True)], [(1, WHOLE, 0.9)])]) == {}
    # The better ranked takes the object, even if a later one fits better.
    late = image([(rare, WHOLE, False)], [(1, LEFT, 0.9), (1, WHOLE, 0.8)])
    assert found_in(late)["all"] == [0b1111111111]
    # 32 x 32 pixels are on the border of two sizes, and of both.
    border = found_in(image([(rare, (0, 0, 32, 32), False)], []))
    assert (border["small"], border["medium"]) == ([0], [0])


def test_ranking() -> None:
    proposals = [
        {"predicted_iou": p, "stability_score": s, "name": name}
        for name, p, s in (("a", 0.9, 0.1), ("b", 0.5, 0.9), ("c", 0.8, math.nan), ("d", 0.5, 0.9))
    ]
    names = {r: [p["name"] for p in ranked(r, proposals, 0)] for r in ("mean", "predicted_iou")}
    assert names == {"mean": ["b", "d", "a", "c"], "predicted_iou": ["a", "c", "b", "d"]}
    drawn = [tuple(p["name"] for p in ranked("random", proposals, seed)) for seed in range(20)]
    assert len(set(drawn)) > 5
    assert all(sorted(names) == list("abcd") for names in drawn)
    assert ranked("random", proposals, 3) == ranked("random", proposals, 3)


def lvis_recall(images: list[Scene], **params: Any) -> float:
    """Mean recall as the LVIS tool gives it; NaN of nothing."""
    recall = lvis_eval(images, **params).eval["recall"][:, :, 0]
    defined = recall[recall > -1]
    return float(defined.mean()) if defined.size else math.nan


def test_traps_of_the_lvis_tool_are_avoided() -> None:
    """Each gives another number than the recall that is meant, which ours is."""
    rare, common, _ = CATEGORIES
    # Without classes it looks everything up under a category that there is not.
    scene = image([(common, WHOLE, False)], [(common, WHOLE, 0.9)])
    assert recalls([scene])["AR"] == 1.0
    assert math.isnan(lvis_recall([scene], use_cats=0))
    # With classes, proposals of one that nobody looked for in the image are dropped.
    scene = image([(common, WHOLE, False)], [(rare, WHOLE, 0.9)])
    assert recalls([scene])["AR"] == 1.0
    assert lvis_recall([scene]) == 0.0
    # It takes 300 proposals of an image.
    tiny = (common, (9, 9, 1, 1), 0.9)
    many = image([(common, WHOLE, False)], [tiny] * 300 + [(common, WHOLE, 0.1)])
    assert recalls([many])["AR"] == 1.0
    assert lvis_recall([many]) == 0.0
    assert lvis_recall([many], max_dets=1000) == 1.0
    # With classes: a mean over categories, and not over objects.
    mixed = image([(common, WHOLE, False)] * 3 + [(rare, WHOLE, False)], [(rare, WHOLE, 0.9)])
    assert recalls([mixed])["AR"] == 0.25
    assert lvis_recall([mixed]) == 0.5
