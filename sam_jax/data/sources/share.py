"""A share of a source's samples, for data that come without a split."""

import itertools

import numpy as np

from sam_jax.data.samples import Sample
from sam_jax.data.sources import ListingSource, Source, truth_of
from sam_jax.errors import ConfigError


class ShareSource:
    """The samples in an interval of a shuffled source: disjoint intervals share no sample.

    The shuffle depends on the number of samples alone, so that it is the same in every program, and
    another one as soon as samples are added.

    Args:
      source: the opened source.
      share: the interval's ends, of [0, 1].

    Raises:
      ConfigError: no sample is in it.
    """

    def __init__(self, source: Source, share: tuple[float, float]):
        self.name = source.name
        self.left_out = source.left_out
        self._source = source
        order = np.random.default_rng(len(source)).permutation(len(source))
        first, last = _ends(share, len(source))
        self._indices = np.sort(order[first:last])
        if not len(self._indices):
            enough = next(n for n in itertools.count(len(source)) if np.ptp(_ends(share, n)))
            raise ConfigError(
                f"{source.name}: the share {share} of {len(source)} images is none: it takes "
                f"{enough} images at least, or data that are split already, or a larger share"
            )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        """The sample at 0 <= index < len; raises what the source does."""
        return self._source[int(self._indices[index])]

    def file_name(self, index: int) -> str:
        """The name that the source has for the sample, or its place there."""
        place = int(self._indices[index])
        source = self._source
        return source.file_name(place) if isinstance(source, ListingSource) else str(place)

    def num_masks(self, index: int) -> int:
        """The number of masks; raises what the source does."""
        place = int(self._indices[index])
        if isinstance(self._source, ListingSource):
            return self._source.num_masks(place)
        return len(self._source[place].masks_rle)

    def truth(self, index: int) -> bytes:
        """Content as the source has it; raises what that does."""
        return truth_of(self._source, int(self._indices[index]))


def _ends(share: tuple[float, float], number: int) -> tuple[int, int]:
    first, last = share
    return round(first * number), round(last * number)
