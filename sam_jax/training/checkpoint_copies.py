"""Copies of a run's folder in a bucket, made after each checkpoint, and the way back from there.

What is in the bucket can be continued from whatever moment the copying was cut short at: files of
the run come first, then the best model, then the checkpoint, and the digests last of all of it. A
checkpoint without digests is not whole, and is neither copied back nor counted.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import jax

from sam_jax import digests
from sam_jax.buckets import ONCE_IT_ANSWERS, BucketPath, writable_path
from sam_jax.checkpoint import CHECKPOINTS, DAMAGED, CheckpointConfig
from sam_jax.errors import UserError, exit_code_of
from sam_jax.hosts import gathered, is_first
from sam_jax.training.best import BEST, EVALUATIONS
from sam_jax.training.manifest import STARTS

_BEST_CHECKPOINTS = f"{BEST}/{CHECKPOINTS}"
# Where a checkpoint lies while it is copied back, which is none before it is whole.
_UNFINISHED = ".copied_back.unfinished"
# Written and removed to find out whether that may be done.
_PROBE = ".write_check"
_THREADS = 8
# Between looks whether the checkpoint that is being saved is there, or the first process is done.
_LOOK_SECONDS = 0.2
_EXCHANGE_SECONDS = 2.0
# A wait that is longer is said.
_SILENT_SECONDS = 1.0


class CopyError(UserError):
    """A run's folder cannot be copied back, or not to where it shall be."""


class _Stamp(NamedTuple):
    """Size and time of a file, one of which changes with it."""

    size: int
    mtime_ns: int


class RunCopy:
    """A run's folder, and the same in a bucket; in the foreground, and by one thread at a time.

    Args:
      workdir: the folder.
      url: of its copy.
      config: which checkpoints are kept, there as here.
    """

    def __init__(self, workdir: Path, url: BucketPath, config: CheckpointConfig):
        self._workdir, self._url, self._config = workdir, url, config
        # By names from the folder on, which are those from the URL on.
        self._uploaded: dict[str, _Stamp] = {}
        self._whole: dict[str, dict[str, _Stamp]] = {}

    def check(self) -> None:
        """Finds out whether the bucket can be written to; leaves nothing behind.

        Raises:
          CopyError: there is no such bucket.
          BucketError: access is denied, or it does not answer.
        """
        probe = self._url / _PROBE
        try:
            probe.write_bytes(b"")
        except FileNotFoundError as error:
            raise CopyError(
                f"checkpoint.copy_to = {str(self._url)!r}: there is no such bucket; make it, or "
                "name another"
            ) from error
        probe.remove()

    def copy(self) -> int | None:
        """Copies what is new or changed, and removes checkpoints that are kept no longer.

        Returns:
          the newest checkpoint, None without any; it is whole there.

        Raises:
          CopyError: the newest checkpoint is damaged, or was removed meanwhile.
          BucketError, OSError: something cannot be copied.
        """
        there = self._url.sizes_below()
        files = {name: stamp for name, stamp in _files(self._workdir).items() if _is_kept(name)}
        # It names the best model, which must be there by then.
        last = {name: files.pop(name) for name in (EVALUATIONS,) if name in files}
        self._upload(files, there)
        best, steps = self._steps_here(_BEST_CHECKPOINTS), self._steps_here(CHECKPOINTS)
        for step in best:
            self._copy_step(f"{_BEST_CHECKPOINTS}/{step}", there)
        self._upload(last, there)
        faults = {step: self._copy_step(f"{CHECKPOINTS}/{step}", there) for step in steps}
        whole = [step for step in steps if faults[step] is None]
        if best:
            others = _steps_among(there, _BEST_CHECKPOINTS) - {*best}
            self._remove([f"{_BEST_CHECKPOINTS}/{step}" for step in others], there)
        if whole:
            self._remove([f"{CHECKPOINTS}/{step}" for step in self._dropped(whole, there)], there)
        if steps and (fault := faults[steps[0]]):
            raise CopyError(self._said_of(steps[0], fault))
        return steps[0] if steps else None

    def _said_of(self, step: int, fault: str) -> str:
        """Reason why a checkpoint that was the newest could not be copied."""
        if self._steps_here(CHECKPOINTS)[:1] == [step]:
            return f"the checkpoint of step {step} in {self._workdir} is damaged: {fault}"
        return (
            f"the checkpoint of step {step} was removed before it was copied, as newer ones came "
            "meanwhile: a larger checkpoint.every_steps or checkpoint.keep leaves more time"
        )

    def _steps_here(self, folder: str) -> list[int]:
        """Steps of the checkpoints in the run's own folder, the newest first."""
        try:
            found = [path.name for path in (self._workdir / folder).iterdir() if path.is_dir()]
        except FileNotFoundError:
            return []
        return sorted((int(name) for name in found if name.isdecimal()), reverse=True)

    def _dropped(self, here: list[int], there: Mapping[str, int]) -> list[int]:
        """Steps in the bucket that are kept no longer, where these were copied from the folder.

        A folder that was copied back has one checkpoint, which says nothing of the others. Nor is
        it said who made newer ones.
        """
        whole = {*_whole_among(there, CHECKPOINTS), *here}
        kept = {*sorted(whole, reverse=True)[: self._config.keep], *here}
        if self._config.keep_period is not None:
            kept |= {step for step in whole if step % self._config.keep_period == 0}
        return [s for s in _steps_among(there, CHECKPOINTS) if s < here[0] and s not in kept]

    def _copy_step(self, name: str, there: Mapping[str, int]) -> str | None:
        """Copies a checkpoint; gives what is wrong if it cannot be read, or is being removed."""
        folder, listed = self._workdir / name, f"{name}/{digests.NAME}"
        try:
            files = {f"{name}/{file}": stamp for file, stamp in _files(folder).items()}
            if self._whole.get(name) == files and listed in there:
                return None
            # A best model has none of its own.
            if listed in files:
                content = (folder / digests.NAME).read_bytes()
            else:
                content = digests.digests_text(folder).encode()
            if listed not in there or (self._url / listed).read_bytes() != content:
                if fault := digests.find_damage(folder):
                    return fault
                # From here on, and until they are there again, it is not whole.
                (self._url / listed).remove()
                self._upload({n: stamp for n, stamp in files.items() if n != listed}, there)
                # Of another checkpoint of this step.
                of_other = [n for n in there if n.startswith(f"{name}/") and n not in files]
                _in_parallel(lambda n: (self._url / n).remove(), of_other)
                (self._url / listed).write_bytes(content)
        except FileNotFoundError as error:
            if error.filename is None:
                raise  # Of the bucket.
            return f"{error.filename} was removed while it was being copied"
        self._whole[name] = files
        return None

    def _upload(self, files: Mapping[str, _Stamp], there: Mapping[str, int]) -> None:
        def upload(name: str) -> None:
            (self._url / name).upload(self._workdir / name)
            self._uploaded[name] = files[name]

        _in_parallel(
            upload,
            [n for n, stamp in files.items() if self._uploaded.get(n) != stamp or n not in there],
        )

    def _remove(self, folders: Iterable[str], there: Mapping[str, int]) -> None:
        """Removes checkpoints, the digests first, without which they are not whole."""
        for folder in folders:
            (self._url / folder / digests.NAME).remove()
            names = [name for name in there if name.startswith(f"{folder}/")]
            _in_parallel(lambda name: (self._url / name).remove(), names)
            self._whole.pop(folder, None)

    def bring_back(self, say: Callable[[str], None]) -> None:
        """Copies the run back if the folder has no checkpoint and the bucket a whole one.

        A process that is killed meanwhile leaves a folder without a checkpoint.

        Raises:
          CopyError: there is none but damaged ones, or the bucket holds another run.
          BucketError, OSError: something cannot be copied.
        """
        there = self._url.sizes_below()
        whole = sorted(_whole_among(there, CHECKPOINTS), reverse=True)
        if here := self._steps_here(CHECKPOINTS):
            if whole:
                self._check_same_run(there)
            newer = (
                f"; {self._url} has a newer checkpoint, of step {whole[0]}, from which another "
                "--workdir, without checkpoints, would continue"
                if whole and whole[0] > here[0]
                else ""
            )
            say(f"{self._workdir} has checkpoints and is used as it is, not its copy{newer}")
            return
        if not whole:
            say(f"{self._url} has no whole checkpoint to copy back")
            return
        start = time.monotonic()
        step = self._bring_back_checkpoint(whole, there, say)
        others = [name for name in there if _is_kept(name)]
        best = sorted(_whole_among(there, _BEST_CHECKPOINTS))[-1:]
        _in_parallel(lambda name: self._download(name, self._workdir / name, there), others)
        for name in others:
            self._uploaded[name] = _stamp(self._workdir / name)
        for best_step in best:
            name = f"{_BEST_CHECKPOINTS}/{best_step}"
            if fault := self._download_step(name, self._workdir / _UNFINISHED / BEST, there):
                say(f"the best model of step {best_step} in {self._url} is left: {fault}")
            else:
                self._take(self._workdir / _UNFINISHED / BEST, name)
        # The last of all: with it the folder is one to continue from.
        self._take(self._workdir / _UNFINISHED / CHECKPOINTS, f"{CHECKPOINTS}/{step}")
        shutil.rmtree(self._workdir / _UNFINISHED)
        say(
            f"the run and its checkpoint of step {step} were copied back from {self._url} to "
            f"{self._workdir} in {time.monotonic() - start:.0f} s"
        )

    def _check_same_run(self, there: Mapping[str, int]) -> None:
        """Refuses a bucket's folder of another run, which copies would take the place of."""
        path = self._workdir / STARTS
        if STARTS not in there or not path.exists():
            return
        first_here, first_there = (
            content.partition(b"\n")[0]
            for content in (path.read_bytes(), (self._url / STARTS).read_bytes())
        )
        if first_here != first_there:
            raise CopyError(
                f"checkpoint.copy_to = {str(self._url)!r} holds another run than {self._workdir}: "
                f"their {STARTS} begin with other lines. Give another URL; or another --workdir, "
                "to continue the run of the bucket"
            )

    def _bring_back_checkpoint(
        self, whole: list[int], there: Mapping[str, int], say: Callable[[str], None]
    ) -> int:
        """Copies the newest checkpoint that is undamaged back to where none is looked for."""
        for step in whole:
            say(f"copying the checkpoint of step {step} back from {self._url}")
            target = self._workdir / _UNFINISHED / CHECKPOINTS
            fault = self._download_step(f"{CHECKPOINTS}/{step}", target, there)
            if fault is None:
                return step
            say(f"the checkpoint of step {step} in {self._url} is damaged: {fault}")
        raise CopyError(
            f"no checkpoint in {self._url} can be read. Give another checkpoint.copy_to to start "
            "anew, or mend that one"
        )

    def _download_step(self, name: str, target: Path, there: Mapping[str, int]) -> str | None:
        """Copies a checkpoint back to another place, and says what is wrong with it there."""
        shutil.rmtree(target, ignore_errors=True)
        files = [file for file in there if file.startswith(f"{name}/")]
        _in_parallel(
            lambda file: self._download(file, target / file.removeprefix(f"{name}/"), there), files
        )
        return digests.find_damage(target)

    def _download(self, name: str, path: Path, there: Mapping[str, int]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        (self._url / name).download(path, there[name])

    def _take(self, unfinished: Path, name: str) -> None:
        """Gives a checkpoint that was copied back its place."""
        folder = self._workdir / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(folder)
        self._whole[name] = {f"{name}/{file}": stamp for file, stamp in _files(folder).items()}


class CheckpointCopies:
    """Copies a run's folder in the background of the first process, as ``copy_to`` says.

    Without ``copy_to`` all methods do nothing.

    Args:
      workdir: of the run.
      config: ``copy_to``, ``copy_seconds``, and which checkpoints are kept.
      say: tells the user something.

    Raises:
      BucketError: if ``copy_to`` is no URL that can be written to with what is installed.
    """

    def __init__(self, workdir: str | Path, config: CheckpointConfig, say: Callable[[str], None]):
        self._workdir, self._seconds, self._say = Path(workdir), config.copy_seconds, say
        self._url = None if config.copy_to is None else writable_path(config.copy_to)
        self._copy = None if self._url is None else RunCopy(self._workdir, self._url, config)
        self._changed = threading.Condition()
        # Of the passes through the folder.
        self._num_requested = self._num_done = 0
        # That is being saved.
        self._step: int | None = None
        self._newest_there: int | None = None
        # The last that was said to be there: the first one after a start or a fault, and the last.
        self._said_step: int | None = None
        self._is_last = False

    def bring_back(self) -> None:
        """Copies the run back where that is due; all processes must call, and wait for the first.

        Raises:
          CopyError, BucketError, OSError: see ``RunCopy.check`` and ``RunCopy.bring_back``.
        """
        copy = self._copy
        if copy is None:
            return

        def bring_back() -> None:
            copy.check()
            copy.bring_back(self._say)

        _first_does(bring_back)

    def request(self, step: int) -> None:
        """Has the folder copied once the checkpoint of a step is there."""
        if self._copy is None or not is_first():
            return
        with self._changed:
            if self._num_requested == 0:
                threading.Thread(target=self._work, name="copies", daemon=True).start()
            self._step = step
            self._num_requested += 1
            self._changed.notify_all()

    def wait(self) -> None:
        """Waits until the folder is copied as it is now, ``copy_seconds`` at most; any thread may.

        Nothing is left to come: a run is at its end that waits.
        """
        if self._step is None:
            return
        start = time.monotonic()
        self._is_last = True
        self.request(self._step)
        with self._changed:
            number = self._num_requested
            if self._changed.wait_for(lambda: self._num_done >= number, _SILENT_SECONDS):
                return
        self._say(
            f"waiting for the last copy to {self._url}, up to {self._seconds:.0f} s "
            "(checkpoint.copy_seconds)"
        )
        with self._changed:
            rest = max(self._seconds - (time.monotonic() - start), 0)
            if self._changed.wait_for(lambda: self._num_done >= number, rest):
                return
        self._say(
            f"the last copy to {self._url} was not finished in {self._seconds:.0f} s: "
            f"{self._what_is_there()}. {self._way_on()}"
        )

    def close(self) -> None:
        """Waits as ``wait`` does, in all processes: JAX gives one that is late up as lost."""
        if self._copy is not None:
            _first_does(self.wait)

    def _work(self) -> None:
        """Makes the copies that are requested; the process does not wait for this thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._num_requested > self._num_done)
                number, step = self._num_requested, self._step
            # One that cannot be saved ends the run, which requests the last copy.
            while not (self._workdir / CHECKPOINTS / str(step)).is_dir():
                with self._changed:
                    if self._is_last or number != self._num_requested:
                        break
                    self._changed.wait(_LOOK_SECONDS)
            self._copy_once()
            with self._changed:
                self._num_done = number
                self._changed.notify_all()

    def _copy_once(self) -> None:
        assert self._copy is not None, "nothing is copied without copy_to"
        start = time.monotonic()
        try:
            step = self._copy.copy()
        # Whatever it is, the run goes on.
        except Exception as error:
            self._said_step = None
            kind = "" if isinstance(error, UserError | OSError) else f"{type(error).__name__}: "
            reason = kind + str(error).removesuffix(ONCE_IT_ANSWERS)
            self._say(
                f"the run could not be copied to {self._url}: {reason}. "
                f"{self._way_on()}; {self._what_is_there()}"
            )
            return
        self._newest_there = step
        if step != self._said_step and (self._said_step is None or self._is_last):
            seconds = time.monotonic() - start
            self._say(f"the checkpoint of step {step} is in {self._url}, copied in {seconds:.0f} s")
            self._said_step = step

    def _what_is_there(self) -> str:
        if self._newest_there is None:
            return "nothing was copied since this start"
        return f"the newest whole checkpoint that was copied is that of step {self._newest_there}"

    def _way_on(self) -> str:
        if self._is_last:
            return f"The same command, where {self._workdir} is, copies what is missing"
        return "The run goes on, and tries again after the next checkpoint"


def _first_does(work: Callable[[], None]) -> None:
    """Has the first process do something that may take long; all must call together.

    The others ask every two seconds: one exchange that waits for minutes would be given up.

    Raises:
      CopyError: in the others, if it failed.
    """
    if jax.process_count() == 1:
        work()
        return
    errors: list[Exception] = []
    worker = threading.Thread(target=_collecting(work, errors), name="copies, first", daemon=True)
    if is_first():
        worker.start()
    while True:
        is_done = not worker.is_alive()
        said = [(str(error), exit_code_of(error)) for error in errors]
        is_done, said = gathered([is_done, said])[0]
        if is_done:
            break
        time.sleep(_EXCHANGE_SECONDS)
    if errors:
        raise errors[0]
    for message, exit_code in said:
        error = CopyError(message)
        error.exit_code = exit_code
        raise error


def _collecting(work: Callable[[], None], errors: list[Exception]) -> Callable[[], None]:
    """The same work, which keeps what it raises."""

    def run() -> None:
        try:
            work()
        # Raised by who started it.
        except Exception as error:
            errors.append(error)

    return run


def _in_parallel(do: Callable[[str], None], names: Iterable[str]) -> None:
    """Does something for each name, some at a time; stops at an error, and raises it.

    Python would wait for the threads of an executor when it ends, also where a copy was given up.
    """
    left, lock, errors = iter(list(names)), threading.Lock(), list[Exception]()

    def work() -> None:
        while not errors:
            with lock:
                name = next(left, None)
            if name is None:
                return
            do(name)

    threads = [
        threading.Thread(target=_collecting(work, errors), name="copies, files", daemon=True)
        for _ in range(_THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _files(folder: Path) -> dict[str, _Stamp]:
    """Stamps of all files below a folder, by their names from there on."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            # Links to nothing, and what was removed just now.
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = _stamp(path)
    return found


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return _Stamp(found.st_size, found.st_mtime_ns)


def _is_kept(name: str) -> bool:
    """True for a file of the run that is no checkpoint's, nor damaged, nor half-written."""
    parts = PurePosixPath(name).parts
    if ".." in parts or name == _PROBE or parts[0] in (CHECKPOINTS, DAMAGED, _UNFINISHED):
        return False
    if parts[:2] == (BEST, CHECKPOINTS):
        return False
    return not parts[-1].endswith(".unfinished")


def _steps_among(names: Iterable[str], folder: str) -> set[int]:
    """Steps of which there are files among those of a bucket."""
    prefix = f"{folder}/"
    found = (name.removeprefix(prefix).split("/") for name in names if name.startswith(prefix))
    return {int(parts[0]) for parts in found if len(parts) > 1 and parts[0].isdecimal()}


def _whole_among(names: Iterable[str], folder: str) -> set[int]:
    """Steps of the checkpoints that were copied to their end."""
    there = set(names)
    return {
        step for step in _steps_among(there, folder) if f"{folder}/{step}/{digests.NAME}" in there
    }
