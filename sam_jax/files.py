"""The files of a data set's folders: which of them are data, and which one a name means."""

import functools
import os
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Generic, TypeVar, cast

from sam_jax.buckets import BucketPath, DataPath
from sam_jax.errors import ConfigError

# Folders and files that systems and cameras put among data, besides those that start with a dot.
_NO_DATA = frozenset({"__macosx", "@eadir", "$recycle.bin", "thumbs.db", "desktop.ini"})
_SPELLINGS: tuple[Callable[[str], str], ...] = (
    str,
    lambda name: unicodedata.normalize("NFC", name),
    lambda name: unicodedata.normalize("NFC", name).casefold(),
)


def is_hidden(path: PurePath) -> bool:
    """True if a file, by its path below the folder of a data set, is hidden and so no data.

    Hidden are names that start with a dot (`._cat.png`, which macOS puts beside `cat.png`,
    `.ipynb_checkpoints`, `.DS_Store`), what else systems put into folders (`__MACOSX`,
    `Thumbs.db`), and all that is inside of such folders.
    """
    return any(
        (part.startswith(".") and part != "..") or part.casefold() in _NO_DATA
        for part in path.parts
    )


# On a disk or in a bucket: what lies below a path is of its kind.
P = TypeVar("P", bound=DataPath)


def data_files(folder: P, suffixes: Iterable[str]) -> tuple[list[P], list[P]]:
    """The files below a folder with these endings, in lower or upper case; links are followed.

    Args:
      folder: where to look; its own path may hold anything.
      suffixes: in lower case, with their dot.

    Returns:
      those that were found, sorted, and those that would have been, were they not hidden.

    Raises:
      OSError: a folder cannot be read.
      BucketError: nor can a bucket.
    """
    wanted = frozenset(suffixes)
    found: list[P] = []
    hidden: list[P] = []
    below = folder.files_below() if isinstance(folder, BucketPath) else _files_below(folder)
    for path in cast(Iterator[P], below):
        if path.suffix.lower() in wanted:
            (hidden if is_hidden(path.relative_to(folder)) else found).append(path)
    return sorted(found, key=_order), sorted(hidden, key=_order)


def _order(path: DataPath) -> tuple[str, ...]:
    return path.parts


def _files_below(root: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for parent, folders, names in os.walk(root, onerror=fail, followlinks=True):
        # A link may lead back to where it is.
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # Folders before links, so that of a folder and a link to it the folder is always read.
        folders.sort(key=lambda name: (Path(parent, name).is_symlink(), name))
        yield from (Path(parent, name) for name in names)


class NamedFiles(Generic[P]):
    """The files below a folder by the names that an annotation file has for them.

    Such names come from other disks: with backslashes or percent signs for what a URL does not
    hold, accents composed or not, in another case, and with the folders of somebody else. The file
    of exactly that name is taken if there is one. Otherwise one whose name differs in spelling only
    is, then one that lies at the end of the path. Nothing outside of the folder is ever found.
    """

    def __init__(self, folder: P):
        self._folder = folder
        # Caches the listing of each folder that was looked into, by the three spellings of names.
        self._listing = functools.cache(self._list)

    def find(self, name: str) -> P | None:
        """The file that a name means; None if there is none.

        Raises:
          ConfigError: several files differ from the name no more than each other.
        """
        paths = [self._parts(text) for text in _decoded(name)]
        for dropped in range(max(map(len, paths), default=0)):
            for spelling in range(len(_SPELLINGS)):
                for parts in paths:
                    matches = self._matches(self._folder, parts[dropped:], spelling)
                    if len(matches) > 1:
                        raise ConfigError(
                            f"the file name {name!r} may mean {matches[0]} or {matches[1]}: write "
                            "it as the file's name is, or rename one of them"
                        )
                    if matches:
                        return matches[0]
        return None

    def _parts(self, name: str) -> list[str]:
        """The parts of a path below the folder: absolute ones and `..` lose what leads outside."""
        own = [str(self._folder)]
        if isinstance(self._folder, Path):
            own.append(os.path.abspath(self._folder))  # noqa: PTH100
        for folder in own:
            if name.startswith(folder.rstrip("/") + "/") and name.startswith("/"):
                name = name[len(folder.rstrip("/")) :]
        parts: list[str] = []
        for part in name.split("/"):
            if part == "..":
                del parts[-1:]
            elif part not in ("", "."):
                parts.append(part)
        return parts

    def _matches(self, parent: P, parts: list[str], spelling: int) -> list[P]:
        if not parts:
            return []
        names = self._listing(parent)[spelling].get(_SPELLINGS[spelling](parts[0]), [])
        if len(parts) == 1:
            return [cast(P, parent / name) for name in names]
        inside = [self._matches(cast(P, parent / name), parts[1:], spelling) for name in names]
        return [path for paths in inside for path in paths]

    def _list(self, folder: DataPath) -> list[dict[str, list[str]]]:
        try:
            names = sorted(path.name for path in folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            names = []
        listing: list[dict[str, list[str]]] = [{} for _ in _SPELLINGS]
        for name in names:
            for by_name, spell in zip(listing, _SPELLINGS, strict=True):
                by_name.setdefault(spell(name), []).append(name)
        return listing


def _decoded(name: str) -> list[str]:
    """A name as it stands and with backslashes and percent signs read, without repetitions."""
    slashed = name.replace("\\", "/")
    texts = (name, slashed, urllib.parse.unquote(name), urllib.parse.unquote(slashed))
    return list(dict.fromkeys(texts))
