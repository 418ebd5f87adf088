"""Checkpoints: a run's state with the position of its data, and the way back."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from sam_jax.errors import UserError

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"

# A checkpoint has parts, so that who needs only a model reads only that. One with averaged
# parameters is a second model, where a run keeps them.
_MODEL, _EMA, _OPTIMIZER, _DATA = "model", "ema", "optimizer", "data"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

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


class Checkpointer:
    """Saves and restores the training state and the data iterator under a working directory.

    Saving is asynchronous: the arrays are copied, and written while training goes on. A checkpoint
    that was not written to its end (the process was killed) is not seen again.
    """

    def __init__(self, workdir: str | Path, config: CheckpointConfig):
        self._config = config
        self._manager = ocp.CheckpointManager(
            epath.Path(workdir).resolve() / CHECKPOINTS,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep,
                keep_period=config.keep_period,
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
        return self._manager.latest_step()

    @property
    def latest_has_ema(self) -> bool:
        """Whether the newest whole checkpoint has averaged parameters."""
        return _part(self._manager.directory, self.latest_step, _EMA).is_dir()

    def is_due(self, step: int) -> bool:
        """Whether the config wants a checkpoint after this many steps."""
        return step % self._config.every_steps == 0

    def save(self, state: Any, data_iterator: Any) -> None:
        """Starts to save the state as it is now, with the position of the data.

        Saving a step that is saved already does nothing.
        """
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
        self._manager.save(
            step,
            args=ocp.args.Composite(**parts),
            # The loop decides when, so that a last or an interrupted step is saved too.
            force=True,
        )

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
            _MODEL: ocp.args.StandardRestore(state.variables),
            _OPTIMIZER: ocp.args.StandardRestore({"opt_state": state.opt_state}),
        }
        keeps_ema = state.ema_params is not None
        if keeps_ema and self.latest_has_ema:
            parts[_EMA] = ocp.args.StandardRestore(state.evaluated_variables)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**parts))
            data_iterator.set_states(self._data_states(step))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._manager.directory} does not fit this "
                f"config; use another --workdir, or the config it was made with ({CONFIG} beside "
                f"it). {error}"
            ) from error
        ema_params = None
        if keeps_ema:
            ema_params = restored[_EMA if _EMA in parts else _MODEL]["params"]
            if _EMA not in parts:
                ema_params = jax.tree.map(jax.numpy.copy, ema_params)
        return state.replace(
            step=jax.device_put(jax.numpy.asarray(step, state.step.dtype), state.step.sharding),
            opt_state=restored[_OPTIMIZER]["opt_state"],
            ema_params=ema_params,
            **restored[_MODEL],
        )

    def _data_states(self, step: int) -> list[dict]:
        """Where the data of all processes were, however many there are now."""
        folder = epath.Path(self._manager.directory) / str(step) / _DATA
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
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _part(folder: epath.Path, step: int | None, name: str) -> epath.Path:
    return epath.Path(folder) / str(step) / name


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
    folder = epath.Path(path).resolve()
    folder = folder if folder.name == CHECKPOINTS else folder / CHECKPOINTS
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
    # The handler itself: what wraps it warns of the parts that are left alone here.
    handler, item = ocp.StandardCheckpointHandler(), _part(folder, step, _MODEL)
    if ema and _part(folder, step, _EMA).is_dir():
        item = _part(folder, step, _EMA)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            handler.metadata(item).tree,
        )
        return handler.restore(item, args=ocp.args.StandardRestore(shapes))
    # Damaged files end in errors of every kind, bare Exceptions among them.
    except Exception as error:
        raise CheckpointError(f"{item} is damaged: {error}") from error
    finally:
        handler.close()


def save_variables(workdir: str | Path, variables: Any) -> None:
    """Writes the variables of a model as the checkpoint of step 0, to be read as a run's.

    In the foreground and some arrays at a time, so that they are never in memory twice.
    """
    folder = epath.Path(workdir).resolve() / CHECKPOINTS
    with ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        item_names=(_MODEL,),
        item_handlers={_MODEL: ocp.StandardCheckpointHandler(save_concurrent_gb=1)},
    ) as manager:
        # Arrays of JAX are written as they are, those of numpy from copies.
        arrays = jax.tree.map(jax.numpy.asarray, variables)
        manager.save(0, args=ocp.args.Composite(**{_MODEL: ocp.args.StandardSave(arrays)}))


def save_config(workdir: str | Path, config: dict) -> None:
    """Writes the resolved config beside the checkpoints, whole or not at all."""
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{CONFIG}.unfinished"
    unfinished.write_text(json.dumps(config, indent=2) + "\n")
    unfinished.replace(folder / CONFIG)
