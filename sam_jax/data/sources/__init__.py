"""Sources of samples; one module a format."""

import json
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from sam_jax.buckets import DataPath
from sam_jax.data.samples import Sample
from sam_jax.data.tally import Tally
from sam_jax.files import P, data_files


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


@runtime_checkable
class TruthSource(Source, Protocol):
    """A source that can tell, without decoding anything, whether the truth of a sample changed."""

    def truth(self, index: int) -> bytes:
        """Content that a sample's masks are read from; of pictures alone, name and size.

        The same wherever the data set lies.

        Raises:
          SkippedSampleError: it cannot be read.
          OSError: likewise.
        """
        ...


def visible_files(folder: P, suffixes: Iterable[str], left_out: Tally) -> list[P]:
    """The files of ``files.data_files``; hidden ones are counted as left out."""
    found, hidden = data_files(folder, suffixes)
    if hidden:
        left_out.add("hidden files", str(hidden[0]), len(hidden))
    return found


def truth_of(source: Source, index: int) -> bytes:
    """The truth of a sample; nothing where its source reads no files. Raises what that does."""
    return source.truth(index) if isinstance(source, TruthSource) else b""


def truth_bytes(said: Any, files: Iterable[DataPath] = ()) -> bytes:
    """Values of JSON and named files as bytes.

    Args:
      said: what an annotation file says, or the sample's name.
      files: whose names and contents are added.

    Raises:
      OSError: one of them cannot be read.
    """
    parts = [json.dumps(said).encode()]
    for file in files:
        parts += [json.dumps(file.name).encode(), file.read_bytes()]
    # With their lengths, so that no two lists make the same bytes.
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)
