"""The bootstrap, against closed forms and SciPy's."""

import hypothesis
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from sam_jax.evaluation.comparison import bootstrap
from sam_jax.evaluation.comparison.bootstrap import (
    default_num_draws,
    draw_multiplicities,
    paired_draws,
    percentile_interval,
    strata_of,
    two_sided_p_value,
)
from sam_jax.evaluation.mean_ious import MeanIous
from sam_jax.evaluation.metrics import IouTotals, mean_over_datasets
from tests.unit.results_fixtures import many_records, record


def all_draws(num_records, strata, num_draws, seed=0):
    return np.concatenate(list(draw_multiplicities(num_records, strata, num_draws, seed)))


def test_draws_keep_the_size_of_each_stratum(monkeypatch):
    # Three draws at a time.
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 24)
    strata = [np.array([0, 2, 5]), np.array([1, 6])]
    drawn = all_draws(8, strata, 1000)
    assert drawn.shape == (1000, 8)
    assert (drawn[:, [0, 2, 5]].sum(axis=1) == 3).all()
    assert (drawn[:, [1, 6]].sum(axis=1) == 2).all()
    # What is of no stratum counts once.
    assert (drawn[:, [3, 4, 7]] == 1).all()
    # Binomial: mean 1, variance 1 - 1/n.
    np.testing.assert_allclose(drawn[:, [0, 2, 5]].mean(axis=0), 1, atol=0.1)
    np.testing.assert_allclose(drawn[:, [0, 2, 5]].var(axis=0), 2 / 3, atol=0.1)


def test_the_interval_of_a_mean_as_scipy_and_the_normal_law_have_it():
    values = np.random.default_rng(3).beta(2, 3, 80)
    drawn = all_draws(80, [np.arange(80)], 20_000)
    ours = percentile_interval(drawn @ values / 80)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    half = 1.96 * values.std() / np.sqrt(80)
    # Ends of 20,000 draws have a standard error of some hundredths of the half width.
    np.testing.assert_allclose(ours, theirs, atol=0.06 * half)
    np.testing.assert_allclose(ours, [values.mean() - half, values.mean() + half], atol=0.1 * half)


def test_the_interval_of_a_paired_difference_as_scipy_has_it():
    rng = np.random.default_rng(4)
    a = rng.uniform(0, 1, 60)
    b = np.clip(a + rng.normal(0.02, 0.05, 60), 0, 1)
    records = [[record("d", f"{i}", x) for i, x in enumerate(of)] for of in (a, b)]
    of_a, of_b = map(MeanIous, records)
    drawn = paired_draws([of_a, of_b], ["d/center_1"], 60, of_a.strata, num_draws=20_000, seed=0)
    ours = percentile_interval(drawn[1]["d/center_1"] - drawn[0]["d/center_1"])
    theirs = scipy.stats.bootstrap(
        (a, b),
        lambda x, y, axis: np.mean(y - x, axis=axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=0.03 * (theirs.high - theirs.low))
    # Were the images not the same for both, it would be several times as wide.
    assert ours.high - ours.low < 0.3 * 2 * 1.96 * a.std() * np.sqrt(2 / 60)


def test_intervals_and_p_values_by_hand():
    draws = np.arange(101) / 100
    assert percentile_interval(draws) == pytest.approx((0.025, 0.975))
    assert percentile_interval(draws, level=0.5) == pytest.approx((0.25, 0.75))
    assert percentile_interval(np.array([0.5, np.nan, 0.5])) == (0.5, 0.5)
    assert np.isnan(percentile_interval(np.array([np.nan]))).all()
    assert two_sided_p_value(np.array([1.0] * 99)) == 2 * 1 / 100
    assert two_sided_p_value(np.array([1.0] * 97 + [-1, 0])) == 2 * 3 / 100
    # Ties with zero speak for both signs.
    assert two_sided_p_value(np.zeros(50)) == 1
    assert two_sided_p_value(np.array([np.nan])) == 1


@hypothesis.given(st.integers(0, 2**32 - 1))
def test_p_values_have_no_side(seed):
    draws = np.random.default_rng(seed).normal(0.5, 1, 200)
    assert two_sided_p_value(draws) == two_sided_p_value(-draws)
    assert 0 < two_sided_p_value(draws) <= 1


class TestMeanIous:
    def test_equal_to_the_reports_exact_sums(self):
        records = many_records(np.random.default_rng(0), images=(400, 30, 5))
        totals = IouTotals()
        for of_image in records:
            for mask in of_image["masks"]:
                totals.add(of_image["dataset"], mask["ious"])
        means = totals.means()
        expected = {f"{d}/{m}": v for d, of in means.items() for m, v in of.items()}
        expected |= {f"mean/{m}": v for m, v in mean_over_datasets(means).items()}
        found = MeanIous(records)(np.ones(len(records)))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert abs(found[name] - value) < 1e-12

    def test_records_count_as_often_as_they_are_told(self):
        records = [record("a", "0", 0.2, 0.4), record("a", "1", 0.9), record("b", "2", 0.5)]
        found = MeanIous(records)(np.array([2.0, 3.0, 1.0]))
        assert found["a/center_1"] == pytest.approx((2 * 0.6 + 3 * 0.9) / 7)
        assert found["mean/center_1"] == pytest.approx((found["a/center_1"] + 0.5) / 2)

    @hypothesis.given(st.lists(st.integers(0, 3), min_size=14, max_size=14))
    def test_counting_twice_is_repeating(self, multiplicities):
        records = many_records(np.random.default_rng(7))
        # Each data set once at least, since a mean of nothing is none.
        numbers = [n + (i in (0, 9)) for i, n in enumerate(multiplicities)]
        repeated = [r for r, n in zip(records, numbers, strict=True) for _ in range(n)]
        found = MeanIous(records)(np.array(numbers, float))
        assert found == pytest.approx(MeanIous(repeated)(np.ones(len(repeated))), abs=1e-12)

    def test_images_without_masks_count_for_nothing(self):
        skipped = [{"dataset": "a", "image": "x", "skipped": "damaged"}, record("a", "y")]
        measures = MeanIous([*skipped, record("a", "0", 0.5)])
        assert measures(np.ones(3))["a/center_1"] == 0.5
        assert [stratum.tolist() for stratum in measures.strata] == [[2]]
        assert MeanIous(skipped)(np.ones(2)) == {}

    def test_a_mean_has_what_all_data_sets_have(self):
        records = [record("a", "0", {"box": 0.5, "x": 0.1}), record("b", "1", {"box": 0.7})]
        assert MeanIous(records)(np.ones(2)).keys() == {"mean/box", "a/box", "a/x", "b/box"}

    def test_disks_are_of_the_best_radius_of_each_draw(self):
        ious = [{"disk_center@0.1": 0.8, "disk_center@0.2": 0.1, "box": 1.0}]
        ious += [{"disk_center@0.1": 0.1, "disk_center@0.2": 0.6, "box": 1.0}]
        measures = MeanIous([record("a", "0", ious[0]), record("a", "1", ious[1])])
        drawn = measures.of_draws(np.array([[1.0, 1.0], [0.0, 2.0]]))
        assert drawn.keys() == {"mean/box", "mean/disk_center", "a/box", "a/disk_center"}
        np.testing.assert_allclose(drawn["a/disk_center"], [0.45, 0.6])

    def test_draws_without_masks_are_no_numbers(self):
        drawn = MeanIous([record("a", "0", 0.5), record("a", "1", 0.7)]).of_draws(np.zeros((1, 2)))
        assert np.isnan(drawn["a/center_1"]).all()


def test_measures_that_know_one_draw_at_a_time():
    records = many_records(np.random.default_rng(0))
    means = MeanIous(records)

    def slow(multiplicities):
        return means(multiplicities)

    assert default_num_draws(slow) < default_num_draws(means)
    of_datasets = strata_of(slow, [*records, {"dataset": "d0", "skipped": "x"}])
    assert [s.tolist() for s in of_datasets] == [s.tolist() for s in means.strata]
    names = ["d0/box", "mean/box", "no such measure"]
    done = []
    options = {"num_draws": 25, "seed": 2}
    (one_by_one,) = paired_draws(
        [slow], names, 14, of_datasets, on_progress=lambda d, t: done.append((d, t)), **options
    )
    assert done == [(10, 25), (20, 25), (25, 25)]
    at_once = [means.of_draws(d) for d in draw_multiplicities(14, of_datasets, 25, 2, 10)]
    for name in names[:2]:
        np.testing.assert_allclose(one_by_one[name], np.concatenate([d[name] for d in at_once]))
    assert np.isnan(one_by_one["no such measure"]).all()
