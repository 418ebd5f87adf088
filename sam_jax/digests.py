"""Digests of a folder's files, by which damage is noticed that reading them would not."""

import concurrent.futures
import json
import os
import zlib
from pathlib import Path
from typing import NamedTuple

NAME = "digests.json"
_PIECE_BYTES = 1 << 22
_THREADS = 8


class Digest(NamedTuple):
    """A file's size in bytes, and the CRC-32 of its content.

    Storage that fails is what it guards against, and no malice. A CRC is read as fast as a disk is.
    """

    size: int
    crc32: int


def write_digests(folder: Path) -> None:
    """Writes into a folder the digests of all that is in its folders.

    Raises:
      OSError: if a file cannot be read, or the digests cannot be written.
    """
    text = digests_text(folder)
    with (folder / NAME).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def digests_text(folder: Path) -> str:
    """The digests of all that is in a folder's folders, as a file holds them.

    Files directly in it have none: who makes such a folder may go on to write there.

    Raises:
      OSError: if a file cannot be read.
    """
    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as executor:
        digests = executor.map(digest_of, files)
        found = {
            path.relative_to(folder).as_posix(): digest
            for path, digest in zip(files, digests, strict=True)
        }
    return json.dumps(found, indent=0)


def find_damage(folder: Path, part: str = "") -> str | None:
    """The first difference of a folder from its digests; None without any, or without digests.

    Args:
      folder: that ``write_digests`` wrote to.
      part: a folder in it, if only that one is of interest.
    """
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{NAME}: {error.strerror}"
    try:
        expected = {name: Digest(*digest) for name, digest in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        return f"{NAME} is no list of digests"
    names = sorted(name for name in expected if not part or name.startswith(f"{part}/"))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as executor:
        faults = executor.map(lambda name: _fault(folder / name, expected[name]), names)
        return next(
            (f"{name} {fault}" for name, fault in zip(names, faults, strict=True) if fault), None
        )


def digest_of(path: Path) -> Digest:
    """The digest of a file.

    Raises:
      OSError: if it cannot be read.
    """
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
    return Digest(size, crc)


def _fault(path: Path, expected: Digest) -> str | None:
    try:
        found = digest_of(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if found.size != expected.size:
        return f"has {found.size:,} bytes, expected {expected.size:,}"
    return None if found.crc32 == expected.crc32 else "has other bytes than were written"
