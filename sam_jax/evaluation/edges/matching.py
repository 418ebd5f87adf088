"""One-to-one matching of predicted edge pixels with an annotator's, exactly."""

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


class Annotation:
    """An annotator's boundaries, ready to be matched with any number of predictions.

    Args:
      boundaries: the pixels that are marked.
      max_distance_px: how far apart matched pixels may lie, inclusive; Euclidean.
    """

    def __init__(self, boundaries: Bool[np.ndarray, "h w"], max_distance_px: float):
        reach = math.floor(max_distance_px)
        dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        distances = np.hypot(dy, dx)
        within = distances <= max_distance_px
        # Nearest first, so that searches may end early.
        order = np.argsort(distances[within], kind="stable")
        self._reach = reach
        self._width = boundaries.shape[1] + 2 * reach
        self._steps = (dy * self._width + dx)[within][order]
        self._costs = np.rint(_UNITS_PER_PX * distances[within][order]).astype(np.int64)
        self._alone = math.ceil(_ALONE_RATE * _UNITS_PER_PX * max_distance_px)
        self.num_pixels = int(np.count_nonzero(boundaries))
        numbers = np.full(boundaries.shape, -1, np.int32)
        numbers[boundaries] = np.arange(self.num_pixels)
        self._numbers = np.pad(numbers, reach, constant_values=-1).ravel()

    def match(
        self, rows: Int[np.ndarray, "n"], columns: Int[np.ndarray, "n"]
    ) -> Int[np.ndarray, "n"]:
        """For each predicted pixel, the number of the marked pixel that it is matched with, or -1.

        As many pixels are matched as can be, and of such matchings it is one of least total
        distance. The benchmark's own solver is given random edges to outliers and loses some
        matches by that, others in each run; this is what it approximates, the same every time.

        Args:
          rows: of the predicted pixels, of which none comes twice.
          columns: theirs.

        Returns:
          numbers of marked pixels, counted row by row of the image.

        Source: Martin, Fowlkes and Malik 2004, appendix B, and the benchmark's ``match.cc``; solved
        by shortest augmenting paths, Jonker and Volgenant 1987.
        """
        places = (rows + self._reach) * self._width + (columns + self._reach)
        return _assign(
            places, self._numbers, self._steps, self._costs, self._alone, self.num_pixels
        )


# Below, rows are predicted pixels and columns are marked ones. A column's price is what must be
# paid besides the distance for taking it from others; it never falls, and is 0 while nobody has
# it. Each row has what is cheapest for it, price included, or pays for staying alone. The tests'
# checker of annotations would stand between these functions and their compiler.


@numba.njit(nogil=True)
@no_type_check
def _assign(places, numbers, steps, costs, alone, num_columns):
    """The column of each row, -1 for none, such that distances and what stays alone cost least."""
    graph = _edges(places, numbers, steps, costs)
    prices = np.zeros(num_columns, np.int64)
    owners = np.full(num_columns, -1, np.int32)
    taken = np.full(places.size, _WAITING, np.int32)
    taken_costs = np.zeros(places.size, np.int64)
    distances = np.full(num_columns, _FAR, np.int64)
    previous = np.empty(num_columns, np.int32)
    previous_costs = np.empty(num_columns, np.int64)
    seen = np.empty(num_columns, np.int32)
    for first in _bid(graph, alone, prices, owners, taken, taken_costs):
        best, free_column, left_row, num_seen = _search(
            first,
            graph,
            alone,
            prices,
            owners,
            taken,
            taken_costs,
            distances,
            previous,
            previous_costs,
            seen,
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
def _edges(places, numbers, steps, costs):
    """Marked pixels within reach of each row, nearest first: a row's start, columns, costs."""
    starts = np.zeros(places.size + 1, np.int64)
    num_edges = 0
    for row in range(places.size):
        for step in steps:
            num_edges += numbers[places[row] + step] >= 0
        starts[row + 1] = num_edges
    columns = np.empty(num_edges, np.int32)
    edge_costs = np.empty(num_edges, np.int64)
    edge = 0
    for row in range(places.size):
        for kind in range(steps.size):
            column = numbers[places[row] + steps[kind]]
            if column >= 0:
                columns[edge], edge_costs[edge] = column, costs[kind]
                edge += 1
    return starts, columns, edge_costs


@numba.njit(nogil=True)
@no_type_check
def _bid(graph, alone, prices, owners, taken, taken_costs):
    """Rows take what is cheapest for them and raise its price to that of their second choice.

    Each row has two turns at most: where there are more rows than columns, bids would go on for
    long.

    Returns:
      the rows that were outbid and are to be searched for.
    """
    starts, columns, costs = graph
    waiting = np.arange(taken.size)
    num_waiting = taken.size
    for _ in range(2):
        num_outbid = 0
        for row in waiting[:num_waiting]:
            least, second, choice = alone, alone, -1
            for edge in range(starts[row], starts[row + 1]):
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
def _search(
    first,
    graph,
    alone,
    prices,
    owners,
    taken,
    taken_costs,
    distances,
    previous,
    previous_costs,
    seen,
):
    """Dijkstra's search for the cheapest chain of changes that settles a row.

    A chain ends at a column that is free, or with a row of the chain that stays alone from now on.

    Args:
      first: the row.
      distances: of columns, all far away; those that are ``seen`` have theirs afterwards.
      previous: from which row each column is reached, and ``previous_costs`` at which cost.
      seen: columns that were reached.

    Returns:
      the chain's cost, the free column or -1, the row that stays alone or -1, and the number of
      columns seen.
    """
    starts, columns, costs = graph
    heap = np.empty(64, np.int64)
    heap_columns = np.empty(64, np.int32)
    num_seen, size = 0, 0
    best, free_column, left_row = alone, -1, first
    row, base = first, np.int64(0)
    while True:
        for edge in range(starts[row], starts[row + 1]):
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
