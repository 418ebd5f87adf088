"""Matching of edge pixels beside an assignment by SciPy, and by hand."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.extra import numpy as arrays
from scipy.optimize import linear_sum_assignment

from sam_jax.evaluation.edges.matching import EdgePixels

shapes = st.tuples(st.integers(1, 10), st.integers(1, 10))
pairs = shapes.flatmap(lambda s: st.tuples(arrays.arrays(bool, s), arrays.arrays(bool, s)))


def row(drawing):
    return np.array([[mark == "#" for mark in drawing]])


def match(prediction, boundaries, max_distance_px):
    pixels = [EdgePixels(edges, max_distance_px) for edges in (prediction, boundaries)]
    return pixels[0].match(pixels[1])


def cost_of(distances, num_alone, max_distance_px):
    return np.rint(100 * distances).sum() + num_alone * math.ceil(10_000 * max_distance_px)


def least_cost(prediction, boundaries, max_distance_px):
    """Every pixel of the prediction has a column of its own for staying alone."""
    rows, columns = np.argwhere(prediction), np.argwhere(boundaries)
    distances = np.hypot(*np.moveaxis(rows[:, None] - columns[None], -1, 0))
    costs = np.where(distances <= max_distance_px, np.rint(100 * distances), 1e9)
    alone = np.full((len(rows), len(rows)), math.ceil(10_000 * max_distance_px))
    costs = np.concatenate([costs, alone], axis=1)
    return costs[linear_sum_assignment(costs)].sum()


@hypothesis.given(pairs, st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 4.34]))
def test_no_assignment_costs_less(pair, max_distance_px):
    prediction, boundaries = pair
    found = match(prediction, boundaries, max_distance_px)
    is_matched = found >= 0
    assert len(set(found[is_matched])) == is_matched.sum()
    offsets = np.argwhere(prediction)[is_matched] - np.argwhere(boundaries)[found[is_matched]]
    distances = np.hypot(*offsets.T)
    assert (distances <= max_distance_px).all()
    cost = cost_of(distances, (~is_matched).sum(), max_distance_px)
    assert cost == least_cost(prediction, boundaries, max_distance_px)


@hypothesis.given(pairs, st.sampled_from([1.0, 2.0, 4.34]))
def test_it_costs_the_same_turned_and_the_other_way_round(pair, max_distance_px):
    prediction, boundaries = pair

    def cost(one, other):
        found = match(one, other, max_distance_px)
        offsets = np.argwhere(one)[found >= 0] - np.argwhere(other)[found[found >= 0]]
        return np.count_nonzero(found >= 0), np.rint(100 * np.hypot(*offsets.T)).sum()

    expected = cost(prediction, boundaries)
    assert cost(boundaries, prediction) == expected
    assert cost(np.rot90(prediction), np.rot90(boundaries)) == expected


def test_the_nearest_is_given_up_for_one_match_more():
    # Each is nearest to the same mark, and only one of them reaches the other.
    found = match(row("..##..."), row("...##.."), 1.0)
    assert found.tolist() == [0, 1]


def test_a_long_chain_moves_on_for_one_match_more():
    prediction, boundaries = row("#" * 40 + "."), row("." + "#" * 40)
    assert match(prediction, boundaries, 1.0).tolist() == list(range(40))


def test_of_as_many_matches_the_nearest_count():
    assert match(row("#...."), row(".#.#."), 3.0).tolist() == [0]
    # 0 and 2 pixels rather than 1 and 1 would cost the same; 0 and 1 less than either.
    assert match(row("##..."), row("##..."), 3.0).tolist() == [0, 1]


@pytest.mark.parametrize(("max_distance_px", "expected"), [(4.9, [-1]), (5.0, [0]), (5.1, [0])])
def test_reach_is_inclusive_and_euclidean(max_distance_px, expected):
    prediction, boundaries = np.zeros((2, 5, 6), bool)
    prediction[0, 1], boundaries[3, 5] = True, True
    assert match(prediction, boundaries, max_distance_px).tolist() == expected


def test_pixels_of_opposite_borders_are_far_apart():
    prediction, boundaries = np.zeros((2, 4, 7), bool)
    prediction[1:3, 6], boundaries[1:3, 0] = True, True
    assert match(prediction, boundaries, 2.0).tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("prediction", "boundaries"), [("....", ".#.."), (".#..", "...."), (".", ".")]
)
def test_nothing_matches_nothing(prediction, boundaries):
    assert (match(row(prediction), row(boundaries), 2.0) == -1).all()


def test_many_rows_for_few_columns_end():
    """Where more is predicted than is marked, bids for the same few pixels must not go on."""
    found = match(np.ones((40, 40), bool), np.pad(np.ones((20, 20), bool), 10), 4.34)
    assert (found >= 0).sum() == 400
    assert (np.argwhere(np.ones((40, 40), bool))[found >= 0].min(axis=0) == 10).all()
