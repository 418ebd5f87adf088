"""Two results side by side: what the differences are, and what cannot be compared."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console

from sam_jax.errors import ConfigError
from sam_jax.evaluation.comparison import checkpoints as comparisons
from sam_jax.evaluation.comparison.bootstrap import Interval, strata_of
from sam_jax.evaluation.comparison.checkpoints import (
    Comparison,
    Difference,
    check_comparable,
    compare,
)
from tests.unit.results_fixtures import many_records, record, results_of


@pytest.fixture
def pair(tmp_path):
    """Results of two models, the second better by about 0.1 on every mask."""
    return [
        results_of(tmp_path / name, many_records(np.random.default_rng(0), (40, 30), shift=shift))
        for name, shift in (("a", 0.0), ("b", 0.1))
    ]


def test_each_measure_of_each_data_set(pair):
    found = compare(*pair, num_draws=500)
    assert [d.measure for d in found.differences] == [
        f"{dataset}/{measure}"
        for dataset in ("mean", "d0", "d1")
        for measure in ("center_1", "box")
    ]
    for d in found.differences:
        assert d.difference == d.b - d.a == pytest.approx(0.1, abs=0.02)
        assert 0 < d.interval.low < d.difference < d.interval.high
        assert d.p_value == 2 / 501
    of_d0 = found.differences[2]
    masks = [m["ious"]["center_1"] for r in pair[0].records[:40] for m in r["masks"]]
    assert of_d0.a == pytest.approx(np.mean(masks), abs=1e-12)


def test_a_result_and_itself(pair):
    found = compare(pair[0], pair[0], num_draws=50)
    assert {(d.difference, d.interval, d.p_value) for d in found.differences} == {
        (0.0, Interval(0.0, 0.0), 1.0)
    }


def test_the_other_way_round_has_the_other_sign(pair):
    there, back = compare(*pair, num_draws=200), compare(*pair[::-1], num_draws=200)
    for a, b in zip(there.differences, back.differences, strict=True):
        assert (a.difference, a.p_value) == (-b.difference, b.p_value)
        np.testing.assert_allclose(a.interval, (-b.interval.high, -b.interval.low), atol=1e-12)


def test_draws_follow_the_seed(pair):
    first = compare(*pair, num_draws=100, seed=3)
    assert first == compare(*pair, num_draws=100, seed=3)
    assert first != compare(*pair, num_draws=100, seed=4)


def test_a_single_image_varies_by_nothing(tmp_path):
    pair = [results_of(tmp_path / f"{x}", [record("d", "0", x, x)]) for x in (0.25, 0.75)]
    (of_mean, of_dataset) = compare(*pair, num_draws=20).differences
    assert of_mean.interval == of_dataset.interval == (0.5, 0.5)


def test_digests_of_truth_must_be_the_same_where_both_have_them(pair):
    with_digests = [
        dataclasses.replace(one, settings={**one.settings, "truth_digests": {"d0": digest}})
        for one, digest in zip(pair, "xy", strict=True)
    ]
    with pytest.raises(ConfigError, match="truth_digests, d0: 'x' and 'y'"):
        check_comparable(*with_digests)
    # Results of before have none.
    check_comparable(pair[0], with_digests[1])
    check_comparable(with_digests[0], pair[1])


def changed(results, change):
    records, settings = copy.deepcopy(results.records), copy.deepcopy(results.settings)
    change(records, settings)
    return dataclasses.replace(results, records=records, settings=settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, s: s.update(seed=1), "seed: 0 and 1"),
        (lambda r, s: s.update(num_clicks=[1]), r"num_clicks: None and \[1\]"),
        (lambda r, s: r.pop(), "number of examples: 70 and 69"),
        (lambda r, s: r[3].update(image="/data/d0/x.jpg"), "example 3, image: '3.jpg' and 'x.jpg'"),
        (lambda r, s: r[3].update(dataset="other"), "example 3, dataset: 'd0' and 'other'"),
        (lambda r, s: r[3]["masks"].append(r[3]["masks"][0]), "example 3, masks: .* and .*"),
        (lambda r, s: r[3].pop("masks"), "example 3, masks: .* and None"),
        (lambda r, s: r[3].update(skipped="x"), "example 3, is skipped: False and True"),
        (lambda r, s: [of.update(dataset="x") for of in r], "and 62 more"),
    ],
)
def test_what_differs_is_said(pair, change, message):
    with pytest.raises(ConfigError, match=message):
        compare(pair[0], changed(pair[1], change))


@pytest.mark.parametrize(
    ("used", "skipped"),
    [
        ({"annotated": 5, "maps": {}}, {"unusable": "a.mat is damaged"}),
        ({"loss": 0.5}, {"remarked": {"images": [["damaged", "a.jpg"]]}}),
        ({"found": {}, "unusable": ["annotations[3]: x"]}, {"skipped": ["missing", "a.jpg"]}),
    ],
)
def test_images_that_one_of_both_skipped_are_said(pair, used, skipped):
    """In the ways in which kinds of evaluations say so."""
    about = {"image": "a"}
    first, second = (dataclasses.replace(pair[0], records=[about | of]) for of in (used, skipped))
    with pytest.raises(ConfigError, match="example 0, is skipped: False and True"):
        check_comparable(first, second)
    check_comparable(first, first)
    assert [len(s) for s in strata_of(lambda weights: {}, first.records + second.records)] == [1]


def test_where_data_lay_does_not_matter(pair):
    def moved(folder):
        def change(records, settings):
            settings["sources"] = [{"kind": "coco", "path": f"{folder}/x.json", "crowd": None}]
            for of_image in records:
                of_image["image"] = f"{folder}/{of_image['image'].rpartition('/')[2]}"

        return change

    first, second = (changed(pair[0], moved(folder)) for folder in ("/here", "/there"))
    check_comparable(first, second)
    second.settings["sources"][0]["crowd"] = "keep"
    with pytest.raises(ConfigError, match=r"sources\[0\], crowd: None and 'keep'"):
        check_comparable(first, second)


@pytest.mark.parametrize(
    "settings",
    [
        {"truth": "/{}/val.json", "images": "/{}/images", "truth_digest": "x"},
        {"truth": "/{}/val.json", "images": None, "boxes": "/{}/boxes.json", "boxes_digest": "y"},
        {"path": "/{}", "split": "test", "truth_digest": "x"},
    ],
)
def test_kinds_without_sources_may_lie_anywhere(pair, settings):
    def at(folder, **changes):
        filled = {
            name: value and value.format(folder) for name, value in (settings | changes).items()
        }
        return dataclasses.replace(pair[0], settings=filled)

    check_comparable(at("here"), at("there"))
    for name in settings.keys() & {"truth_digest", "boxes_digest", "split"}:
        with pytest.raises(ConfigError, match=f"{name}: .* and 'other'"):
            check_comparable(at("here"), at("here", **{name: "other"}))


def test_boxes_that_are_made_otherwise_are_other_boxes(pair):
    found = [
        dataclasses.replace(pair[0], settings={"boxes": boxes})
        for boxes in ("truth", "jittered", "/here/boxes.json")
    ]
    for one in found:
        for other in found:
            if one is not other:
                with pytest.raises(ConfigError, match="boxes: "):
                    check_comparable(one, other)


def test_kinds_that_cannot_be_compared(pair, monkeypatch):
    other = dataclasses.replace(pair[1], kind="edges")
    with pytest.raises(ConfigError, match=r"of kind 'prompts', .* of kind 'edges'"):
        compare(pair[0], other)
    with pytest.raises(ConfigError, match="unknown kind 'nothing'"):
        compare(dataclasses.replace(pair[0], kind="nothing"), other)
    without = dataclasses.replace(comparisons.KINDS["prompts"], measures=None)
    monkeypatch.setattr(comparisons, "KINDS", {"prompts": without})
    with pytest.raises(ConfigError, match="'prompts' cannot be compared"):
        compare(*pair)


def test_measures_are_chosen_by_name(pair):
    found = compare(*pair, measures=["box"], num_draws=10)
    assert [d.measure for d in found.differences] == ["mean/box", "d0/box", "d1/box"]
    with pytest.raises(ConfigError, match="no measure bxo; there are center_1, box"):
        compare(*pair, measures=["bxo"])


def test_undefined_draws_are_counted(pair, monkeypatch):
    def measures(records, settings):
        def measure(multiplicities):
            # Undefined without the first example, as the AP of no object is.
            return {"d0/ap": 2.0} if multiplicities[0] else {}

        return measure

    kind = dataclasses.replace(comparisons.KINDS["prompts"], measures=measures)
    monkeypatch.setattr(comparisons, "KINDS", {"prompts": kind})
    found = compare(*pair, num_draws=60)
    (d,) = found.differences
    assert 5 < d.num_undefined < 40  # the first of 40 is missing from 0.975 ** 40 of the draws
    assert d.interval == (0.0, 0.0)
    json.dumps(found.as_json(), allow_nan=False)
    console = Console(width=100, record=True)
    found.print_table(console)
    text = console.export_text()
    assert f"d0/ap is undefined in {d.num_undefined} draws" in text
    assert "In percent" not in text
    assert "too short" not in text


def test_few_examples_are_said(tmp_path):
    pair = [
        results_of(tmp_path / name, many_records(np.random.default_rng(0), (40, 19), shift=shift))
        for name, shift in (("a", 0.0), ("b", 0.1))
    ]
    console = Console(width=100, record=True)
    compare(*pair, num_draws=5).print_table(console)
    assert "A data set has 19 examples: intervals of fewer than 20" in console.export_text()


def difference(name, value, low=None, high=None):
    interval = Interval(
        value - 0.01 if low is None else low, value + 0.01 if high is None else high
    )
    return Difference(name, 0.5, 0.5 + value, interval, 0.01)


def made_up(*differences):
    return Comparison("a", "b", "prompts", 10, 5, 100, 0, differences)


def test_figures_are_of_measures_of_data_sets():
    many = made_up(
        *(difference(f"{d}/{m}", 0.1) for m in ("box", "random_1") for d in ("mean", "x", "y"))
    )
    assert many.drawable_measures() == ["box", "random_1"]
    for measure in (None, "box"):
        picture = many.figure(measure)
        assert picture.ndim == 3
        assert picture.std() > 10
    with pytest.raises(ConfigError, match="no measure 'mean' to draw"):
        many.figure("mean")
    assert made_up(difference("ods", 0.1)).figure() is None
    undefined = made_up(difference("x/ap", 0.1, np.nan, np.nan), difference("y/ap", -0.1))
    assert undefined.figure().std() > 10


def test_the_table_fits_100_columns(pair):
    console = Console(width=100, record=True)
    compare(*pair, num_draws=50).print_table(console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    (of_d0,) = [line for line in lines if line.strip().startswith("d0")]
    assert of_d0.split()[1] == "center_1"
    assert " to " in of_d0


def test_names_with_brackets_are_printed_as_they_are(tmp_path):
    records = [record(name, "0.jpg", 0.5) for name in ("cells [a]", "cells [/old]")]
    results = results_of(tmp_path / "r", records)
    console = Console(width=100, record=True)
    compare(results, results, num_draws=5).print_table(console)
    text = console.export_text()
    assert "cells [a]" in text
    assert "cells [/old]" in text
