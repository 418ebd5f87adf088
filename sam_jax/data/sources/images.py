"""Images without masks, for pre-training: folders of picture files, or tars of them."""

import functools
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from sam_jax.buckets import DataPath, size_of
from sam_jax.data.samples import Sample, read_picture_file
from sam_jax.data.sources import tars, truth_bytes, visible_files
from sam_jax.data.sources.shards import Shards
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError
from sam_jax.image_channels import hint_of_arrays, image_suffixes
from sam_jax.images import Orientation

_log = logging.getLogger(__name__)


class ImagesSource:
    """Picture files, whatever else lies beside them: samples without a mask.

    Args:
      path: a folder (tree) of pictures, a tar of them, a folder of tars, a glob pattern of any of
        these, or several such.
      cache_dir: where the indices of tars are kept; None is beside each tar.
      name: what `Sample.dataset` says.
      orientation: see `Sample`.
      in_channels: see `Sample`; if there are some, images may be `.npy`, too.

    Raises:
      FileNotFoundError: nothing is there.
      ConfigError: a file is no uncompressed tar, there is no picture in all of it, or an index
        cannot be kept where it should be.
    """

    def __init__(
        self,
        path: str | DataPath | Sequence[str | DataPath],
        cache_dir: str | Path | None = None,
        name: str = "images",
        orientation: Orientation = "upright",
        in_channels: int | None = None,
    ):
        self.name = name
        self.left_out = Tally()
        self._orientation, self._in_channels = orientation, in_channels
        suffixes = image_suffixes(in_channels)
        found, folders = tars.find(path)
        indices = tars.current_indices(found, cache_dir, _arrangement(in_channels))
        shards: list[_Shard] = [
            _TarShard(tar, index) for tar, index in zip(found, indices, strict=True)
        ]
        shards += [_FolderShard(folder, suffixes, self.left_out) for folder in folders]
        self._shards = Shards(shards)
        if not len(self):
            left_out = f" (left out: {self.left_out})" if self.left_out else ""
            raise ConfigError(
                f"no picture in {path}{left_out}; pictures end in {', '.join(suffixes)}"
                + "".join(hint_of_arrays(folder, in_channels) for folder in folders[:1])
            )
        if self.left_out:
            _log.warning("%s: left out: %s", path, self.left_out)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Sample:
        """The picture at 0 <= index < len.

        Raises:
          CorruptSampleError: it is gone, or the tar ends before it does.
        """
        shard, within = self._shards.find(index)
        name, image = shard.read(within)
        return Sample(
            image,
            (),
            self.name,
            name,
            orientation=self._orientation,
            in_channels=self._in_channels,
        )

    def truth(self, index: int) -> bytes:
        """Name and size of the picture's file, as pictures without masks are their own truth.

        Raises:
          OSError: it is gone.
        """
        shard, within = self._shards.find(index)
        return truth_bytes(shard.name_and_size(within))


class _Shard(Protocol):
    def __len__(self) -> int: ...

    def name_and_size(self, index: int) -> tuple[str, int]:
        """Name of a picture file below its folder or tar, and its size in bytes."""
        ...

    def read(self, index: int) -> tuple[str, bytes]:
        """Name and content of a picture file.

        Raises:
          CorruptSampleError: it is not all there.
        """
        ...


class _FolderShard:
    """Picture files in a folder or below it."""

    def __init__(self, folder: DataPath, suffixes: Sequence[str], left_out: Tally):
        self._folder = folder
        found = visible_files(folder, suffixes, left_out)
        # As one array, millions of paths are pickled into workers at once.
        self._names = np.array([file.relative_to(folder).as_posix() for file in found], np.str_)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> tuple[str, bytes]:
        path = self._folder / str(self._names[index])
        return str(path), read_picture_file(path)

    def name_and_size(self, index: int) -> tuple[str, int]:
        name = str(self._names[index])
        return name, size_of(self._folder / name)


class _TarShard(tars.IndexedTar):
    """The picture files of one tar."""

    def read(self, index: int) -> tuple[str, bytes]:
        entry = self.entry(index)
        return self.name(entry), self.read_part(entry, "image")

    def name_and_size(self, index: int) -> tuple[str, int]:
        entry = self.entry(index)
        return os.fsdecode(entry["name"]), int(entry["image"][1])


def _index_of_pictures(suffixes: Sequence[str], members: Iterable[tars.Member]) -> np.ndarray:
    """Positions of the pictures of a tar in order of their names: `name` and `image`."""
    found = sorted(
        member for member in members if PurePosixPath(member.name).suffix.lower() in suffixes
    )
    index = tars.empty_index([os.fsencode(member.name) for member in found], ("image",))
    index["image"] = np.array([member[1:] for member in found], np.int64).reshape(-1, 2)
    return index


def _arrangement(in_channels: int | None) -> tars.Arrangement:
    """The index of a tar's images; one of 8-bit RGB is another file than one of channels."""
    return PICTURES if in_channels is None else _CHANNEL_IMAGES


PICTURES = tars.Arrangement(
    "images", 1, functools.partial(_index_of_pictures, image_suffixes(None))
)
_CHANNEL_IMAGES = tars.Arrangement(
    "channel_images", 1, functools.partial(_index_of_pictures, image_suffixes(1))
)
