"""SA-1B as released: tars of jpg + json pairs, read in place.

A tar has no table of contents, so each is scanned once for its members'
offsets, and the result kept in a small file; from then on a sample is two
reads at known offsets and nothing is ever extracted. Folders that somebody
did extract work, too.
"""

import functools
import hashlib
import json
import logging
import os
import tarfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np

from sam_jax.data.samples import CorruptSampleError, Sample
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError
from sam_jax.files import data_files, is_hidden
from sam_jax.images import PICTURE_SUFFIXES, Orientation

_log = logging.getLogger(__name__)
_HIDDEN = "hidden files"
_BLOCK = tarfile.BLOCKSIZE
# To be raised when the scan finds other pairs than before, so that older indices are made anew.
_INDEX_VERSION = 2
# Scanning waits for storage, not for the processor.
_SCAN_THREADS = 8
_MAX_OPEN_TARS = 128
# Bytes of a tar's name in the name of its index, which has some 45 bytes more.
_MAX_LABEL_BYTES = 200


class AnnotationFile(NamedTuple):
    """The json of a pair, on its own or within a tar.

    Attributes:
      name: of the pair, for messages and results.
      path: the file that holds it.
      extent: its first byte there and its size; None for the whole file, a negative start where
        there is no json.
    """

    name: str
    path: Path
    extent: tuple[int, int] | None = None

    def read(self) -> bytes:
        """The contents.

        Raises:
          CorruptSampleError: there is none, or the tar ends before it does.
        """
        if self.extent is not None:
            return _read_extent(self.path, self.name, "json", self.extent)
        try:
            return self.path.read_bytes()
        except FileNotFoundError as error:
            raise CorruptSampleError(self.name, "missing json") from error


class Sa1bSource:
    """Images and masks in SA-1B's released form.

    Boxes, areas and scores in the annotations are not read: boxes there are
    one pixel short and areas follow from the masks.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        cache_dir: str | Path | None = None,
        name: str = "sa1b",
        orientation: Orientation = "upright",
    ):
        """Finds the pairs; scans tars that have no current index yet.

        Args:
          path: a tar, a folder of tars, a folder (tree) of extracted pairs, a glob pattern of any
            of these, or several such.
          cache_dir: where the indices are kept; None is beside each tar.
          name: what `Sample.dataset` says.
          orientation: see `Sample`.

        Raises:
          FileNotFoundError: nothing is there.
          ConfigError: a file is no uncompressed tar, there is no pair in all of it, two images
            would share an annotation, or an index cannot be kept where it should be.
        """
        self.name = name
        self.left_out = Tally()
        self._orientation = orientation
        parts = [path] if isinstance(path, (str, Path)) else path
        tars, folders = _find(parts)
        with ThreadPoolExecutor(_SCAN_THREADS) as pool:
            index_paths = pool.map(lambda tar: _current_index(tar, cache_dir), tars)
            self._shards: list[_Shard] = [
                _TarShard(tar, index) for tar, index in zip(tars, index_paths, strict=True)
            ]
        self._shards += [_FolderShard(folder, self.left_out) for folder in folders]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        if not len(self):
            left_out = f" (left out: {self.left_out})" if self.left_out else ""
            raise ConfigError(f"no image with annotations in {path}{left_out}")
        if self.left_out:
            _log.warning("%s: left out: %s", path, self.left_out)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        """The pair at 0 <= index < len.

        Raises:
          CorruptSampleError: half of the pair is missing, the tar ends before it does, or the json
            is malformed.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        within = index - int(self._ends[number]) + len(shard)
        name, image, annotation = shard.read(within)
        masks_rle, unusable = parse_annotation(name, annotation)
        return Sample(image, masks_rle, self.name, name, unusable, self._orientation)

    def annotation_file(self, index: int) -> AnnotationFile:
        """The place of a pair's json, for those who want no image; nothing is read yet."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        return shard.annotation_file(index - int(self._ends[number]) + len(shard))


def parse_annotation(
    name: str, content: bytes
) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """The masks in an SA-1B json, and what was wrong with those left out.

    Args:
      name: for the error message.
      content: the json.

    Raises:
      CorruptSampleError: it is not JSON of that form.
    """
    try:
        parsed = json.loads(content)
        annotations = parsed["annotations"]
        if not isinstance(annotations, list):
            raise TypeError(f"annotations is {annotations!r:.80}, not a list")
        if "images" in parsed:
            raise TypeError("it has images, so it is a COCO file of many and not of one")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptSampleError(name, "malformed json", repr(error)) from error
    usable, unusable = [], []
    for number, annotation in enumerate(annotations):
        rle = annotation.get("segmentation") if isinstance(annotation, dict) else annotation
        if isinstance(rle, dict) and isinstance(annotation, dict):
            usable.append(rle)
        else:
            unusable.append(f"annotations[{number}]: segmentation is {rle!r:.80}")
    return tuple(usable), tuple(unusable)


def _find(parts: Iterable[str | Path]) -> tuple[list[Path], list[Path]]:
    """The tars and the extracted folders that `parts` name, sorted."""
    tars, folders = set(), set()
    for part in parts:
        matches = _matches(Path(part))
        if not matches:
            raise FileNotFoundError(f"nothing at {part}")
        for match in matches:
            if not match.is_dir():
                tars.add(match)
            elif inside := [tar for tar in match.glob("*.tar") if not is_hidden(Path(tar.name))]:
                tars.update(inside)
            else:
                folders.add(match)
    return sorted(tars), sorted(folders)


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


class _Shard(Protocol):
    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[str, bytes, bytes]:
        """Name, image file and json file of a pair.

        Raises:
          CorruptSampleError: they are not all there.
        """
        ...

    def annotation_file(self, index: int) -> AnnotationFile:
        """The place of a pair's json."""
        ...


class _FolderShard:
    """Extracted pairs, in `folder` or below it."""

    def __init__(self, folder: Path, left_out: Tally):
        self._folder = folder
        pairs: dict[str, list[str]] = {}
        found, hidden = data_files(folder, (*PICTURE_SUFFIXES, ".json"))
        if hidden:
            left_out.add(_HIDDEN, str(hidden[0]), len(hidden))
        for file in found:
            path = file.relative_to(folder).as_posix()
            _pair_up(pairs, path, path, "", str)
        # Millions of paths: as one array they are pickled into workers at
        # once and take no more room than their characters.
        self._pairs = np.array([pairs[stem] for stem in sorted(pairs)], np.str_).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, index: int) -> tuple[str, bytes, bytes]:
        names = self._pairs[index].tolist()
        present = str(self._folder / (names[0] or names[1]))
        contents = []
        for what, name in zip(("image", "json"), names, strict=True):
            if not name:
                raise CorruptSampleError(present, f"missing {what}")
            try:
                contents.append((self._folder / name).read_bytes())
            except FileNotFoundError as error:
                raise CorruptSampleError(present, f"missing {what}") from error
        return present, contents[0], contents[1]

    def annotation_file(self, index: int) -> AnnotationFile:
        image, json_name = self._pairs[index].tolist()
        name = str(self._folder / (image or json_name))
        extent = None if json_name else (-1, 0)
        return AnnotationFile(name, self._folder / json_name, extent)


def _pair_up(
    pairs: dict[str, list], path: str, value: Any, absent: Any, name: Callable[[Any], str]
) -> None:
    """Files an image or json under its path without suffix; ignores others.

    Raises:
      ConfigError: there is another one, with another name.
    """
    suffix = PurePosixPath(path).suffix
    if suffix.lower() not in (*PICTURE_SUFFIXES, ".json"):
        return
    pair = pairs.setdefault(path.removesuffix(suffix), [absent, absent])
    place = int(suffix.lower() == ".json")
    if pair[place] != absent and name(pair[place]) != name(value):
        raise ConfigError(
            f"{name(pair[place])} and {name(value)} would share one annotation; rename one of them"
        )
    pair[place] = value


class _TarShard:
    """The pairs of one tar, through its index."""

    def __init__(self, path: Path, index_path: Path):
        self._path = path
        self._index_path = index_path
        self._length = len(_load_index(index_path))

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> tuple[str, bytes, bytes]:
        entry = _load_index(self._index_path)[index]
        name = f"{self._path}::{os.fsdecode(entry['name'])}"
        image = self._read(name, "image", entry["image"])
        return name, image, self._read(name, "json", entry["json"])

    def annotation_file(self, index: int) -> AnnotationFile:
        entry = _load_index(self._index_path)[index]
        name = f"{self._path}::{os.fsdecode(entry['name'])}"
        offset, size = entry["json"].tolist()
        return AnnotationFile(name, self._path, (offset, size))

    def _read(self, name: str, what: str, extent: np.ndarray) -> bytes:
        offset, size = extent.tolist()
        return _read_extent(self._path, name, what, (offset, size))


def _read_extent(path: Path, name: str, what: str, extent: tuple[int, int]) -> bytes:
    """A part of a tar.

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
def _load_index(path: Path) -> np.ndarray:
    """The index, mapped into memory: processes on a machine share it."""
    return np.load(path, mmap_mode="r")


def _current_index(tar: Path, cache_dir: str | Path | None) -> Path:
    """The path of the tar's index, which is made if it is not there.

    The tar's size and time of modification are part of its name, so that a
    changed tar is scanned anew.
    """
    tar = tar.absolute()
    stat = tar.stat()
    folder = tar.parent if cache_dir is None else Path(cache_dir)
    # Tars of one name from two folders may share a cache.
    origin = hashlib.sha256(os.fsencode(tar)).hexdigest()[:8]
    state = f"{stat.st_size:x}-{stat.st_mtime_ns:x}-{_INDEX_VERSION}"
    # Cut, since the tar's name may have the greatest length already; the digest tells tars apart.
    label = os.fsdecode(os.fsencode(tar.name)[:_MAX_LABEL_BYTES])
    path = folder / f"{label}.{origin}.{state}.npy"
    if not path.exists():
        index = scan_tar(tar)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own = f"{label}.{origin}."
            outdated = [old for old in folder.glob("*.npy") if old.name.startswith(own)]
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


def scan_tar(path: Path) -> np.ndarray:
    """Positions of the pairs in a tar, one record a pair, in order of names.

    Args:
      path: an uncompressed tar, complete or cut short.

    Returns:
      A structured array [n]: `name` (the image's path, or the json's where the image is missing),
      `image` and `json`, each (offset, size) in bytes, offset -1 where missing.

    Raises:
      ConfigError: it is no uncompressed tar.
    """
    pairs: dict[str, list[tuple[str, int, int]]] = {}
    absent = ("", -1, 0)
    num_hidden = 0
    try:
        with tarfile.open(path, "r:") as tar:
            complete = True
            try:
                for member in tar:
                    if not member.isreg():
                        continue
                    if is_hidden(PurePosixPath(member.name)):
                        num_hidden += 1
                    else:
                        extent = (member.name, member.offset_data, member.size)
                        _pair_up(pairs, member.name, extent, absent, lambda value: value[0])
            except tarfile.ReadError:
                complete = False
            # A tar ends with blocks of zeros; tarfile stops at garbage, too.
            tar.fileobj.seek(tar.offset)
            complete = complete and tar.fileobj.read(_BLOCK) == bytes(_BLOCK)
    except tarfile.ReadError as error:
        raise ConfigError(f"{path} is not an uncompressed tar: {error}") from error
    if num_hidden:
        _log.warning("%s: %d hidden files left out", path, num_hidden)
    if not complete:
        _log.warning("%s is cut short or damaged: %d images", path, len(pairs))
    names = [os.fsencode(pairs[stem][0][0] or pairs[stem][1][0]) for stem in sorted(pairs)]
    width = max(map(len, names), default=1)
    index = np.zeros(
        len(pairs),
        [("name", f"S{width}"), ("image", np.int64, 2), ("json", np.int64, 2)],
    )
    index["name"] = names
    for field, part in (("image", 0), ("json", 1)):
        extents = [pairs[stem][part][1:] for stem in sorted(pairs)]
        index[field] = np.array(extents, np.int64).reshape(-1, 2)
    return index
