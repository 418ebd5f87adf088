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
