"""Average precision: hand-made cases, and pycocotools and lvis on everything that may occur."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_jax.evaluation.detection.average_precision import (
    RECALLS,
    average_precisions,
    category_matches,
    counted,
    gather_matches,
)
from sam_jax.evaluation.detection.matching import IOU_THRESHOLDS, SIZES
from tests.unit.scenes import (
    CATEGORIES,
    Scene,
    annotations,
    coco_eval,
    lvis_eval,
    matches_of,
    quiet,
    results,
    scenes,
)

pytestmark = [
    # pycocotools and lvis are older than what they are told here.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning"),
]


def tables(images: list[Scene], rules: Any, weights: np.ndarray | None = None) -> tuple[Any, Any]:
    """Precision [t, r, k, s] and recall [t, k, s], as pycocotools lays them out."""
    gathered = gather_matches([matches_of(image, rules) for image in images])
    weights = np.ones(len(images)) if weights is None else weights
    precision = np.full((len(IOU_THRESHOLDS), len(RECALLS), len(CATEGORIES), len(SIZES)), -1.0)
    recall = np.full((len(IOU_THRESHOLDS), len(CATEGORIES), len(SIZES)), -1.0)
    for place, category in enumerate(CATEGORIES):
        if category in gathered:
            p, r = gathered[category].precision_and_recall(weights)
            precision[:, :, place], recall[:, place] = p.transpose(1, 2, 0), r.T
    return precision, recall


@given(scenes())
@settings(max_examples=80)
def test_coco_is_pycocotools(images: list[Scene]) -> None:
    expected = coco_eval(images, annotations(images), results(images))
    precision, recall = tables(images, "coco")
    # To the last bit.
    np.testing.assert_array_equal(precision, expected.eval["precision"][..., -1])
    np.testing.assert_array_equal(recall, expected.eval["recall"][..., -1])
    with quiet():
        expected.summarize()
    figures = average_precisions(
        gather_matches([matches_of(image, "coco") for image in images]), np.ones(len(images)), {}
    )
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    for name, stat in zip(names, expected.stats, strict=False):
        found = figures.get(name, math.nan)
        assert (math.isnan(found) and stat == -1) or abs(found - stat) < 1e-12, name


@given(scenes(), st.data())
@settings(max_examples=40)
def test_weights_are_repetitions(images: list[Scene], data: st.DataObject) -> None:
    """An image that counts twice is an image that is there twice."""
    times = [data.draw(st.integers(0, 3)) for _ in images]
    # Repetitions stand where the image stood, so that ties are broken alike.
    repeated = [image for image, count in zip(images, times, strict=True) for _ in range(count)]
    precision, recall = tables(images, "coco", np.array(times, float))
    if not repeated:
        assert (precision == -1).all()
        return
    one_by_one, same_recall = tables(repeated, "coco")
    np.testing.assert_allclose(recall, same_recall, rtol=0, atol=1e-12)
    # Of equal scores some may be read between, where a repetition is cut in two.
    if len({found[2] for image in images for found in image["found"]}) == sum(
        len(image["found"]) for image in images
    ):
        np.testing.assert_allclose(precision, one_by_one, rtol=0, atol=1e-12)


@given(scenes(), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_orders_do_not_matter_where_scores_differ(images: list[Scene], random: Any) -> None:
    """Nor does it matter that images are empty."""
    number = 0
    for image in images:
        image["truths"] = list(dict.fromkeys(image["truths"]))
        for place, (category, shape, _) in enumerate(image["found"]):
            number += 1
            image["found"][place] = (category, shape, 0.9 - 0.001 * number)
    expected = tables(images, "coco")
    shuffled = [
        image | {"found": random.sample(image["found"], len(image["found"]))} for image in images
    ]
    shuffled += [{"id": 99, "truths": [], "found": [], "negative": [], "not_exhaustive": []}]
    random.shuffle(shuffled)
    for ours, theirs in zip(tables(shuffled, "coco"), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@given(scenes())
@settings(max_examples=50)
def test_lvis_is_lvis(images: list[Scene]) -> None:
    if not results(images):
        return
    evaluation = lvis_eval(images)
    evaluation.summarize()
    precision, _ = tables(images, "lvis")
    np.testing.assert_array_equal(precision, evaluation.eval["precision"])
    figures = average_precisions(
        gather_matches([matches_of(image, "lvis") for image in images]),
        np.ones(len(images)),
        dict(zip(CATEGORIES, "rcf", strict=True)),
    )
    ours = {"APs": "AP_small", "APr": "AP_rare", "APc": "AP_common", "APf": "AP_frequent"}
    for name in ("AP", "AP50", "AP75", *ours):
        expected, found_figure = (
            evaluation.results[name],
            figures.get(ours.get(name, name), math.nan),
        )
        assert (math.isnan(found_figure) and expected == -1) or abs(found_figure - expected) < 1e-12


def matches(scores: list[float], ious: list[list[float]], **more: Any) -> list[Any]:
    """Matches of objects and masks of 50 x 50 pixels."""
    num_objects = len(ious[0]) if ious else more.pop("num_objects", 0)
    return category_matches(
        1,
        np.array(scores),
        np.full(len(scores), 2500.0),
        np.array(ious, float).reshape(len(scores), num_objects),
        np.full(num_objects, 2500.0),
        more.pop("crowd", np.zeros(num_objects, bool)),
        **more,
    )


def ap(*images: list[Any]) -> float:
    gathered = gather_matches([[image] for image in images])
    return average_precisions(gathered, np.ones(len(images)), {}).get("AP", math.nan)


def test_cases_by_hand() -> None:
    assert ap(matches([0.9], [[1.0]])) == pytest.approx(1.0)
    # 0.72 is right at five of ten thresholds: .50 to .70.
    assert ap(matches([0.9], [[0.72]])) == pytest.approx(0.5)
    # A duplicate is wrong; behind the right one it costs nothing, before it half of all.
    assert ap(matches([0.9, 0.8], [[1.0], [1.0]])) == pytest.approx(1.0)
    assert ap(matches([0.9, 0.8], [[0.0], [1.0]])) == pytest.approx(0.5)
    # One of two objects: precision 1 up to recall .5, which is 51 of 101 recalls.
    assert ap(matches([0.9], [[1.0, 0.0]])) == pytest.approx(51 / 101)
    # Nothing found; nothing to be found.
    assert ap(matches([], [], num_objects=2)) == 0.0
    assert math.isnan(ap(matches([0.9], [[]])))
    # On a crowd no detection is wrong, however many there are; and a crowd need not be found.
    crowd = np.array([True, False])
    on_crowd = matches([0.9, 0.8, 0.7], [[1.0, 0.0], [0.96, 0.0], [0.0, 1.0]], crowd=crowd)
    assert ap(on_crowd) == pytest.approx(1.0)
    # Half on it, the second is wrong where the threshold is higher: half of the precision at .95.
    on_crowd = matches([0.9, 0.8, 0.7], [[1.0, 0.0], [0.9, 0.0], [0.0, 1.0]], crowd=crowd)
    assert ap(on_crowd) == pytest.approx(0.95)
    # Where not all objects are marked, nothing is wrong.
    assert ap(matches([0.9, 0.8], [[0.0], [1.0]], is_exhaustive=False)) == pytest.approx(1.0)


def test_detections_that_count() -> None:
    scores, categories = np.linspace(0, 1, 250), np.repeat([3, 1], [150, 100])
    kept = counted("coco", scores, categories)
    assert kept == [*range(50, 150), *range(150, 250)]
    assert counted("lvis", np.repeat(scores, 2), np.repeat(categories, 2)) == list(range(200, 500))
    assert counted("lvis", np.full(301, 0.5), np.ones(301, int)) == list(range(300))
    assert counted("coco", np.zeros(0), np.zeros(0, int)) == []
