"""Statistics of data sets of a few masks, worked out by hand."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from rich.console import Console

from sam_jax.data.mask_stores import ImageMasks
from sam_jax.data.samples import CorruptSampleError
from sam_jax.data.tally import Tally
from sam_jax.dataset_statistics import counting
from sam_jax.dataset_statistics.counting import count_masks, drawn
from sam_jax.dataset_statistics.counts import CENTER_CELLS, NUM_STRATA, MaskCounts
from sam_jax.dataset_statistics.figure import draw_statistics
from sam_jax.dataset_statistics.report import DatasetReport, StoreStatistics
from tests.unit.data_fixtures import box_mask, compress

HW = (20, 40)


class Reader:
    """Of one image; at the top of the file, so that other processes can have it."""

    def __init__(self, image):
        self.image = image

    def __call__(self):
        if isinstance(self.image, Exception):
            raise self.image
        return self.image


class Store:
    name = "made"
    left_out = Tally()

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def reader(self, index):
        return Reader(self.images[index])


def image_of(*masks, name="x", unusable=(), hw=HW):
    return ImageMasks(name, hw, tuple(compress(mask) for mask in masks), unusable)


def box(y0, y1, x0, x1):
    return box_mask(HW, y0, y1, x0, x1)


def statistics(*images, name="made"):
    return StoreStatistics(name, count_masks(Store(images), num_workers=1), Tally(), 1.0)


def many(number, rng):
    """Images of boxes with a notch, of many sizes."""
    images = []
    for _ in range(number):
        masks = []
        for _ in range(rng.integers(0, 14)):
            height, width = rng.integers(1, 12, 2)
            mask = box(2, 2 + height, 3, 3 + width)
            mask[2, 3 : 3 + width // 2] = False
            masks.append(mask)
        images.append(image_of(*masks))
    return images


def test_sizes_centres_and_concavity_by_hand():
    # Half of the image, its left; and an L, of 3 by 3 without the upper right 2 by 2.
    corner = box(10, 13, 30, 33) & ~box(10, 12, 31, 33)
    found = statistics(image_of(box(0, 20, 0, 20), corner))
    counts = found.counts
    assert (counts.num_images, counts.num_masks) == (1, 2)
    sizes = [np.sqrt(0.5), np.sqrt(5 / 800)]
    assert found.mean_size == pytest.approx(np.mean(sizes), abs=1e-11)
    assert found.size_quantile(0.5) == pytest.approx(sizes[1], abs=1e-3)
    assert found.size_quantile(0.9) == pytest.approx(sizes[0], abs=1e-3)
    # The hull of the L has the pixel on its diagonal besides.
    assert found.mean_concavity == pytest.approx((0 + 1 / 6) / 2, abs=1e-11)
    y, x = np.nonzero(counts.centers)
    # (10, 10) of 40 by 20, and the mean of (30, 10), (30, 11), (30..32, 12) in middles.
    middle = (30 * 3 + 31 + 32) / 5 + 0.5, (10 + 11 + 3 * 12) / 5 + 0.5
    cells = [(32, 16), (int(middle[1] / 20 * CENTER_CELLS), int(middle[0] / 40 * CENTER_CELLS))]
    assert sorted(zip(y.tolist(), x.tolist(), strict=True)) == sorted(cells)


def test_images_by_their_number_of_masks():
    numbers = [0, 1, 10, 11, 50, 51, 100, 101, 200, 201, 300]
    mask = box(0, 1, 0, 1)
    found = statistics(*(image_of(*[mask] * number) for number in numbers))
    assert found.image_rates.tolist() == [0.2] * 5
    assert found.masks_per_image == sum(numbers) / 10
    report = DatasetReport((found,)).as_json()["datasets"]["made"]
    assert report["num_images"] == 10
    assert report["num_images_without_mask"] == 1
    assert report["masks_per_image"]["image_rates"]["<=10"] == 0.2


def test_what_cannot_be_used_is_counted_with_its_reason():
    good = box(0, 2, 0, 2)
    bad = {"size": list(HW), "counts": "~"}
    odd = ImageMasks("odd", HW, (compress(good), bad, compress(np.eye(3, dtype=bool))))
    empty = image_of(box(0, 0, 0, 0), good, name="empty", unusable=("no list",))
    lost = CorruptSampleError("lost", "missing json")
    counts = count_masks(Store([odd, empty, lost, ImageMasks("none", None, ())]))
    assert counts.num_masks == counts.num_images == 2
    assert dict(counts.skipped_images.counts) == {"missing json": 1}
    assert dict(counts.skipped_masks.counts) == {
        "bad rle": 1,
        "size mismatch": 1,
        "empty": 1,
        "unusable annotation": 1,
    }
    assert "mask 1" in counts.skipped_masks.examples["bad rle"]
    assert counts.masks_per_image == {1: 2, 0: 1}


def test_nothing_depends_on_order_or_parts(monkeypatch):
    images = many(60, np.random.default_rng(0))
    whole = DatasetReport((statistics(*images),)).as_json()
    assert whole["datasets"]["made"]["num_masks"] > 200
    monkeypatch.setattr(counting, "_IMAGES_PER_PART", 7)
    for shuffled in (images, images[::-1]):
        assert DatasetReport((statistics(*shuffled),)).as_json() == whole


def test_processes_count_the_same(monkeypatch):
    images = many(30, np.random.default_rng(1))
    monkeypatch.setattr(counting, "_IMAGES_PER_PART", 6)
    progress = []
    counts = count_masks(
        Store(images), num_workers=2, on_progress=lambda done, total: progress.append((done, total))
    )
    assert progress == [(6 * part, 30) for part in range(1, 6)]
    of_many, of_one = (
        DatasetReport((StoreStatistics("made", c, Tally(), 1.0),)).as_json()
        for c in (counts, count_masks(Store(images), num_workers=1))
    )
    assert of_many == of_one


@hypothesis.given(st.integers(0, 50), st.integers(1, 60), st.integers(0, 3))
def test_draws_rise_and_hold_no_image_twice(number, limit, seed):
    indices = list(drawn(number, limit, seed))
    assert indices == sorted(set(indices))
    assert len(indices) == min(number, limit)
    assert all(0 <= index < number for index in indices)
    # A larger draw holds the smaller one.
    assert set(indices) <= set(drawn(number, limit + 5, seed))


def test_draws_follow_the_seed():
    assert drawn(1000, 10, 0) == drawn(1000, 10, 0) != drawn(1000, 10, 1)
    images = [image_of(*[box(0, 1, 0, 1)] * (number + 1)) for number in range(20)]
    counts = count_masks(Store(images), max_images=3, seed=4)
    assert sorted(counts.masks_per_image) == [index + 1 for index in drawn(20, 3, 4)]
    with pytest.raises(ValueError, match="max_images is 0"):
        count_masks(Store(images), max_images=0)


def with_strata(name, by_stratum):
    """A data set with some masks of one concavity in each of some strata."""
    counts = MaskCounts()
    for stratum, (number, concavity) in by_stratum.items():
        counts.concavity[stratum, int(100 * concavity)] = number
        counts.concavity_units[stratum] = number * round(concavity * 2**40)
        counts.sizes[0] += number
    counts.masks_per_image[1] = counts.num_masks
    return StoreStatistics(name, counts, Tally(), 1.0)


def test_strata_count_alike_whatever_their_number_of_masks():
    one = with_strata("one", {3: (1000, 0.1), 4: (20, 0.5), 6: (19, 0.9)})
    two = with_strata("two", {2: (500, 0.3), 3: (20, 0.3), 4: (400, 0.2)})
    small = with_strata("small", {3: (30, 0.4), 4: (19, 0.4)})
    report = DatasetReport((one, two, small))
    # Of both data sets of some size; the smallest has no say.
    assert report.strata == [3, 4]
    mean, rates = one.stratified_concavity(report.strata)
    assert mean == pytest.approx(0.3, abs=1e-9)
    assert {place: rates[place] for place in np.flatnonzero(rates)} == {10: 0.5, 50: 0.5}
    assert two.stratified_concavity(report.strata)[0] == pytest.approx(0.25, abs=1e-9)
    assert small.stratified_concavity(report.strata) is None
    assert one.mean_concavity == pytest.approx((100 + 10 + 17.1) / 1039, abs=1e-9)
    # Alone it is measured by its own strata.
    assert DatasetReport((small,)).strata == [3]


def test_a_stratum_begins_where_the_one_below_ends():
    hw = (128, 128)
    squares = [np.zeros(hw, bool) for _ in range(4)]
    for mask, side in zip(squares, (1, 2, 64, 128), strict=True):
        mask[:side, :side] = True
    counts = statistics(image_of(*squares, hw=hw)).counts
    # Sides of 1/128, 1/64, 1/2 and 1 of the image's: edges of halves of octaves.
    assert np.flatnonzero(counts.concavity.sum(axis=1)).tolist() == [1, 3, 13, NUM_STRATA - 1]


def test_json_holds_no_value_that_is_none_of_json(tmp_path):
    report = DatasetReport((statistics(image_of(box(0, 1, 0, 1))),), max_images=5, seed=2)
    content = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert content["strata"]["used"] == []
    assert content["datasets"]["made"]["concavity"]["stratified_mean"] is None
    assert (content["max_images"], content["seed"]) == (5, 2)


@pytest.mark.parametrize("number", [1, 8])
def test_figures_of_few_and_many_data_sets(number):
    rng = np.random.default_rng(2)
    stores = [
        statistics(image_of(box(0, 1, 0, 1)), *many(20, rng), name=f"a data set of name {place}")
        for place in range(number)
    ]
    picture = draw_statistics(DatasetReport(tuple(stores)), dpi=50)
    assert picture.shape[1] == 525
    assert picture.std() > 10


def test_names_with_brackets_are_printed_as_they_are():
    stores = [with_strata(name, {3: (1000, 0.1)}) for name in ("cells [a]", "cells [/old]")]
    console = Console(width=100, record=True)
    DatasetReport(tuple(stores)).print_table(console)
    text = console.export_text()
    assert "cells [a]" in text
    assert "cells [/old]" in text
