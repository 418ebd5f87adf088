"""Checkpoints: a run's state with the position of its data, and the way back."""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from sam_jax import digests, places
from sam_jax.errors import UserError
from sam_jax.hosts import is_first

CHECKPOINTS = "checkpoints"
# Where checkpoints go that were found damaged.
DAMAGED = "checkpoints_damaged"
CONFIG = "config.json"

# A checkpoint has parts, so that who needs only a model reads only that. One with averaged
# parameters is a second model, where a run keeps them.
_MODEL, _EMA, _OPTIMIZER, _DATA = "model", "ema", "optimizer", "data"

# Checkpoints that processes agree on; a run keeps a few, and some for good.
_MOST_STEPS = 64

# Folders at the root that epath takes for cloud buckets, and the beginning of a URL.
_BUCKETS = ("gs", "s3", "az", "hf")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# How errors of TensorStore begin, as in "RESOURCE_EXHAUSTED: ".
_STATUS = re.compile(r"[A-Z_]+: ")
_OS_ERROR = re.compile(r"[^:]+(?= \[os_error_code)")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Schedule of checkpoints: when to save and what to keep.

    Attributes:
      every_steps: steps between checkpoints; the last step is saved in any case, and so is a step
        that is evaluated.
      keep: the newest checkpoints that are kept, those of evaluated steps among them.
      keep_period: checkpoints at multiples of it are kept for good; None for none.
      copy_to: URL of a folder in a bucket, as in "s3://BUCKET/RUN", to which the run's folder is
        copied after each checkpoint, and from which it is copied back where it has none; see
        ``training.checkpoint_copies``. None for no copies.
      copy_seconds: the longest that a run waits at its end for the last copy.
    """

    every_steps: int = 1000
    keep: int = 3
    keep_period: int | None = None
    copy_to: str | None = None
    copy_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep", "keep_period", "copy_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class CheckpointError(UserError):
    """There is no usable checkpoint where one was asked for."""


class _LiteralPath(type(epath.Path())):  # type: ignore[misc]
    """A path that is taken as it is where files below it are looked for by a pattern.

    Orbax looks for the parts of a checkpoint so. It would read ``[1]``, ``*`` and ``?`` in the
    names of folders above as parts of the pattern: find nothing, or the files of another run.
    """

    def glob(self, pattern: str) -> Iterator["_LiteralPath"]:
        for found in Path(self).glob(pattern):
            yield type(self)(found)


def checkpoint_path(path: str | Path) -> epath.Path:
    """A folder for checkpoints, absolute, as Orbax and TensorStore take it.

    Raises:
      CheckpointError: if they would take its name for that of another place.
    """
    # Links are not resolved: a link with another name is the user's way out.
    absolute = os.path.normpath(Path(path).absolute())
    root = Path(absolute).parts[1:2]
    reason = None
    if _URL.match(os.fspath(path)):
        reason = (
            "it is a URL, expected a folder; of a bucket, name the folder that it is mounted at, "
            "or have the run copied to it (checkpoint.copy_to)"
        )
    elif "\\" in absolute:
        reason = "TensorStore takes the backslash for a slash, and would write to another folder"
    elif "gs:/" in f"{absolute}/":
        reason = "Orbax takes what follows 'gs:' for a bucket"
    elif root and root[0] in _BUCKETS:
        reason = f"Orbax takes a path that begins with /{root[0]} for a bucket"
    elif any("\ud800" <= letter <= "\udfff" for letter in absolute):
        reason = "it is no UTF-8, which TensorStore expects"
    if reason is not None:
        raise CheckpointError(
            f"{os.fspath(path)!r} cannot hold checkpoints: {reason}. Give a folder of another "
            "name, or a link to it"
        )
    return _LiteralPath(absolute)


class DamagedCheckpoint(NamedTuple):
    """A checkpoint that cannot be continued from.

    Attributes:
      step: of it.
      fault: what is wrong.
    """

    step: int
    fault: str


@functools.cache
def _silence_storage_threads() -> None:
    """Passes over the errors that threads of Orbax and TensorStore tell of, each with its stack.

    There are hundreds of one error of the storage. Orbax raises it as well, and the one message
    that says so would be buried: of a disk that is full, the log may be on it, too.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    told = sys.unraisablehook

    def tell(unraisable: Any) -> None:
        # TensorStore's threads, of writes that nobody waits for any more.
        if str(unraisable.exc_value) != "Event loop is closed":
            told(unraisable)

    sys.unraisablehook = tell


def _is_news(record: logging.LogRecord) -> bool:
    """False for the errors of a write that Orbax logs, or that asyncio logs of its tasks."""
    of_asyncio = record.name == "asyncio" and "orbax" in record.getMessage()
    return not (record.exc_info and (of_asyncio or "orbax" in Path(record.pathname).parts))


class Checkpointer:
    """Saves and restores the training state and the data iterator under a working directory.

    Saving is asynchronous: the arrays are copied, and written while training goes on. A checkpoint
    that was not written to its end (the process was killed) is not seen again. The first one that
    is saved is read back before the next, or at the end: its shapes, and the position of the data.
    Each has the digests of its files, which are compared before it is restored.

    Until the first is saved, or ``begin`` is called, nothing in the directory changes.

    Attributes:
      damaged: what ``restore`` found damaged, the newest first.

    Raises:
      CheckpointError: if the directory's name cannot be that of one with checkpoints.
      PlaceError: if it cannot be written to.
    """

    def __init__(self, workdir: str | Path, config: CheckpointConfig):
        self.damaged: list[DamagedCheckpoint] = []
        self._config = config
        self._folder = checkpoint_path(workdir) / CHECKPOINTS
        places.check_folder(Path(workdir) / CHECKPOINTS)
        # Made for writing only, as it makes folders and clears away what is half-written.
        self._manager: Any = None
        self._saving: int | None = None
        self._to_read_back: int | None = None
        self._was_read_back = False

    def begin(self) -> list[Path]:
        """Makes the folder; clears away what is half-written, and puts aside what is damaged.

        Returns:
          where the damaged checkpoints are now, in the order of ``damaged``.
        """
        if self._manager is not None:
            return []
        _silence_storage_threads()
        put_aside = [self._put_aside(step) for step, _ in self.damaged]
        if jax.process_count() > 1:
            # Orbax would find those that are just being moved.
            multihost_utils.sync_global_devices("damaged checkpoints are put aside")
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._config.keep,
                keep_period=self._config.keep_period,
                # What a killed run left half-written.
                cleanup_tmp_directories=True,
                # All of the files are there, and the folder has not taken its name yet.
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
            ),
            item_names=(_MODEL, _EMA, _OPTIMIZER, _DATA),
            item_handlers={
                _MODEL: ocp.StandardCheckpointHandler(),
                _EMA: ocp.StandardCheckpointHandler(),
                _OPTIMIZER: ocp.StandardCheckpointHandler(),
                _DATA: grain.checkpoint.CheckpointHandler(),
            },
        )
        return put_aside

    def _put_aside(self, step: int) -> Path:
        """Moves a checkpoint to where none is looked for; another may be there from before."""
        folder = Path(self._folder).with_name(DAMAGED)
        names = itertools.chain([str(step)], (f"{step}-{number}" for number in itertools.count(2)))
        target = next(folder / name for name in names if not (folder / name).exists())
        if is_first():
            folder.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(target)
        return target

    def _write_digests(self) -> None:
        """Adds digests to the checkpoint that is being saved; in Orbax's thread."""
        names = [path.name for path in self._folder.iterdir()]
        for name in names:
            if name.startswith(f"{self._saving}.") or name == str(self._saving):
                digests.write_digests(Path(self._folder) / name)

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint that is not known to be damaged, None if none is."""
        if self._manager is not None:
            return self._manager.latest_step()
        damaged = {step for step, _ in self.damaged}
        return next((step for step in self._steps if step not in damaged), None)

    @property
    def holds_weights_alone(self) -> bool:
        """True if the newest checkpoint has no state of training, as that of a best model."""
        if not self._steps:
            return False
        parts = (_part(self._folder, self._steps[0], name) for name in (_OPTIMIZER, _DATA))
        return not any(part.is_dir() for part in parts)

    @functools.cached_property
    def _steps(self) -> list[int]:
        """Steps of all checkpoints that were there at first, the newest first."""
        return _steps_of_first(self._folder)

    @property
    def latest_has_ema(self) -> bool:
        """True if the newest complete checkpoint has averaged parameters."""
        return _part(self._folder, self.latest_step, _EMA).is_dir()

    def is_due(self, step: int) -> bool:
        """True if the config asks for a checkpoint after this many steps."""
        return step % self._config.every_steps == 0

    def save(self, state: Any, data_iterator: Any) -> None:
        """Starts to save the state as it is now, with the position of the data.

        Saving a step that is saved already does nothing.

        Raises:
          CheckpointError: if the first one that was saved cannot be read.
        """
        self.begin()
        self._read_back()
        step = int(state.step)
        if step == self.latest_step:
            return
        parts = {
            _MODEL: ocp.args.StandardSave(state.variables),
            _OPTIMIZER: ocp.args.StandardSave({"opt_state": state.opt_state}),
            _DATA: grain.checkpoint.CheckpointSave(data_iterator),
        }
        if state.ema_params is not None:
            parts[_EMA] = ocp.args.StandardSave(state.evaluated_variables)
        with self._failing_as_checkpoint_error():
            # The one before may still be written, and its digests with it.
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(**parts),
                # The loop decides when, so that a last or an interrupted step is saved too.
                force=True,
            )
        if not self._was_read_back:
            self._to_read_back = step

    def _read_back(self) -> None:
        """Waits for the first checkpoint that is being saved, and finds out what it is worth."""
        if self._to_read_back is None:
            return
        step, self._to_read_back, self._was_read_back = self._to_read_back, None, True
        with self._failing_as_checkpoint_error():
            self._manager.wait_until_finished()
        try:
            for name in (_MODEL, _EMA, _OPTIMIZER):
                if name != _EMA or _part(self._folder, step, _EMA).is_dir():
                    _shapes(_part(self._folder, step, name))
            self._data_states(step)
        # Damaged checkpoints raise errors of every kind.
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint of step {step} was written to {self._folder} and cannot be read "
                f"back, so that nothing of this run could be continued: {error}"
            ) from error

    @contextlib.contextmanager
    def _failing_as_checkpoint_error(self) -> Iterator[None]:
        """Raises errors of the storage, perhaps of the save before, as `CheckpointError`."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            if isinstance(error, ValueError) and not _STATUS.match(reason):
                raise
            # The reason stands among paths of temporary files, which may be long.
            if said := _OS_ERROR.search(reason):
                reason = said[0].strip()
            newest = self.latest_step
            left = "there is none yet" if newest is None else f"the newest whole one: step {newest}"
            raise CheckpointError(
                f"a checkpoint could not be written to {self._folder}: {reason[:300]}; {left}. "
                "Once that is mended, the same command continues"
            ) from error

    def restore(self, state: Any, data_iterator: Any) -> Any:
        """The state of the newest checkpoint that is whole; the iterator is moved to its position.

        Newer ones that are damaged are in ``damaged`` afterwards. Averaged parameters are restored
        if the state has them and the checkpoint, too. Where only the state has them, they start as
        the parameters.

        Args:
          state: shapes, types and shardings of the state to restore; any devices and any number
            of processes will do.
          data_iterator: of the same data.

        Raises:
          CheckpointError: if there is no whole one, or it is of another model or optimizer.
        """
        assert self._steps, "there is no checkpoint to restore"
        for step in self._steps:
            try:
                restored, states = self._read(step, state)
            except _DamageError as error:
                self.damaged.append(DamagedCheckpoint(step, str(error)))
                continue
            try:
                data_iterator.set_states(states)
            except (ValueError, KeyError, TypeError) as error:
                raise self._unfit(step, error) from error
            return restored
        reasons = "".join(f"\n  step {step}: {fault}" for step, fault in self.damaged)
        raise CheckpointError(
            f"no checkpoint in {self._folder} can be read, and nothing was changed there. Bring "
            f"one back from a copy, or start anew in another --workdir:{reasons}"
        )

    def _read(self, step: int, state: Any) -> tuple[Any, list[dict]]:
        """A checkpoint's state and the positions of its data.

        Raises:
          _DamageError: if it is damaged, in all processes if it is in one.
          CheckpointError: if it is of another model or optimizer.
        """
        folder = Path(self._folder) / str(step)
        _agree(digests.find_damage(folder) if is_first() else None)
        keeps_ema = state.ema_params is not None
        parts = {
            _MODEL: state.variables,
            _OPTIMIZER: {"opt_state": state.opt_state},
        }
        if keeps_ema and _part(self._folder, step, _EMA).is_dir():
            parts[_EMA] = state.evaluated_variables
        found, states, restored = {}, [], {}
        with _agreed_damage():
            found = {name: _shapes(_part(self._folder, step, name)) for name in parts}
            states = self._data_states(step)
        # Before any is read: a read that fails leaves others running.
        for name, target in parts.items():
            try:
                _check_arrays(found[name], target)
            except ValueError as error:
                raise self._unfit(step, error) from error
        with _agreed_damage():
            restored = {
                name: _restored(_part(self._folder, step, name), target)
                for name, target in parts.items()
            }
        ema_params = None
        if keeps_ema:
            found = restored[_EMA if _EMA in parts else _MODEL]["params"]
            ema_params = state.averaged_part(found)
            if _EMA not in parts:
                ema_params = jax.tree.map(jax.numpy.copy, ema_params)
        whole = state.replace(
            step=jax.device_put(jax.numpy.asarray(step, state.step.dtype), state.step.sharding),
            opt_state=restored[_OPTIMIZER]["opt_state"],
            ema_params=ema_params,
            **restored[_MODEL],
        )
        return whole, states

    def _unfit(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint of step {step} in {self._folder} does not fit this "
            f"config; use another --workdir, or the config it was made with ({CONFIG} beside "
            f"it). {error}"
        )

    def _data_states(self, step: int) -> list[dict]:
        """Saved data positions of all processes of the run, however many there are now."""
        folder = _part(self._folder, step, _DATA)
        files = {}
        for path in folder.glob("process_*-of-*.json"):
            if match := re.fullmatch(r"process_(\d+)-of-(\d+)\.json", path.name):
                files[int(match[1])] = (path, int(match[2]))
        complete = bool(files) and all(
            count == len(files) and index < count for index, (_, count) in files.items()
        )
        if not complete:
            raise CheckpointError(
                f"{folder} does not hold the position of the data of every process: found "
                f"{sorted(path.name for path, _ in files.values())}"
            )
        return [json.loads(files[index][0].read_text()) for index in sorted(files)]

    def wait(self) -> None:
        """Waits until what is being saved is written; any thread may.

        Raises:
          CheckpointError: if it cannot be written.
        """
        if self._manager is not None:
            with self._failing_as_checkpoint_error():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          CheckpointError: if the first one that was saved cannot be read.
        """
        if self._manager is None:
            return
        try:
            self._read_back()
        finally:
            with self._failing_as_checkpoint_error():
                self._manager.close()


class _DamageError(Exception):
    """A checkpoint cannot be read; the message says what of it."""


def _agree(fault: str | None) -> None:
    """Raises `_DamageError` if this process or another one has found a fault."""
    is_faulty = np.array([fault is not None])
    if jax.process_count() > 1:
        is_faulty = multihost_utils.process_allgather(is_faulty).reshape(-1)
    if is_faulty.any():
        raise _DamageError(fault or f"process {int(np.argmax(is_faulty))} cannot read it")


@contextlib.contextmanager
def _agreed_damage() -> Iterator[None]:
    """A block that all processes run, and that fails in all of them if it does in one.

    Whatever it raises is taken for damage of what it reads: damaged files end in errors of every
    kind, bare Exceptions among them.
    """
    fault = None
    try:
        yield
    except Exception as error:
        fault = str(error).partition("\n")[0][:300] or type(error).__name__
    _agree(fault)


def _steps_in(folder: epath.Path) -> list[int]:
    """Steps of all checkpoints that were written to their end, the newest first."""
    if not folder.is_dir():
        return []
    return sorted(ocp.utils.checkpoint_steps(folder), reverse=True)


def _steps_of_first(folder: epath.Path) -> list[int]:
    """Steps that the first process sees: storage may show them to others later."""
    steps = np.full(_MOST_STEPS, -1)
    found = _steps_in(folder)[:_MOST_STEPS]
    steps[: len(found)] = found
    if jax.process_count() > 1:
        steps = multihost_utils.broadcast_one_to_all(steps)
    return [int(step) for step in steps if step >= 0]


def _part(folder: epath.Path, step: int | None, name: str) -> epath.Path:
    return folder / str(step) / name


def _shapes(part: epath.Path) -> Any:
    """The tree of a part's arrays, as shapes on the default device."""
    handler = ocp.StandardCheckpointHandler()
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            handler.metadata(part).tree,
        )
    finally:
        handler.close()


def _check_arrays(found_shapes: Any, shapes: Any) -> None:
    """Raises ValueError unless a part holds arrays of these names and shapes, and no others."""
    found, expected = (
        {name: leaf.shape for name, leaf in ocp.tree.to_flat_dict(tree, sep="/").items()}
        for tree in (found_shapes, shapes)
    )
    differences = [
        f"{name}: {found.get(name, 'nothing')} there, {expected.get(name, 'nothing')} here"
        for name in sorted(found | expected)
        if found.get(name) != expected.get(name)
    ]
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(f"Other arrays: {'; '.join(differences[:3])}{more}")


def _restored(part: epath.Path, shapes: Any) -> Any:
    """A part's arrays, of these shapes, types and shardings."""
    # Not Orbax's checkpointer, which would warn of the other parts that are not read here.
    handler = ocp.StandardCheckpointHandler()
    try:
        return handler.restore(part, args=ocp.args.StandardRestore(shapes))
    finally:
        handler.close()


def restore_variables(path: str | Path, step: int | None = None, *, ema: bool = True) -> dict:
    """The variables of a model, ``{"params": ..., "constants": ...}``, from a run's directory.

    Reads neither the optimizer's state nor the position of the data, and any number of devices
    will do: arrays come back on the default device.

    Args:
      path: a training run's working directory.
      step: which checkpoint; None for the newest.
      ema: whether to read the averaged parameters where the run keeps them.

    Raises:
      CheckpointError: if there is none there.
    """
    folder = checkpoint_path(path)
    # A run's own folder may have that name.
    if folder.name != CHECKPOINTS or (folder / CHECKPOINTS).is_dir():
        folder = folder / CHECKPOINTS
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoints in {path}: expected the --workdir of a training run, with a folder "
            f"{CHECKPOINTS!r} in it"
        )
    steps = _steps_in(folder)
    if not steps:
        raise CheckpointError(f"{folder} holds no whole checkpoint")
    step = steps[0] if step is None else step
    if step not in steps:
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has {sorted(steps)}")
    name = _EMA if ema and _part(folder, step, _EMA).is_dir() else _MODEL
    item = _part(folder, step, name)
    fault = digests.find_damage(Path(folder) / str(step), name)
    if fault is None:
        try:
            return _restored(item, _shapes(item))
        # Damaged files end in errors of every kind, bare Exceptions among them.
        except Exception as error:
            fault = str(error)
    others = [other for other in sorted(steps) if other != step]
    hint = f"; there are checkpoints of steps {others} besides" if others else ""
    raise CheckpointError(f"{item} is damaged: {fault}{hint}")


def save_variables(
    workdir: str | Path,
    variables: Any,
    *,
    step: int = 0,
    keep: int | None = None,
    replaces: bool = False,
) -> None:
    """Writes the variables of a model as a checkpoint without more, to be read as a run's.

    In the foreground and some arrays at a time, so that they are never in memory twice.

    Args:
      workdir: as a run's.
      variables: of the model.
      step: of the checkpoint.
      keep: the newest checkpoints that are kept, as soon as this one is written; None for all.
      replaces: whether one of this step that is there already makes room; else it stays.

    Raises:
      CheckpointError: if the name of the folder cannot be that of one with checkpoints, or what
        was written cannot be read.
    """
    folder = checkpoint_path(workdir) / CHECKPOINTS
    with ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        ),
        item_names=(_MODEL,),
        item_handlers={_MODEL: ocp.StandardCheckpointHandler(save_concurrent_gb=1)},
    ) as manager:
        # Arrays of JAX are written as they are, those of numpy from copies.
        arrays = jax.tree.map(jax.numpy.asarray, variables)
        parts = ocp.args.Composite(**{_MODEL: ocp.args.StandardSave(arrays)})
        if replaces and step in manager.all_steps():
            manager.delete(step)
        if step not in manager.all_steps():
            manager.save(step, args=parts, force=True)
    try:
        _shapes(_part(folder, step, _MODEL))
    except Exception as error:
        raise CheckpointError(f"what was written to {folder} cannot be read: {error}") from error


def save_config(workdir: str | Path, config: dict, *, done_steps: int = 0) -> str | None:
    """Writes the resolved config beside the checkpoints, whole or not at all.

    Args:
      workdir: of the run.
      config: of the steps to come.
      done_steps: if there are any, the config that they were made with is kept under another name
        where it was a different one.

    Returns:
      The name of what was kept, None for nothing.
    """
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    path, kept = folder / CONFIG, None
    if done_steps and path.exists() and config_changes(workdir, config) != []:
        kept = f"config_until_step_{done_steps}.json"
        # Once per checkpoint: configs in between have made none.
        if not (folder / kept).exists():
            # Copied, so that a run that is killed here has a config all the same.
            places.write_text(folder / kept, path.read_text(encoding="utf-8"))
    places.write_text(path, json.dumps(config, indent=2) + "\n")
    return kept


def config_changes(workdir: str | Path, config: dict) -> list[str] | None:
    """Differences from the config kept in a run, key by key; None if it keeps no readable one.

    Args:
      workdir: of the run.
      config: the resolved config.
    """
    try:
        before = flat_config(json.loads((Path(workdir) / CONFIG).read_text()))
    except (OSError, ValueError, AttributeError):
        return None
    now = flat_config(json.loads(json.dumps(config)))
    return [
        f"{key} {json.dumps(before.get(key))} -> {json.dumps(now.get(key))}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key)
    ]


def flat_config(sections: dict, prefix: str = "") -> dict[str, Any]:
    """A config's values by SECTION.KEY."""
    leaves: dict[str, Any] = {}
    for key, value in sections.items():
        if isinstance(value, dict):
            leaves |= flat_config(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves
