"""Objects in buckets (``s3://``, ``gs://``), over connections that fail: read, written, removed.

A path of a bucket has the part of pathlib's interface that data sources use, so that a source reads
the same way from a disk and from a bucket. fsspec, and what it needs for the kind of bucket, is
imported with the first path that is one.
"""

import contextlib
import errno
import functools
import io
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple

from sam_jax.errors import UserError

_log = logging.getLogger(__name__)

# The extra of this package that each kind of bucket needs.
_EXTRAS = {"s3": "s3", "gs": "gs"}
# Kinds that fsspec knows as well, of what is no bucket, or takes nothing.
_NO_BUCKETS = ("file", "local", "http", "https")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# A PurePosixPath has one slash where a URL has two.
_SCHEME_PART = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):/(?!/)")

# Waits between attempts: 0.25 s, doubled each time, by random parts of it, as workers that fail
# together should not come back together. About 30 s in all, which is what a bucket takes to move
# its load, or a switch to come back.
_ATTEMPTS = 8
_FIRST_WAIT_SECONDS = 0.25
# Of one request, however slowly its bytes come.
_REQUEST_SECONDS = 60
# Of a whole file that is written there are more, as if no slower than this.
_SLOWEST_UPLOAD_BYTES_PER_SECOND = 1 << 20
# What a file that is copied from a bucket is read by, each piece in a request.
_PIECE_BYTES = 32 * 1024 * 1024
# Requests of fsspec's that change something.
_CHANGES = ("pipe_file", "put_file", "rm_file")
# The way on where the error ends the program, and that is the end of its message.
ONCE_IT_ANSWERS = ". The same command continues once the bucket answers"
# More than a process has threads that read.
_MAX_CONNECTIONS = 128
# What a scan reads at once: the header of a member, and what is small beside it.
_SCAN_BYTES = 256 * 1024
# Names of what tells one version of an object from another, of S3 and of Google.
_VERSIONS = ("ETag", "etag", "generation", "LastModified", "mtime", "created")


class BucketError(UserError):
    """A bucket that cannot be used; the message says which object, why, and what to do."""


class UnreachableBucketError(BucketError):
    """A bucket that did not answer, however often it was asked; it may be later."""

    # EX_TEMPFAIL: a scheduler may start the same command again.
    exit_code = 75


class ObjectInfo(NamedTuple):
    """Size of an object in bytes, and a version, which changes whenever the object does."""

    size: int
    version: str


class BucketPath(PurePosixPath):
    """The URL of an object, or of all whose names begin with it and a slash.

    Raises, in every method that asks the bucket:
      BucketError: access is denied, or nothing here reads such URLs.
      UnreachableBucketError: no answer after some attempts.
    """

    __slots__ = ()

    def __str__(self) -> str:
        return _SCHEME_PART.sub(r"\1://", super().__str__())

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is no path of this computer's")

    def read_bytes(self) -> bytes:
        """The whole object.

        Raises:
          FileNotFoundError: it is not there.
        """
        return self._ask("cat_file")

    def read_range(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset`` on; fewer only at the end of the object.

        Raises:
          FileNotFoundError: it is not there.
        """
        if size <= 0:
            return b""

        def whole(content: bytes) -> None:
            # A connection that ends early may look like the end of the object.
            if len(content) < size and offset + len(content) < self.info().size:
                raise ConnectionError(f"{len(content)} of {size} bytes came")

        try:
            return self._ask("cat_file", start=offset, end=offset + size, check=whole)
        except OSError as error:
            # Ranges that begin behind the end are refused, by each kind of bucket in its own way.
            if error.errno == errno.EINVAL and offset >= self.info().size:
                return b""
            raise

    def info(self) -> ObjectInfo:
        """Size and version.

        Raises:
          FileNotFoundError: it is not there.
        """
        found = self._ask("info")
        version = next((str(found[key]) for key in _VERSIONS if found.get(key)), "")
        return ObjectInfo(int(found["size"]), version)

    def is_dir(self) -> bool:
        """True if there are objects below this name."""
        return self._kind() == "directory"

    def is_file(self) -> bool:
        """True if this is the name of an object."""
        return self._kind() == "file"

    def exists(self) -> bool:
        """True if either is so."""
        return self._kind() is not None

    def iterdir(self) -> Iterator["BucketPath"]:
        """Objects and folders right below.

        Raises:
          FileNotFoundError: there are none.
        """
        yield from self._paths(self._ask("ls", detail=False))

    def files_below(self) -> Iterator["BucketPath"]:
        """All objects below, in order of their names."""
        yield from self._paths(self._ask("find"))

    def sizes_below(self) -> dict[str, int]:
        """Sizes of all objects below in bytes, by their names from here on."""
        found = self._ask("find", detail=True)
        return {
            path.relative_to(self).as_posix(): int(found[name]["size"])
            for name in found
            for path in self._paths([name])
        }

    def write_bytes(self, content: bytes) -> None:
        """Makes the object anew, of this content.

        Raises:
          FileNotFoundError: there is no such bucket.
        """
        self._ask("pipe_file", str(self), content)

    def upload(self, path: Path) -> None:
        """Makes the object anew, of a file's content; large ones in parts, and yet whole or not.

        Raises:
          FileNotFoundError: there is no such file, or no such bucket.
        """
        seconds = _REQUEST_SECONDS + path.stat().st_size / _SLOWEST_UPLOAD_BYTES_PER_SECOND
        try:
            self._ask("put_file", str(path), str(self), seconds=seconds)
        except FileNotFoundError:
            # It may have been removed meanwhile, and then it is the file's name that helps.
            path.stat()
            raise

    def download(self, path: Path, size: int) -> None:
        """Writes the first ``size`` bytes of the object to a file.

        Raises:
          FileNotFoundError: it is not there.
          OSError: the file cannot be written.
        """
        with path.open("wb") as file:
            for offset in range(0, size, _PIECE_BYTES):
                file.write(self.read_range(offset, min(_PIECE_BYTES, size - offset)))

    def remove(self) -> None:
        """Removes the object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._ask("rm_file")

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Objects and folders below whose names fit the pattern."""
        yield from (self / pattern).matches()

    def matches(self) -> Iterator["BucketPath"]:
        """Objects and folders whose names fit this one as a pattern."""
        yield from self._paths(self._ask("glob"))

    def open(self) -> io.BufferedReader:
        """The object as a file in which one may seek, read some 256 KiB at a time."""
        return io.BufferedReader(_RangedFile(self), _SCAN_BYTES)

    def _kind(self) -> str | None:
        try:
            return self._ask("info")["type"]
        except FileNotFoundError:
            return None

    def _paths(self, names: list[str]) -> list["BucketPath"]:
        scheme = self.parts[0]
        # Consoles mark empty folders by objects whose names end in a slash.
        return [
            BucketPath(f"{scheme}//{name}")
            for name in names
            if not name.endswith("/") and f"{scheme}//{name}" != str(self)
        ]

    def _ask(
        self,
        request: str,
        *arguments: Any,
        check: Callable[[Any], None] = lambda answer: None,
        seconds: float | None = None,
        **options: Any,
    ) -> Any:
        """The answer to a request of fsspec's, which is repeated while the connection fails.

        Args:
          request: name of fsspec's method.
          *arguments: of it; none for the path alone.
          check: raises what stands for a failed connection if the answer is not whole.
          seconds: of an attempt, `_REQUEST_SECONDS` if None.
          **options: of the method, by name.
        """
        name = str(self)
        done = "written" if request in _CHANGES else "read"
        seconds = seconds or _REQUEST_SECONDS
        files = _filesystem(self.parts[0].removesuffix(":"))
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                answer = _answer(files, request, arguments or (name,), options, seconds)
                check(answer)
                return answer
            except Exception as error:
                _raise_if_final(error, name, done)
                if attempt == _ATTEMPTS:
                    raise UnreachableBucketError(
                        f"{name} could not be {done}, tried {_ATTEMPTS} times: {_said(error)}"
                        f"{ONCE_IT_ANSWERS}"
                    ) from error
                wait = _FIRST_WAIT_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1)
                level = logging.WARNING if attempt > 2 else logging.INFO
                _log.log(level, "%s: attempt %d of %d: %s", name, attempt, _ATTEMPTS, _said(error))
                time.sleep(wait)
        raise AssertionError("every attempt returns or raises")


DataPath = Path | BucketPath


def data_path(path: str | PurePath) -> DataPath:
    """The path of data on a disk, or in a bucket where it is a URL.

    Raises:
      BucketError: it is a URL of another kind.
    """
    if isinstance(path, (Path, BucketPath)):
        return path
    scheme = _URL.match(str(path))
    if scheme is None:
        return Path(path)
    if scheme[1] not in _EXTRAS:
        raise BucketError(
            f"{path} is a URL of a kind that is not read; expected a path, "
            + " or ".join(f"{known}://BUCKET/NAME" for known in _EXTRAS)
        )
    return BucketPath(path)


def writable_path(url: str) -> BucketPath:
    """The path of a folder in a bucket of any kind that fsspec knows, which may be written to.

    Raises:
      BucketError: it is no such URL, or the packages for it are not installed.
    """
    scheme = _URL.match(url)
    if scheme is None or scheme[1] in _NO_BUCKETS or not url.removeprefix(scheme[0]).strip("/"):
        raise BucketError(f"{url!r} is no URL of a bucket's folder, as s3://BUCKET/NAME")
    _filesystem(scheme[1])
    return BucketPath(url)


def size_of(path: DataPath) -> int:
    """Size of a file in bytes.

    Raises:
      OSError: it is not there.
      BucketError: its bucket cannot be read.
    """
    return path.info().size if isinstance(path, BucketPath) else path.stat().st_size


def is_url(path: object) -> bool:
    """True for the URL of a bucket, as text or as a path."""
    return isinstance(path, BucketPath) or (isinstance(path, str) and bool(_URL.match(path)))


@functools.cache
def _filesystem(scheme: str) -> Any:
    """The file system of a kind of bucket, one in a process: it has the connections.

    Access is as usual for that kind: environment variables, files and roles of a cloud.
    """
    try:
        import fsspec

        if scheme == "s3":
            import s3fs

            files = s3fs.S3FileSystem(
                skip_instance_cache=True,
                use_listings_cache=False,
                # Attempts are counted in one place.
                config_kwargs={
                    "retries": {"total_max_attempts": 1},
                    "max_pool_connections": _MAX_CONNECTIONS,
                },
            )
            files.retries = 1
            return files
        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        # What fsspec says of other kinds names their package.
        remedy = f": pip install 'sam-jax[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else ""
        raise BucketError(
            f"{scheme}:// needs packages that are not installed ({error}){remedy}"
        ) from error
    except ValueError as error:
        raise BucketError(f"{scheme}:// is no kind of bucket that fsspec knows: {error}") from error


def disconnect() -> None:
    """Forgets all connections: the next request makes them anew, as settings are by then."""
    _filesystem.cache_clear()


# They do not survive a fork.
os.register_at_fork(after_in_child=disconnect)


def _answer(
    files: Any, request: str, arguments: tuple[Any, ...], options: dict[str, Any], seconds: float
) -> Any:
    if not files.async_impl:
        return getattr(files, request)(*arguments, **options)
    from fsspec.asyn import sync

    return sync(files.loop, getattr(files, f"_{request}"), *arguments, timeout=seconds, **options)


def _raise_if_final(error: Exception, name: str, done: str) -> None:
    """Raises errors that another attempt would not mend."""
    if isinstance(error, FileNotFoundError):
        raise FileNotFoundError(
            f"{name} is not there: no such object, or nobody may list the bucket"
        ) from error
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        raise BucketError(
            f"{name} may not be {done}: {_said(error)}. Access comes from the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE; "
            "GOOGLE_APPLICATION_CREDENTIALS), or from the role of the machine"
        ) from error
    if type(error).__name__ == "ParamValidationError":
        reason = " ".join(str(error).split())[:300]
        raise BucketError(f"{name} cannot be the name of an object: {reason}") from error
    if isinstance(error, (UserError, TypeError, NotImplementedError)):
        raise error
    if isinstance(error, OSError) and error.errno == errno.EINVAL:
        raise error


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


class _RangedFile(io.RawIOBase):
    """An object as a file without a buffer: each read is a request."""

    def __init__(self, path: BucketPath):
        super().__init__()
        self._path = path
        self._size = path.info().size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), max(self._size - self._position, 0))
        content = self._path.read_range(self._position, size)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
