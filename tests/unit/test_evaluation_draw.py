from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from sam_jax.data.samples import CorruptSampleError, Sample
from sam_jax.data.sources import ListingSource, Source
from sam_jax.data.sources.synthetic import SyntheticSource
from sam_jax.data.tally import Tally
from sam_jax.evaluation.draw import MOST_PER_TARGET, draw_until


class Listed:
    """A data set of these names and numbers of masks; -1 is an image that cannot be read."""

    def __init__(self, files: list[tuple[str, int]]):
        self.name = "listed"
        self.left_out = Tally()
        self.files = files
        self.num_counted = 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError("no picture need be read")

    def file_name(self, index: int) -> str:
        return self.files[index][0]

    def num_masks(self, index: int) -> int:
        self.num_counted += 1
        if self.files[index][1] < 0:
            raise CorruptSampleError(self.files[index][0], "unreadable")
        return self.files[index][1]

    def drawn(self, target: int, key: str = "0/listed") -> set[str]:
        return {self.files[index][0] for index in draw_until(self, target, key)}

    def total(self, names: set[str]) -> int:
        return sum(max(count, 0) for name, count in self.files if name in names)


FILES = st.dictionaries(st.text(max_size=4), st.integers(-1, 9), min_size=1, max_size=200)
TARGETS = st.integers(1, 300)


@hypothesis.settings(max_examples=40)
@hypothesis.given(files=FILES, target=TARGETS, random=st.randoms(), key=st.text(max_size=3))
def test_the_draw_follows_from_key_and_names_alone(
    files: dict[str, int], target: int, random: Any, key: str
) -> None:
    source = Listed(list(files.items()))
    shuffled = Listed(random.sample(source.files, len(source)))
    assert source.drawn(target, key) == shuffled.drawn(target, key)
    indices = list(draw_until(source, target, key))
    assert indices == sorted(set(indices))


@hypothesis.settings(max_examples=40)
@hypothesis.given(files=FILES, target=TARGETS)
def test_small_sets_are_taken_whole_and_of_large_ones_just_enough(
    files: dict[str, int], target: int
) -> None:
    source = Listed(list(files.items()))
    drawn, everything = source.drawn(target), set(files)
    if source.total(everything) <= MOST_PER_TARGET * target:
        assert drawn == everything
        return
    assert target <= source.total(drawn) < target + 9 + 1
    # Without the image that was drawn last there would be too few; which it was, a smaller target
    # tells.
    assert any(source.total(drawn - {name}) < target for name in drawn)


@hypothesis.settings(max_examples=40)
@hypothesis.given(files=FILES, targets=st.tuples(TARGETS, TARGETS))
def test_a_larger_target_draws_the_same_images_and_more(
    files: dict[str, int], targets: tuple[int, int]
) -> None:
    source = Listed(list(files.items()))
    assert source.drawn(min(targets)) <= source.drawn(max(targets))


def test_keys_draw_differently_and_every_image_is_as_likely() -> None:
    source = Listed([(f"{number}.png", 1 + number % 3) for number in range(60)])
    draws = [source.drawn(30, f"{seed}/listed") for seed in range(150)]
    assert len({frozenset(drawn) for drawn in draws}) > 145
    counts = np.array([sum(f"{n}.png" in drawn for drawn in draws) for n in range(60)])
    # About a quarter of the images each time: 150 draws of p = 0.26 have a deviation of 5.4.
    assert 34 < counts.mean() < 45
    assert counts.min() > counts.mean() - 5 * 5.4
    assert counts.max() < counts.mean() + 5 * 5.4


def test_only_what_must_be_known_is_counted() -> None:
    source = Listed([(f"{number}.png", 2) for number in range(10_000)])
    assert len(source.drawn(100)) == 50
    assert source.num_counted < 200


def test_the_published_draw_stays() -> None:
    """What a seed draws is part of every published result."""
    source = Listed([(f"{number:03}.jpg", 5) for number in range(40)])
    assert sorted(source.drawn(20, "0/LVIS")) == ["019.jpg", "031.jpg", "035.jpg", "039.jpg"]


def test_unreadable_images_are_drawn_and_count_nothing() -> None:
    source = Listed([(f"{number}.png", 1 if number % 2 else -1) for number in range(400)])
    drawn = source.drawn(40)
    assert source.total(drawn) == 40
    assert len(drawn) > 50


def test_sources_that_list_nothing_are_read() -> None:
    source = SyntheticSource(num_images=12, image_size=(32, 48))
    assert not isinstance(source, ListingSource)
    assert isinstance(source, Source)
    counts = [len(source[index].masks_rle) for index in range(12)]
    drawn = draw_until(source, 10, "0/shapes")
    assert len(drawn) < 12
    assert 10 <= sum(counts[index] for index in drawn) < 10 + max(counts)
    assert draw_until(source, sum(counts), "0/shapes") == range(12)


@pytest.mark.parametrize("target", [14, 13])
def test_the_limit_of_small_sets_is_the_papers_ratio(target: int) -> None:
    source = Listed([(f"{number}.png", 1) for number in range(20)])
    assert len(source.drawn(target)) == (20 if target == 14 else 13)
