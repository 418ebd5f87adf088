"""Several sources under one name."""

from collections.abc import Sequence

import numpy as np

from sam_jax.data.samples import Sample
from sam_jax.data.sources import ListingSource, Source, truth_of
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError


class JoinedSource:
    """The samples of several sources, one source after another: a data set that comes in parts.

    Args:
      parts: the opened parts, each of which says where its samples come from by the name of all.
      name: what `Sample.dataset` says.

    Raises:
      ConfigError: there is no part.
    """

    def __init__(self, parts: Sequence[Source], name: str = "joined"):
        if not parts:
            raise ConfigError("a source of kind 'joined' needs parts")
        self.name = name
        self.left_out = Tally()
        for part in parts:
            self.left_out.update(part.left_out)
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        """The sample at 0 <= index < len; raises what its part does."""
        number, within = self._place(index)
        return self._parts[number][within]

    def file_name(self, index: int) -> str:
        """The file below its part, after the number of the part."""
        number, within = self._place(index)
        part = self._parts[number]
        name = part.file_name(within) if isinstance(part, ListingSource) else str(within)
        return f"{number}/{name}"

    def num_masks(self, index: int) -> int:
        """The number of masks; raises what its part does."""
        number, within = self._place(index)
        part = self._parts[number]
        if isinstance(part, ListingSource):
            return part.num_masks(within)
        return len(part[within].masks_rle)

    def truth(self, index: int) -> bytes:
        """Content as its part has it; raises what that does."""
        number, within = self._place(index)
        return truth_of(self._parts[number], within)

    def _place(self, index: int) -> tuple[int, int]:
        """The number of the part that a sample is of, and its place there."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        return number, index - start
