"""One-to-one matching of predicted edge pixels with an annotator's, exactly."""

import functools
import math
from typing import no_type_check

import numba
import numpy as np

from sam_jax.arrays import Bool, Int

# Costs are integers: hundredths of a pixel, and a hundred times the reach for what stays alone.
_UNITS_PER_PX = 100
_ALONE_RATE = 100

# What rows have instead of a column: none so far, or none for good.
_WAITING, _ALONE = -1, -2
_FAR = np.int64(2**62)


class EdgePixels:
    """The pixels of an edge map, ready to be matched with any number of others of the same size.

    Args:
      edges: the map.
      max_distance_px: how far apart matched pixels may lie, inclusive; Euclidean.
    """

    def __init__(self, edges: Bool[np.ndarray, "h w"], max_distance_px: float):
        self._reach = math.floor(max_distance_px)
        self._max_distance_px = max_distance_px
        # With as much around them as matched pixels may lie apart, places of all maps are numbers.
        self._padded_hw = (edges.shape[0] + 2 * self._reach, edges.shape[1] + 2 * self._reach)
        self._places = np.flatnonzero(np.pad(edges, self._reach))

    def __len__(self) -> int:
        return len(self._places)

    def match(self, others: "EdgePixels") -> Int[np.ndarray, "n"]:
        """The number of the other pixel that each is matched with, or -1.

        As many pixels are matched as can be, and of such matchings it is one of least total
        distance. The benchmark's own solver is given random edges to outliers and loses some
        matches by that, others in each run; this is what it approximates, the same every time.

        Args:
          others: with the same greatest distance.

        Returns:
          numbers of pixels, counted row by row.

        Source: Martin, Fowlkes and Malik 2004, appendix B, and the benchmark's ``match.cc``; solved
        by shortest augmenting paths, Jonker and Volgenant 1987.
        """
        alone = math.ceil(_ALONE_RATE * _UNITS_PER_PX * self._max_distance_px)
        if len(self) <= len(others):
            return _assign(self._places, others._graph, alone, len(others))
        # The many are offered to the few, who compete less: up to four times as fast.
        numbers = _assign(others._places, self._graph, alone, len(self))
        is_matched = numbers >= 0
        matched = np.full(len(self), -1, np.int32)
        matched[numbers[is_matched]] = np.flatnonzero(is_matched)
        return matched

    @functools.cached_property
    def _graph(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pixels within reach of every place; see ``_edges``."""
        sides = np.arange(-self._reach, self._reach + 1)
        distances = np.hypot(sides[:, None], sides)
        within = distances <= self._max_distance_px
        # Nearest first, so that searches may end early.
        order = np.argsort(distances[within], kind="stable")
        height, width = self._padded_hw
        return _edges(
            self._places,
            (sides[:, None] * width + sides)[within][order],
            np.rint(_UNITS_PER_PX * distances[within][order]).astype(np.int32),
            height * width,
        )


# Below, rows are pixels that are to be matched, columns those that they are offered. A price is
# what must be paid besides the distance for taking a column from others; it never falls, and is 0
# while nobody has it. Each row has what is cheapest for it, price included, or pays for staying
# alone. The tests' checker of annotations would stand between these functions and their compiler.


@numba.njit(nogil=True)
@no_type_check
def _assign(places, graph, alone, num_columns):
    """The column of each row, -1 for none, such that distances and what stays alone cost least."""
    prices = np.zeros(num_columns, np.int64)
    owners = np.full(num_columns, -1, np.int32)
    taken = np.full(places.size, _WAITING, np.int32)
    taken_costs = np.zeros(places.size, np.int64)
    matching = prices, owners, taken, taken_costs
    distances = np.full(num_columns, _FAR, np.int64)
    previous = np.empty(num_columns, np.int32)
    previous_costs = np.empty(num_columns, np.int64)
    seen = np.empty(num_columns, np.int32)
    reached = distances, previous, previous_costs, seen
    for first in _bid(places, graph, alone, matching):
        best, free_column, left_row, num_seen = _search(
            first, places, graph, alone, matching, reached
        )
        for column in seen[:num_seen]:
            prices[column] += max(best - distances[column], 0)
            distances[column] = _FAR
        # Each row on the way takes the column that it was reached over.
        column = free_column
        if column < 0:
            column = taken[left_row]
            taken[left_row] = _ALONE
        while column >= 0:
            row = previous[column]
            column_before = taken[row]
            taken[row], taken_costs[row], owners[column] = column, previous_costs[column], row
            column = column_before
    return np.maximum(taken, -1)


@numba.njit(nogil=True)
@no_type_check
def _edges(marked, steps, costs, num_places):
    """Columns within reach of every place: where each place's begin, their numbers and costs.

    Args:
      marked: places of the columns, rising.
      steps: from a place to those within reach of it, nearest first; with each its opposite.
      costs: of the steps.
      num_places: of the image with as much around it as a step reaches.
    """
    starts = np.zeros(num_places + 1, np.int32)
    for place in marked:
        for step in steps:
            starts[place + step + 1] += 1
    starts = np.cumsum(starts).astype(np.int32)
    free = starts[:-1].copy()
    columns = np.empty(starts[-1], np.int32)
    edge_costs = np.empty(starts[-1], np.int32)
    for kind in range(steps.size):
        for column in range(marked.size):
            place = marked[column] + steps[kind]
            edge = free[place]
            columns[edge], edge_costs[edge] = column, costs[kind]
            free[place] += 1
    return starts, columns, edge_costs


@numba.njit(nogil=True)
@no_type_check
def _bid(places, graph, alone, matching):
    """Rows take what is cheapest for them and raise its price to that of their second choice.

    Each row has two turns at most: where there are more rows than columns, bids would go on for
    long.

    Returns:
      the rows that were outbid and are to be searched for.
    """
    starts, columns, costs = graph
    prices, owners, taken, taken_costs = matching
    waiting = np.arange(taken.size)
    num_waiting = taken.size
    for _ in range(2):
        num_outbid = 0
        for row in waiting[:num_waiting]:
            least, second, choice = alone, alone, -1
            for edge in range(starts[places[row]], starts[places[row] + 1]):
                # Prices only add to the cost.
                if costs[edge] >= second:
                    break
                cost = costs[edge] + prices[columns[edge]]
                if cost < least:
                    least, second, choice = cost, least, edge
                elif cost < second:
                    second = cost
            if choice < 0:
                taken[row] = _ALONE
                continue
            column = columns[choice]
            loser = owners[column]
            if loser >= 0 and least == second:
                # It has nothing to bid.
                loser = row
            else:
                prices[column] += second - least
                taken[row], taken_costs[row], owners[column] = column, costs[choice], row
            if loser >= 0:
                taken[loser] = _WAITING
                # Behind the place that is being read.
                waiting[num_outbid] = loser
                num_outbid += 1
        num_waiting = num_outbid
    return waiting[:num_waiting]


@numba.njit(nogil=True)
@no_type_check
def _search(first, places, graph, alone, matching, reached):
    """Dijkstra's search for the cheapest chain of changes that settles a row.

    A chain ends at a column that is free, or with a row of the chain that stays alone from now on.

    Args:
      first: the row.
      places, graph, alone: see ``_assign``.
      matching: prices and owners of columns; what rows have taken, and its cost.
      reached: distances of columns, all far away, of which those that are seen have theirs
        afterwards; from which row each is reached, and at which cost; columns that were seen.

    Returns:
      the chain's cost, the free column or -1, the row that stays alone or -1, and the number of
      columns seen.
    """
    starts, columns, costs = graph
    prices, owners, _, taken_costs = matching
    distances, previous, previous_costs, seen = reached
    heap = np.empty(64, np.int64)
    heap_columns = np.empty(64, np.int32)
    num_seen, size = 0, 0
    best, free_column, left_row = alone, -1, first
    row, base = first, np.int64(0)
    while True:
        for edge in range(starts[places[row]], starts[places[row] + 1]):
            if base + costs[edge] >= best:
                break
            column = columns[edge]
            distance = base + costs[edge] + prices[column]
            if distance >= min(best, distances[column]):
                continue
            if distances[column] == _FAR:
                seen[num_seen] = column
                num_seen += 1
            distances[column], previous[column] = distance, row
            previous_costs[column] = costs[edge]
            if owners[column] < 0:
                best, free_column, left_row = distance, column, -1
                continue
            if size == heap.size:
                heap = np.concatenate((heap, heap))
                heap_columns = np.concatenate((heap_columns, heap_columns))
            _push(heap, heap_columns, size, distance, column)
            size += 1
        # An entry that was found a shorter way to is passed over.
        while size and heap[0] != distances[heap_columns[0]]:
            size -= 1
            _pop(heap, heap_columns, size)
        if not size or heap[0] >= best:
            return best, free_column, left_row, num_seen
        column = heap_columns[0]
        row = owners[column]
        # What the row has costs it nothing more.
        base = heap[0] - (taken_costs[row] + prices[column])
        size -= 1
        _pop(heap, heap_columns, size)
        if base + alone < best:
            best, free_column, left_row = base + alone, -1, row


@numba.njit(nogil=True)
@no_type_check
def _push(heap, heap_columns, size, distance, column):
    """Adds to a binary heap of ``size`` entries."""
    child = size
    while child:
        parent = (child - 1) >> 1
        if heap[parent] <= distance:
            break
        heap[child], heap_columns[child] = heap[parent], heap_columns[parent]
        child = parent
    heap[child], heap_columns[child] = distance, column


@numba.njit(nogil=True)
@no_type_check
def _pop(heap, heap_columns, size):
    """Removes the first entry of a binary heap, which leaves ``size`` entries."""
    distance, column = heap[size], heap_columns[size]
    parent, child = 0, 1
    while child < size:
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= distance:
            break
        heap[parent], heap_columns[parent] = heap[child], heap_columns[child]
        parent, child = child, 2 * child + 1
    heap[parent], heap_columns[parent] = distance, column
