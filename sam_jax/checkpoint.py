"""Checkpoints: a run's state with the position of its data, and the way back."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from sam_jax import places
from sam_jax.errors import UserError

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"

# A checkpoint has parts, so that who needs only a model reads only that. One with averaged
# parameters is a second model, where a run keeps them.
_MODEL, _EMA, _OPTIMIZER, _DATA = "model", "ema", "optimizer", "data"

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
      every_steps: steps between checkpoints; the last step is saved in any case.
      keep: the newest checkpoints that are kept.
      keep_period: checkpoints at multiples of it are kept for good; None for none.
    """

    every_steps: int = 1000
    keep: int = 3
    keep_period: int | None = None


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
        reason = "it is a URL, expected a folder; of a bucket, name the folder it is mounted at"
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


class Checkpointer:
    """Saves and restores the training state and the data iterator under a working directory.

    Saving is asynchronous: the arrays are copied, and written while training goes on. A checkpoint
    that was not written to its end (the process was killed) is not seen again. The first one that
    is saved is read back before the next, or at the end: its shapes, and the position of the data.

    Until the first is saved, or ``begin`` is called, nothing in the directory changes.

    Raises:
      CheckpointError: if the directory's name cannot be that of one with checkpoints.
      PlaceError: if it cannot be written to.
    """

    def __init__(self, workdir: str | Path, config: CheckpointConfig):
        self._config = config
        self._folder = checkpoint_path(workdir) / CHECKPOINTS
        places.check_folder(Path(workdir) / CHECKPOINTS)
        # Made for writing only, as it makes folders and clears away what is half-written.
        self._manager: Any = None
        self._to_read_back: int | None = None
        self._was_read_back = False

    def begin(self) -> None:
        """Makes the folder, and clears away what a killed run left half-written."""
        if self._manager is not None:
            return
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._config.keep,
                keep_period=self._config.keep_period,
                # What a killed run left half-written.
                cleanup_tmp_directories=True,
            ),
            item_names=(_MODEL, _EMA, _OPTIMIZER, _DATA),
            item_handlers={
                _MODEL: ocp.StandardCheckpointHandler(),
                _EMA: ocp.StandardCheckpointHandler(),
                _OPTIMIZER: ocp.StandardCheckpointHandler(),
                _DATA: grain.checkpoint.CheckpointHandler(),
            },
        )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, None if there is none."""
        if self._manager is not None:
            return self._manager.latest_step()
        steps = ocp.utils.checkpoint_steps(self._folder) if self._folder.is_dir() else []
        return max(steps, default=None)

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
        """The newest checkpoint's state; the iterator is moved to its position.

        Averaged parameters are restored if the state has them and the checkpoint, too. Where only
        the state has them, they start as the parameters.

        Args:
          state: shapes, types and shardings of the state to restore; any devices and any number
            of processes will do.
          data_iterator: of the same data.

        Raises:
          CheckpointError: if the checkpoint is of another model or optimizer.
        """
        step = self.latest_step
        assert step is not None, "there is no checkpoint to restore"
        parts = {
            _MODEL: state.variables,
            _OPTIMIZER: {"opt_state": state.opt_state},
        }
        keeps_ema = state.ema_params is not None
        if keeps_ema and self.latest_has_ema:
            parts[_EMA] = state.evaluated_variables
        try:
            # Checks all parts before reading any: a read that fails leaves others running.
            for name, target in parts.items():
                _check_arrays(_part(self._folder, step, name), target)
            restored = {
                name: _restored(_part(self._folder, step, name), target)
                for name, target in parts.items()
            }
            data_iterator.set_states(self._data_states(step))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._folder} does not fit this "
                f"config; use another --workdir, or the config it was made with ({CONFIG} beside "
                f"it). {error}"
            ) from error
        ema_params = None
        if keeps_ema:
            found = restored[_EMA if _EMA in parts else _MODEL]["params"]
            ema_params = state.averaged_part(found)
            if _EMA not in parts:
                ema_params = jax.tree.map(jax.numpy.copy, ema_params)
        return state.replace(
            step=jax.device_put(jax.numpy.asarray(step, state.step.dtype), state.step.sharding),
            opt_state=restored[_OPTIMIZER]["opt_state"],
            ema_params=ema_params,
            **restored[_MODEL],
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


def _check_arrays(part: epath.Path, shapes: Any) -> None:
    """Raises ValueError unless a part holds arrays of these names and shapes, and no others."""
    found, expected = (
        {name: leaf.shape for name, leaf in ocp.tree.to_flat_dict(tree, sep="/").items()}
        for tree in (_shapes(part), shapes)
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
    steps = ocp.utils.checkpoint_steps(folder)
    if not steps:
        raise CheckpointError(f"{folder} holds no whole checkpoint")
    step = max(steps) if step is None else step
    if step not in steps:
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has {sorted(steps)}")
    item = _part(folder, step, _MODEL)
    if ema and _part(folder, step, _EMA).is_dir():
        item = _part(folder, step, _EMA)
    try:
        return _restored(item, _shapes(item))
    # Damaged files end in errors of every kind, bare Exceptions among them.
    except Exception as error:
        raise CheckpointError(f"{item} is damaged: {error}") from error


def save_variables(
    workdir: str | Path, variables: Any, *, step: int = 0, keep: int | None = None
) -> None:
    """Writes the variables of a model as a checkpoint without more, to be read as a run's.

    In the foreground and some arrays at a time, so that they are never in memory twice. One that is
    there already stays.

    Args:
      workdir: as a run's.
      variables: of the model.
      step: of the checkpoint.
      keep: the newest checkpoints that are kept, as soon as this one is written; None for all.

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
            path.rename(folder / kept)
    unfinished = folder / f".{CONFIG}.unfinished"
    unfinished.write_text(json.dumps(config, indent=2) + "\n")
    unfinished.replace(path)
    return kept


def config_changes(workdir: str | Path, config: dict) -> list[str] | None:
    """Differences from the config kept in a run, key by key; None if it keeps no readable one.

    Args:
      workdir: of the run.
      config: the resolved config.
    """
    try:
        before = _leaves(json.loads((Path(workdir) / CONFIG).read_text()))
    except (OSError, ValueError, AttributeError):
        return None
    now = _leaves(json.loads(json.dumps(config)))
    return [
        f"{key} {json.dumps(before.get(key))} -> {json.dumps(now.get(key))}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key)
    ]


def _leaves(sections: dict, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in sections.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves
