"""Scores of edge maps by hand, with the benchmark's quirks."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from sam_jax.evaluation.edges.scores import (
    Curve,
    EdgeCounts,
    average_precision,
    best_point,
    curve_of,
    edge_scores,
    optimal_image_f,
    pooled,
    recall_at_half_precision,
)

THRESHOLDS = np.array([0.25, 0.5, 0.75])


def counts_of(*images):
    """Each image as (annotated, recalled, predicted, confirmed)."""
    return EdgeCounts(
        np.array([[image[0]] for image in images], float),
        *(np.array([image[k] for image in images], float) for k in (1, 2, 3)),
    )


@st.composite
def images(draw):
    annotated = draw(st.integers(0, 50))
    falling = st.lists(st.integers(0, 40), min_size=3, max_size=3).map(
        lambda values: sorted(values, reverse=True)
    )
    predicted = draw(falling)
    return (
        annotated,
        [min(annotated, value) for value in draw(falling)],
        predicted,
        [draw(st.integers(0, value)) for value in predicted],
    )


several = st.lists(images(), min_size=1, max_size=5)


def curve(recall, precision):
    return Curve(np.array(recall, float), np.array(precision, float))


def test_rates_by_hand():
    found = curve_of(counts_of((10, [8, 5, 0], [16, 4, 0], [8, 4, 0])))
    np.testing.assert_array_equal(found.recall, [[0.8, 0.5, 0]])
    # Nothing predicted: 0, and not a division by it.
    np.testing.assert_array_equal(found.precision, [[0.5, 1, 0]])
    np.testing.assert_allclose(found.f, [[0.8 / 1.3, 1 / 1.5, 0]])


def test_ods_lies_between_thresholds():
    # F is 0.5 and 0.5 at the ends; at s of the way R = 1 - 2 s / 3, P = 1 / 3 + 2 s / 3, highest in
    # the middle, which 100 steps from end to end just miss.
    best = best_point(np.array([0.2, 0.6]), curve([1, 1 / 3], [1 / 3, 1]))
    assert best.f == pytest.approx(2 / 3, abs=1e-4)
    assert best.f < 2 / 3
    assert best.threshold == pytest.approx(0.4, abs=0.4 / 99)
    assert best.recall == pytest.approx(2 / 3, abs=1 / 99)


def test_ods_of_a_single_threshold():
    assert best_point(np.array([0.5]), curve([0.5], [1.0])) == (0.5, 0.5, 1.0, 2 / 3)


def test_ois_takes_the_highest_of_equally_good_thresholds():
    # F is 2/3 at the first and at the last threshold.
    counts = counts_of(
        (10, [10, 0, 5], [20, 1, 5], [10, 0, 5]), (10, [0, 0, 5], [9, 0, 5], [0, 0, 5])
    )
    # Both at the last: R = 10 / 20, P = 10 / 10. The first image at its first would make P 15 / 25.
    assert optimal_image_f(counts, np.ones(2)) == pytest.approx(2 / 3)


def test_ois_adds_counts_and_not_scores():
    counts = counts_of(
        (10, [10, 0, 0], [10, 0, 0], [10, 0, 0]), (90, [0, 0, 9], [0, 0, 90], [0, 0, 9])
    )
    assert optimal_image_f(counts, np.ones(2)) == pytest.approx(0.19)


def test_average_precision_by_hand():
    # Precision falls from 1 to 0.5 between recalls 0.25 and 0.75, and is 0 outside of them: 51
    # recalls of mean 0.75.
    assert average_precision(curve([0.75, 0.25], [0.5, 1])) == pytest.approx(0.3825)


def test_average_precision_may_exceed_one():
    """The benchmark sums 101 heights and divides by 100."""
    assert average_precision(curve([1, 0], [1, 1])) == pytest.approx(1.01)


def test_of_equal_recalls_the_lowest_threshold_counts():
    same = average_precision(curve([0.5, 0.5, 0.0], [0.4, 0.8, 1.0]))
    assert same == pytest.approx(average_precision(curve([0.5, 0.0], [0.4, 1.0])))


def test_a_single_recall_has_no_area():
    assert average_precision(curve([0.5, 0.5], [1, 1])) == 0


def test_r50_by_hand():
    # Precision 0.5 is a quarter of the way from 0.4 to 0.8.
    assert recall_at_half_precision(curve([0.9, 0.5], [0.4, 0.8])) == pytest.approx(0.8)
    # Never as low: recall at the lowest there is.
    assert recall_at_half_precision(curve([0.9, 0.5], [0.7, 0.8])) == pytest.approx(0.9)
    # Never as high.
    assert recall_at_half_precision(curve([0.9, 0.5], [0.1, 0.3])) == 0


@hypothesis.given(several, st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_matter(found, random):
    shuffled = random.sample(found, len(found))
    weights = np.ones(len(found))
    scores = [edge_scores(THRESHOLDS, counts_of(*x), weights) for x in (found, shuffled)]
    assert scores[0] == pytest.approx(scores[1])
    assert all(0 <= score <= 1.01 for score in scores[0].values())


@hypothesis.given(several, st.data())
def test_weights_are_repetitions(found, data):
    times = data.draw(st.lists(st.integers(0, 3), min_size=len(found), max_size=len(found)))
    repeated = [image for image, number in zip(found, times, strict=True) for _ in range(number)]
    weighted = edge_scores(THRESHOLDS, counts_of(*found), np.array(times, float))
    if repeated:
        expected = edge_scores(THRESHOLDS, counts_of(*repeated), np.ones(len(repeated)))
        assert weighted == pytest.approx(expected)
    else:
        assert set(weighted.values()) <= {0.0, 0.25}


def test_pooling_adds_counts():
    total = pooled(counts_of((3, [1], [2], [1]), (4, [2], [5], [3])), np.array([1.0, 2.0]))
    assert [part.tolist() for part in total] == [[11], [5], [12], [7]]
