"""SA-1B as released: tars of jpg + json pairs, read in place (see `tars`).

Folders that somebody did extract work, too.
"""

import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np

from sam_jax.buckets import DataPath
from sam_jax.data.samples import CorruptSampleError, Sample
from sam_jax.data.sources import tars, truth_bytes, visible_files
from sam_jax.data.sources.shards import Shards
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError
from sam_jax.image_channels import image_suffixes
from sam_jax.images import Orientation

_log = logging.getLogger(__name__)


class AnnotationFile(NamedTuple):
    """The json of a pair, on its own or within a tar.

    Attributes:
      name: of the pair, for messages and results.
      path: the file that holds it.
      extent: its first byte there and its size; None for the whole file, a negative start where
        there is no json.
    """

    name: str
    path: DataPath
    extent: tuple[int, int] | None = None

    def read(self) -> bytes:
        """The contents.

        Raises:
          CorruptSampleError: there is none, or the tar ends before it does.
        """
        if self.extent is not None:
            return tars.read_extent(self.path, self.name, "json", self.extent)
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
        path: str | DataPath | Sequence[str | DataPath],
        cache_dir: str | Path | None = None,
        name: str = "sa1b",
        orientation: Orientation = "upright",
        in_channels: int | None = None,
    ):
        """Finds the pairs; scans tars that have no current index yet.

        Args:
          path: a tar, a folder of tars, a folder (tree) of extracted pairs, a glob pattern of any
            of these, or several such.
          cache_dir: where the indices are kept; None is beside each tar.
          name: what `Sample.dataset` says.
          orientation: see `Sample`.
          in_channels: see `Sample`; if there are some, images may be `.npy`, too.

        Raises:
          FileNotFoundError: nothing is there.
          ConfigError: a file is no uncompressed tar, there is no pair in all of it, two images
            would share an annotation, or an index cannot be kept where it should be.
        """
        self.name = name
        self.left_out = Tally()
        self._orientation, self._in_channels = orientation, in_channels
        suffixes = image_suffixes(in_channels)
        found, folders = tars.find(path)
        index_paths = tars.current_indices(
            found, cache_dir, PAIRS if in_channels is None else _CHANNEL_PAIRS
        )
        shards: list[_Shard] = [
            _TarShard(tar, index) for tar, index in zip(found, index_paths, strict=True)
        ]
        shards += [_FolderShard(folder, suffixes, self.left_out) for folder in folders]
        self._shards = Shards(shards)
        if not len(self):
            left_out = f" (left out: {self.left_out})" if self.left_out else ""
            raise ConfigError(f"no image with annotations in {path}{left_out}")
        if self.left_out:
            _log.warning("%s: left out: %s", path, self.left_out)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Sample:
        """The pair at 0 <= index < len.

        Raises:
          CorruptSampleError: half of the pair is missing, the tar ends before it does, or the json
            is malformed.
        """
        shard, within = self._shards.find(index)
        name, image, annotation = shard.read(within)
        masks_rle, unusable = parse_annotation(name, annotation)
        return Sample(
            image,
            masks_rle,
            self.name,
            name,
            unusable,
            self._orientation,
            in_channels=self._in_channels,
        )

    def annotation_file(self, index: int) -> AnnotationFile:
        """The place of a pair's json, for those who want no image; nothing is read yet."""
        shard, within = self._shards.find(index)
        return shard.annotation_file(within)

    def truth(self, index: int) -> bytes:
        """The pair's name and its json.

        Raises:
          CorruptSampleError: there is no json, or the tar ends before it does.
        """
        file = self.annotation_file(index)
        name = PurePosixPath(file.name.rpartition("::")[2]).name
        # Bytes of a json may be anything; as Latin-1 any are text.
        return truth_bytes([name, file.read().decode("latin-1")])


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

    def __init__(self, folder: DataPath, suffixes: Sequence[str], left_out: Tally):
        self._folder = folder
        pairs: dict[str, list[str]] = {}
        for file in visible_files(folder, (*suffixes, ".json"), left_out):
            path = file.relative_to(folder).as_posix()
            _pair_up(pairs, suffixes, path, path, "", str)
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
    pairs: dict[str, list],
    suffixes: Sequence[str],
    path: str,
    value: Any,
    absent: Any,
    name: Callable[[Any], str],
) -> None:
    """Files an image or json under its path without suffix; ignores others.

    Raises:
      ConfigError: there is another one, with another name.
    """
    suffix = PurePosixPath(path).suffix
    if suffix.lower() not in (*suffixes, ".json"):
        return
    pair = pairs.setdefault(path.removesuffix(suffix), [absent, absent])
    place = int(suffix.lower() == ".json")
    if pair[place] != absent and name(pair[place]) != name(value):
        raise ConfigError(
            f"{name(pair[place])} and {name(value)} would share one annotation; rename one of them"
        )
    pair[place] = value


class _TarShard(tars.IndexedTar):
    """The pairs of one tar."""

    def read(self, index: int) -> tuple[str, bytes, bytes]:
        entry = self.entry(index)
        image = self.read_part(entry, "image")
        return self.name(entry), image, self.read_part(entry, "json")

    def annotation_file(self, index: int) -> AnnotationFile:
        entry = self.entry(index)
        offset, size = entry["json"].tolist()
        return AnnotationFile(self.name(entry), self.path, (offset, size))


def _index_of_pairs(suffixes: Sequence[str], members: Iterable[tars.Member]) -> np.ndarray:
    """Positions of the pairs of a tar, one record a pair, in order of names.

    Returns:
      A structured array [n]: `name` (the image's path, or the json's where the image is missing),
      `image` and `json`, each (offset, size) in bytes, offset -1 where missing.
    """
    pairs: dict[str, list[tars.Member]] = {}
    absent = tars.Member("", -1, 0)
    for member in members:
        _pair_up(pairs, suffixes, member.name, member, absent, lambda value: value.name)
    names = [os.fsencode(pairs[stem][0].name or pairs[stem][1].name) for stem in sorted(pairs)]
    index = tars.empty_index(names, ("image", "json"))
    for field, part in (("image", 0), ("json", 1)):
        extents = [pairs[stem][part][1:] for stem in sorted(pairs)]
        index[field] = np.array(extents, np.int64).reshape(-1, 2)
    return index


# The version is to be raised when other pairs are found than before.
PAIRS = tars.Arrangement("", 2, functools.partial(_index_of_pairs, image_suffixes(None)))
# Of images of channels, whose endings are others.
_CHANNEL_PAIRS = tars.Arrangement(
    "channels", 1, functools.partial(_index_of_pairs, image_suffixes(1))
)
