"""Places to write to: what is wrong with one is said before the work, not after it."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sam_jax.errors import UserError

# Longest file name of all common file systems.
_MAX_NAME_BYTES = 255


class PlaceError(UserError):
    """Something cannot be written where it shall be; the message says where and why."""


def check_file(path: str | Path) -> None:
    """Finds out whether a file can be written; leaves nothing behind.

    Raises:
      PlaceError: if not.
    """
    mode = _mode(Path(path))
    if mode is not None and stat.S_ISDIR(mode):
        raise PlaceError(f"{path} is a folder; name the file to write")
    if mode is None or stat.S_ISREG(mode):
        # Devices, such as /dev/stdout, are written to, and do not appear in their folder.
        _check_parent(Path(path))


def check_folder(path: str | Path) -> None:
    """Finds out whether a folder can be made, or written to; leaves nothing behind.

    Raises:
      PlaceError: if not.
    """
    mode = _mode(Path(path))
    if mode is not None and not stat.S_ISDIR(mode):
        raise PlaceError(f"{path} is a file; name the folder to write to")
    if mode is None:
        _check_parent(Path(path))
    else:
        _check_writable(Path(path), Path(path))


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all: a killed process leaves what was there before.

    Raises:
      OSError: if it cannot be written; the error names it.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    with _naming(path):
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a text file; one that a killed process left half is ended first.

    Raises:
      OSError: if it cannot be written; the error names it.
    """
    with _naming(path), path.open("ab+") as file:
        is_cut_off = False
        if file.seekable() and file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            is_cut_off = file.read(1) != b"\n"
        file.write((b"\n" if is_cut_off else b"") + line.encode() + b"\n")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the file in errors of the system: a full disk does not say where it is."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _mode(path: Path) -> int | None:
    """File mode (``st_mode``) of a path, None if nothing is there."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PlaceError(f"{path} cannot be written: {error.strerror}") from error


def _check_parent(path: Path) -> None:
    """Checks that the nearest folder that is there takes what is missing."""
    # Links are resolved: their target is what will be written.
    missing = path.resolve()
    while not os.path.lexists(missing.parent):
        missing = missing.parent
        _check_name(path, missing.name)
    if not missing.parent.is_dir():
        raise PlaceError(f"{path} cannot be written: {missing.parent} is no folder")
    _check_name(path, missing.name)
    _check_name(path, path.name)
    _check_writable(missing.parent, path)


def _check_name(path: Path, name: str) -> None:
    length = len(os.fsencode(name))
    if length > _MAX_NAME_BYTES:
        raise PlaceError(
            f"{path} cannot be written: the name {name[:20]}... has {length} bytes, and file "
            f"systems take {_MAX_NAME_BYTES}"
        )


def _check_writable(folder: Path, path: Path) -> None:
    try:
        # A file without a name, where the system has them: the folder's times stay as they are.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PlaceError(f"{path} cannot be written: {folder}: {error.strerror}") from error
