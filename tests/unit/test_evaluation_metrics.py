import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from sam_jax.evaluation.metrics import IouTotals, mask_iou, mean_over_datasets

scores = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["x", "y"]), st.floats(0, 1)),
    max_size=30,
)


def totals_of(items):
    totals = IouTotals()
    for dataset, measure, iou in items:
        totals.add(dataset, {measure: iou})
    return totals


def test_mask_iou_by_hand():
    truth, prediction = np.zeros((2, 4, 6), bool)
    truth[0:2, 0:4] = True
    prediction[1:3, 1:5] = True
    # 3 pixels in common, 8 + 8 - 3 in either.
    assert mask_iou(prediction, truth) == 3 / 13


def test_mask_iou_of_empty_masks():
    empty, full = np.zeros((2, 3), bool), np.ones((2, 3), bool)
    assert mask_iou(empty, full) == 0
    assert mask_iou(empty, empty) == 0
    assert mask_iou(full, full) == 1


def test_means_are_over_masks_then_over_datasets():
    totals = IouTotals()
    for iou in (0.25, 0.5, 0.75, 1.0):
        totals.add("large", {"box": iou})
    totals.add("small", {"box": 0.125})
    means = totals.means()
    assert means == {"large": {"box": 0.625}, "small": {"box": 0.125}}
    # The small dataset weighs as much as the large one.
    assert mean_over_datasets(means) == {"box": 0.375}


def test_a_measure_that_one_dataset_lacks_has_no_mean():
    means = {"a": {"box": 1.0, "disk": 0.5}, "b": {"box": 0.0}}
    assert mean_over_datasets(means) == {"box": 0.5}
    assert mean_over_datasets({}) == {}


@pytest.mark.parametrize("iou", [-0.001, 1.001, float("nan")])
def test_what_is_no_iou_is_refused(iou):
    with pytest.raises(ValueError, match="not within"):
        IouTotals().add("a", {"box": iou})


@hypothesis.given(scores, st.randoms(use_true_random=False))
def test_order_changes_nothing(items, rng):
    shuffled = items.copy()
    rng.shuffle(shuffled)
    assert totals_of(shuffled).means() == totals_of(items).means()


@hypothesis.given(scores)
def test_means_equal_the_plain_ones(items):
    means = totals_of(items).means()
    for dataset in means:
        for measure, mean in means[dataset].items():
            plain = [iou for d, m, iou in items if (d, m) == (dataset, measure)]
            assert mean == pytest.approx(np.mean(plain), abs=1e-12)
    assert sum(len(m) for m in means.values()) == len({(d, m) for d, m, _ in items})
