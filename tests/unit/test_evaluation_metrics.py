import json
import threading

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from sam_jax.evaluation.metrics import IouTotals, gather_totals, mask_iou, mean_over_datasets

scores = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["x", "y"]), st.floats(0, 1)),
    max_size=30,
)


def totals_of(items):
    totals = IouTotals()
    for dataset, measure, iou in items:
        totals.add(dataset, {measure: iou})
        totals.count(dataset, "masks")
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


@hypothesis.given(scores, st.integers(0, 30), st.randoms(use_true_random=False))
def test_order_and_split_change_nothing(items, cut, rng):
    whole = totals_of(items)
    shuffled = items.copy()
    rng.shuffle(shuffled)
    merged = totals_of(shuffled[:cut])
    merged.merge(totals_of(shuffled[cut:]))
    assert merged.means() == whole.means()
    assert merged.counts() == whole.counts()


@hypothesis.given(scores)
def test_means_equal_the_plain_ones(items):
    means = totals_of(items).means()
    for dataset in means:
        for measure, mean in means[dataset].items():
            plain = [iou for d, m, iou in items if (d, m) == (dataset, measure)]
            assert mean == pytest.approx(np.mean(plain), abs=1e-12)
    assert sum(len(m) for m in means.values()) == len({(d, m) for d, m, _ in items})


@hypothesis.given(scores)
def test_json_holds_everything(items):
    totals = totals_of(items)
    again = IouTotals.from_json(totals.to_json())
    assert again.means() == totals.means()
    assert again.counts() == totals.counts()
    assert json.loads(again.to_json()) == json.loads(totals.to_json())


def test_zero_scores_survive_a_merge():
    merged = totals_of([("a", "x", 0.0)])
    merged.merge(totals_of([("a", "x", 0.0)]))
    assert merged.means() == {"a": {"x": 0.0}}


def test_hosts_gather_the_same_sums(monkeypatch):
    """Three hosts with shares of different length, as threads that exchange arrays."""
    barrier, arrays = threading.Barrier(3), {}

    def allgather(array):
        host = threading.current_thread().name
        arrays[host] = np.asarray(array)
        barrier.wait(30)
        gathered = np.stack([arrays[name] for name in ("host0", "host1", "host2")])
        barrier.wait(30)
        return gathered

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    # More than 2^32 units of sums in all, which 32-bit arrays would not hold.
    items = [("a" if i % 3 else "é", "x", 1 - i / 3000) for i in range(3000)]
    shares = [items[:1], items[1:2000], items[2000:]]
    found = {}

    def run(host):
        found[host] = gather_totals(totals_of(shares[host]))

    threads = [threading.Thread(target=run, args=(h,), name=f"host{h}") for h in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = totals_of(items)
    assert [found[host].means() for host in range(3)] == [expected.means()] * 3
    assert found[1].counts() == expected.counts()


def test_one_host_keeps_its_totals():
    totals = totals_of([("a", "x", 0.5)])
    assert gather_totals(totals) is totals
