"""Tars read in place: an index of each, and reads at known offsets.

A tar has no table of contents, so each is scanned once for its members'
offsets, and the result kept in a small file; from then on a member is a
read at a known offset and nothing is ever extracted. In a bucket likewise,
where a read is a request for a range.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
import tarfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from sam_jax.buckets import BucketPath, DataPath, data_path
from sam_jax.data.samples import CorruptSampleError
from sam_jax.errors import ConfigError
from sam_jax.files import is_hidden

_log = logging.getLogger(__name__)
_BLOCK = tarfile.BLOCKSIZE
# Scanning waits for storage, not for the processor.
_SCAN_THREADS = 8
_BUCKET_SCAN_THREADS = 32
_MAX_OPEN_TARS = 128
# Bytes of a tar's name in the name of its index, which has some 55 bytes more.
_MAX_LABEL_BYTES = 190


class Member(NamedTuple):
    """A file in a tar: its path there, its first byte and its size."""

    name: str
    offset: int
    size: int


class Arrangement(NamedTuple):
    """Content of a tar's index.

    Attributes:
      label: what tells its files from those of other arrangements.
      version: to be raised when `arrange` finds something else than before, so that older indices
        are made anew.
      arrange: the index of a tar's members, a structured array in order of names.
    """

    label: str
    version: int
    arrange: Callable[[Iterable[Member]], np.ndarray]


def find(
    path: str | DataPath | Sequence[str | DataPath],
) -> tuple[list[DataPath], list[DataPath]]:
    """The tars and the folders without tars that paths or patterns name, sorted.

    Args:
      path: a tar, a folder of tars, another folder, a pattern of any of these, or several such.

    Raises:
      FileNotFoundError: nothing is there.
    """
    found, folders = set[DataPath](), set[DataPath]()
    for part in [path] if isinstance(path, (str, Path, BucketPath)) else path:
        matches = _matches(data_path(part))
        if not matches:
            raise FileNotFoundError(f"nothing at {part}")
        for match in matches:
            if not match.is_dir():
                found.add(match)
            elif inside := [tar for tar in match.glob("*.tar") if not is_hidden(Path(tar.name))]:
                found.update(inside)
            else:
                folders.add(match)
    return sorted(found, key=str), sorted(folders, key=str)


def _matches(pattern: DataPath) -> list[DataPath]:
    """Files and folders that a path or a pattern names.

    Folders that are there are taken literally, as their names may hold what patterns are made of;
    where that leads nowhere, the whole is a pattern.
    """
    if isinstance(pattern, BucketPath):
        return [pattern] if pattern.exists() else _visible(pattern, pattern.matches())
    literal, rest = Path(pattern.anchor), pattern.parts[bool(pattern.anchor) :]
    while rest and (literal / rest[0]).exists():
        literal, rest = literal / rest[0], rest[1:]
    if not rest:
        return [literal]
    found = list(literal.glob("/".join(rest)))
    if not found:
        found = list(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    return _visible(pattern, found)


def _visible(pattern: DataPath, found: Iterable[DataPath]) -> list[DataPath]:
    """Matches of a pattern without hidden files, which are no data unless they are named."""
    if pattern.name.startswith("."):
        return list(found)
    return [match for match in found if not is_hidden(Path(match.name))]


def read_extent(path: DataPath, name: str, what: str, extent: tuple[int, int]) -> bytes:
    """A part of a tar.

    Args:
      path: the tar.
      name: of the sample, for messages.
      what: is read of it, likewise.
      extent: its first byte and its size; a negative start where there is none.

    Raises:
      CorruptSampleError: it is not, or not all, there.
      FileNotFoundError: the tar itself is gone.
      BucketError: the bucket that it is in cannot be read.
    """
    offset, size = extent
    if offset < 0:
        raise CorruptSampleError(name, f"missing {what}")
    if isinstance(path, BucketPath):
        content = path.read_range(offset, size)
    else:
        content = _open_tar(path).read(offset, size)
    if len(content) < size:
        detail = f"{what} has {len(content)} of {size} bytes"
        raise CorruptSampleError(name, "truncated tar", detail)
    return content


class IndexedTar:
    """The samples of one tar, through its index; reading as ``read_extent``.

    Args:
      path: the tar.
      index_path: its index, see ``current_indices``.
    """

    def __init__(self, path: DataPath, index_path: Path):
        self.path = path
        self._index_path = index_path
        self._length = len(load_index(index_path))

    def __len__(self) -> int:
        return self._length

    def entry(self, index: int) -> np.void:
        """The record of a sample in the index."""
        entry: np.void = load_index(self._index_path)[index]
        return entry

    def name(self, entry: np.void) -> str:
        """The name of a sample, for messages and results."""
        return f"{self.path}::{os.fsdecode(entry['name'])}"

    def read_part(self, entry: np.void, what: str) -> bytes:
        """A file of a sample, by the field of its extent."""
        offset, size = entry[what].tolist()
        return read_extent(self.path, self.name(entry), what, (offset, size))


class _Handle:
    """An open file for reading at offsets, from any thread."""

    def __init__(self, fd: int):
        self._fd = fd

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes; fewer only at the end of the file."""
        chunks = []
        while size and (chunk := os.pread(self._fd, size, offset)):
            chunks.append(chunk)
            offset, size = offset + len(chunk), size - len(chunk)
        return b"".join(chunks)

    def __del__(self):
        os.close(self._fd)


# One cache of each a process, so that sources hold nothing that cannot be
# pickled. A handle that is dropped from the cache closes once the last thread
# reading from it is done.
@functools.lru_cache(maxsize=_MAX_OPEN_TARS)
def _open_tar(path: Path) -> _Handle:
    return _Handle(os.open(path, os.O_RDONLY))


@functools.cache
def load_index(path: Path) -> np.ndarray:
    """The index, mapped into memory: processes on a machine share it."""
    return np.load(path, mmap_mode="r")


def current_indices(
    paths: Sequence[DataPath], cache_dir: str | Path | None, arrangement: Arrangement
) -> list[Path]:
    """The files of the tars' indices, which are made where they are not there or outdated.

    Args:
      paths: the tars.
      cache_dir: the folder of the indices, on a disk; None is beside each tar, and for tars in
        buckets `sam_jax/tar_indices` in the user's cache (XDG_CACHE_HOME, ~/.cache).
      arrangement: what they hold.

    Raises:
      ConfigError: a file is no uncompressed tar, or an index cannot be kept where it should be.
    """
    in_bucket = any(isinstance(path, BucketPath) for path in paths)
    with ThreadPoolExecutor(_BUCKET_SCAN_THREADS if in_bucket else _SCAN_THREADS) as pool:
        return list(pool.map(lambda tar: _current_index(tar, cache_dir, arrangement), paths))


def _current_index(tar: DataPath, cache_dir: str | Path | None, arrangement: Arrangement) -> Path:
    """The path of the tar's index, which is made if it is not there.

    The tar's size and time of modification, or its version in a bucket, are
    part of its name, so that a changed tar is scanned anew.
    """
    if isinstance(tar, BucketPath):
        beside = _user_cache()
        size, version = tar.info()
        # Versions of buckets have quotes and dashes in them.
        state = f"{size:x}-{hashlib.sha256(version.encode()).hexdigest()[:12]}"
        location = str(tar).encode()
    else:
        tar = tar.absolute()
        beside = tar.parent
        stat = tar.stat()
        state = f"{stat.st_size:x}-{stat.st_mtime_ns:x}"
        location = os.fsencode(tar)
    folder = beside if cache_dir is None else Path(cache_dir)
    # Tars of one name from two folders may share a cache.
    origin = hashlib.sha256(location).hexdigest()[:8]
    # Cut, since the tar's name may have the greatest length already; the digest tells tars apart.
    label = os.fsdecode(os.fsencode(tar.name)[:_MAX_LABEL_BYTES])
    own = f"{label}.{origin}." + (f"{arrangement.label}." if arrangement.label else "")
    path = folder / f"{own}{state}-{arrangement.version}.npy"
    if not path.exists():
        index = scan(tar, arrangement)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            of_this = re.compile(re.escape(own) + r"[0-9a-f]+-[0-9a-f]+-\d+\.npy")
            outdated = [old for old in folder.glob("*.npy") if of_this.fullmatch(old.name)]
            _write_atomically(path, index)
        except OSError as error:
            raise ConfigError(
                f"cannot keep the index of {tar} in {folder}: set cache_dir to a "
                "folder that can be written"
            ) from error
        for old in outdated:
            old.unlink(missing_ok=True)
    return path


def _user_cache() -> Path:
    """The folder for indices of tars that have no folder of their own."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sam_jax" / "tar_indices"


def _write_atomically(path: Path, array: np.ndarray) -> None:
    """Other processes see the whole file or none; any may be the last writer."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            np.save(file, array)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def scan(path: DataPath, arrangement: Arrangement) -> np.ndarray:
    """The index of a tar.

    Args:
      path: an uncompressed tar, complete or cut short.
      arrangement: what the index holds.

    Raises:
      ConfigError: it is no uncompressed tar.
    """
    num_hidden, complete = 0, True

    def members(tar: tarfile.TarFile) -> Iterator[Member]:
        nonlocal num_hidden, complete
        try:
            for member in tar:
                if not member.isreg():
                    continue
                if is_hidden(PurePosixPath(member.name)):
                    num_hidden += 1
                else:
                    yield Member(member.name, member.offset_data, member.size)
        except tarfile.ReadError:
            complete = False

    try:
        with contextlib.ExitStack() as files:
            if isinstance(path, BucketPath):
                file = files.enter_context(path.open())
                tar = files.enter_context(tarfile.open(fileobj=file, mode="r:"))
            else:
                tar = files.enter_context(tarfile.open(path, "r:"))
            index = arrangement.arrange(members(tar))
            # A tar ends with blocks of zeros; tarfile stops at garbage, too.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            complete = complete and tar.fileobj.read(_BLOCK) == bytes(_BLOCK)
    except tarfile.ReadError as error:
        raise ConfigError(f"{path} is not an uncompressed tar: {error}") from error
    if num_hidden:
        _log.warning("%s: %d hidden files left out", path, num_hidden)
    if not complete:
        _log.warning("%s is cut short or damaged: %d images", path, len(index))
    return index


def empty_index(names: Sequence[bytes], extents: Sequence[str]) -> np.ndarray:
    """An index with the names in place: `name`, and (offset, size) in bytes for each extent."""
    width = max(map(len, names), default=1)
    fields = [(field, np.int64, 2) for field in extents]
    index = np.zeros(len(names), [("name", f"S{width}"), *fields])
    index["name"] = names
    return index
