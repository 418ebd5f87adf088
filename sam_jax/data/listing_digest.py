"""A digest of a data set's files by name and size, which tells changed data from those before."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import NamedTuple

from sam_jax.buckets import DataPath, data_path, size_of
from sam_jax.data.config import SourceConfig
from sam_jax.data.sources import tars
from sam_jax.errors import UserError
from sam_jax.files import is_hidden

# A run shall not wait for millions of files, and what changes a data set changes many.
MOST_FILES = 20_000
# Asking for a size waits for storage, not for the processor.
_THREADS = 32
_DIGEST_BYTES = 8
# Kinds that read tars, and keep indices of their own beside them.
_OF_TARS = ("sa1b", "images")


class ListingDigest(NamedTuple):
    """The files of a source.

    Attributes:
      num_files: how many the digest is of, at most ``MOST_FILES``.
      num_bytes: their size together.
      digest: of their names and sizes.
    """

    num_files: int
    num_bytes: int
    digest: str


def listing_digest(config: SourceConfig) -> ListingDigest | None:
    """The digest of the files that a source is read from; None if it is read from none.

    Contents are not read, so that files of the same name and size are the same. Files are taken in
    the order of their names, the first ``MOST_FILES`` of all. Folders in buckets, which can only be
    listed as a whole, have none.
    """
    files = list(itertools.islice(_files(config), MOST_FILES))
    if not files:
        return None
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(_size, (path for _, path in files)))
    lines = "".join(f"{name}\t{size}\n" for (name, _), size in zip(files, sizes, strict=True))
    content = lines.encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()
    return ListingDigest(len(files), sum(max(size, 0) for size in sizes), digest)


def _files(config: SourceConfig) -> Iterator[tuple[str, DataPath]]:
    """Files of a source, with names that do not depend on where it lies."""
    for part in config.parts or ():
        yield from _files(part)
    for root in _roots(config):
        if isinstance(root, Path) and root.is_dir():
            yield from ((path.relative_to(root).as_posix(), path) for path in _files_below(root))
        elif isinstance(root, Path) or root.is_file():
            yield root.name, root


def _roots(config: SourceConfig) -> list[DataPath]:
    """Files and folders that a source names."""
    if config.path is None:
        return []
    if config.kind in _OF_TARS:
        try:
            return [*itertools.chain(*tars.find(config.path))]
        except FileNotFoundError:
            return []
    # For folders of images these two are names of files inside of them.
    others = () if config.kind == "image_folders" else (config.images, config.masks)
    return [data_path(text) for text in (config.path, *others) if text is not None]


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names) if not is_hidden(PurePath(name)))


def _size(path: DataPath) -> int:
    try:
        return size_of(path)
    except (OSError, UserError):
        return -1  # whoever reads it says what is wrong
