"""Shards of a data set, one after the other, as one sequence of samples."""

from collections.abc import Sequence, Sized
from typing import Generic, TypeVar

import numpy as np

S = TypeVar("S", bound=Sized)


class Shards(Generic[S]):
    """Shards, each with a length, whose samples are numbered through."""

    def __init__(self, shards: Sequence[S]):
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def find(self, index: int) -> tuple[S, int]:
        """The shard of the sample at 0 <= index < len, and the sample's number in it.

        Raises:
          IndexError: there is no such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        return shard, index - int(self._ends[number]) + len(shard)
