"""Sources of samples; one module a format."""

from typing import Protocol, runtime_checkable

from sam_jax.data.samples import Sample
from sam_jax.data.tally import Tally


@runtime_checkable
class Source(Protocol):
    """Random access to the samples of one data set.

    Sources are pickled into worker processes, so they hold paths and indices,
    not open files.

    Attributes:
      name: what `Sample.dataset` says.
      left_out: what of the data set is not among the samples, and not in them, by reason. Known
        when the source is opened.
    """

    name: str
    left_out: Tally

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The sample at 0 <= index < len.

        Raises:
          CorruptSampleError: what stands there cannot be used.
          NoObjectError: nothing is marked in it.
        """
        ...


@runtime_checkable
class ListingSource(Source, Protocol):
    """A source that can tell its samples apart, and count their masks, without their pictures."""

    def file_name(self, index: int) -> str:
        """The name of the picture below the data set's folder.

        Different for all samples, and the same wherever the data set lies, and in whatever order
        its files are found.
        """
        ...

    def num_masks(self, index: int) -> int:
        """The number of masks, unusable and empty ones included where telling takes decoding.

        Raises:
          SkippedSampleError: the annotation cannot be read.
        """
        ...
