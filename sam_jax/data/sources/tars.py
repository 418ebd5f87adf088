"""Tars read in place: an index of each, and reads at known offsets.

A tar has no table of contents, so each is scanned once for its members'
offsets, and the result kept in a small file; from then on a member is a
read at a known offset and nothing is ever extracted.
"""

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

from sam_jax.data.samples import CorruptSampleError
from sam_jax.errors import ConfigError
from sam_jax.files import is_hidden

_log = logging.getLogger(__name__)
_BLOCK = tarfile.BLOCKSIZE
# Scanning waits for storage, not for the processor.
_SCAN_THREADS = 8
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


def find(path: str | Path | Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """The tars and the folders without tars that paths or patterns name, sorted.

    Args:
      path: a tar, a folder of tars, another folder, a pattern of any of these, or several such.

    Raises:
      FileNotFoundError: nothing is there.
    """
    found, folders = set[Path](), set[Path]()
    for part in [path] if isinstance(path, (str, Path)) else path:
        matches = _matches(Path(part))
        if not matches:
            raise FileNotFoundError(f"nothing at {part}")
        for match in matches:
            if not match.is_dir():
                found.add(match)
            elif inside := [tar for tar in match.glob("*.tar") if not is_hidden(Path(tar.name))]:
                found.update(inside)
            else:
                folders.add(match)
    return sorted(found), sorted(folders)


def _matches(pattern: Path) -> list[Path]:
    """Files and folders that a path or a pattern names.

    Folders that are there are taken literally, as their names may hold what patterns are made of;
    where that leads nowhere, the whole is a pattern.
    """
    literal, rest = Path(pattern.anchor), pattern.parts[bool(pattern.anchor) :]
    while rest and (literal / rest[0]).exists():
        literal, rest = literal / rest[0], rest[1:]
    if not rest:
        return [literal]
    found = list(literal.glob("/".join(rest)))
    if not found:
        found = list(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    # A star stands for hidden files as well, which are no data unless they are named.
    if pattern.name.startswith("."):
        return found
    return [match for match in found if not is_hidden(Path(match.name))]


def read_extent(path: Path, name: str, what: str, extent: tuple[int, int]) -> bytes:
    """A part of a tar.

    Args:
      path: the tar.
      name: of the sample, for messages.
      what: is read of it, likewise.
      extent: its first byte and its size; a negative start where there is none.

    Raises:
      CorruptSampleError: it is not, or not all, there.
    """
    offset, size = extent
    if offset < 0:
        raise CorruptSampleError(name, f"missing {what}")
    content = _open_tar(path).read(offset, size)
    if len(content) < size:
        detail = f"{what} has {len(content)} of {size} bytes"
        raise CorruptSampleError(name, "truncated tar", detail)
    return content


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
    paths: Sequence[Path], cache_dir: str | Path | None, arrangement: Arrangement
) -> list[Path]:
    """The files of the tars' indices, which are made where they are not there or outdated.

    Args:
      paths: the tars.
      cache_dir: the folder of the indices; None is beside each tar.
      arrangement: what they hold.

    Raises:
      ConfigError: a file is no uncompressed tar, or an index cannot be kept where it should be.
    """
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        return list(pool.map(lambda tar: _current_index(tar, cache_dir, arrangement), paths))


def _current_index(tar: Path, cache_dir: str | Path | None, arrangement: Arrangement) -> Path:
    """The path of the tar's index, which is made if it is not there.

    The tar's size and time of modification are part of its name, so that a
    changed tar is scanned anew.
    """
    tar = tar.absolute()
    stat = tar.stat()
    folder = tar.parent if cache_dir is None else Path(cache_dir)
    # Tars of one name from two folders may share a cache.
    origin = hashlib.sha256(os.fsencode(tar)).hexdigest()[:8]
    # Cut, since the tar's name may have the greatest length already; the digest tells tars apart.
    label = os.fsdecode(os.fsencode(tar.name)[:_MAX_LABEL_BYTES])
    own = f"{label}.{origin}." + (f"{arrangement.label}." if arrangement.label else "")
    path = folder / f"{own}{stat.st_size:x}-{stat.st_mtime_ns:x}-{arrangement.version}.npy"
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


def _write_atomically(path: Path, array: np.ndarray) -> None:
    """Other processes see the whole file or none; any may be the last writer."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            np.save(file, array)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def scan(path: Path, arrangement: Arrangement) -> np.ndarray:
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
        with tarfile.open(path, "r:") as tar:
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
