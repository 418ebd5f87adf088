"""A digest of what samples are scored by, which tells corrected annotations from those before."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sam_jax.data.samples import SkippedSampleError
from sam_jax.data.sources import Source, truth_bytes, truth_of

# Reading waits for storage, not for the processor.
_THREADS = 16
_DIGEST_BYTES = 8

_Item = TypeVar("_Item")


def truth_digest(source: Source, indices: Sequence[int]) -> str:
    """A digest of the truth of some samples, the same wherever and in whatever folder they lie.

    It covers what `TruthSource.truth` gives: of annotation files the part that is about the
    samples, of mask files names and contents, of pictures without masks names and sizes. Pictures
    beside masks are not read, nor is anything of generated data, which their options say.

    Args:
      source: the opened source.
      indices: of the samples, in the order in which they are used.

    Raises:
      BucketError: a bucket cannot be read.
    """
    return _joined(indices, functools.partial(_content, source))


def files_digest(paths: Sequence[Path]) -> str:
    """A digest of files' names and contents, in their order.

    Files that cannot be read, which whoever uses them reports, have one of their own.
    """
    return _joined(paths, _file)


def _joined(items: Iterable[_Item], content: Callable[[_Item], bytes]) -> str:
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(lambda item: hashlib.blake2b(content(item)).digest(), items)
        return hashlib.blake2b(b"".join(parts), digest_size=_DIGEST_BYTES).hexdigest()


def _content(source: Source, index: int) -> bytes:
    try:
        return b"truth" + truth_of(source, index)
    except (SkippedSampleError, OSError):
        # Evaluation says which; messages have places in them.
        return b"unreadable"


def _file(path: Path) -> bytes:
    try:
        return truth_bytes(path.name, [path])
    except OSError:
        return b"unreadable"
