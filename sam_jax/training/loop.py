"""The training loop: from a compiled step and a data iterator to checkpoints."""

import itertools
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from sam_jax.checkpoint import (
    CONFIG,
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    config_changes,
    save_config,
)
from sam_jax.errors import UserError
from sam_jax.hosts import end_now, is_first
from sam_jax.sharding import describe
from sam_jax.training.best import Watch
from sam_jax.training.compiled_step import CompiledStep
from sam_jax.training.experiment import TrainConfig
from sam_jax.training.report import Profile, Reporter, Stopwatch
from sam_jax.training.state import TrainState
from sam_jax.training.task import Task
from sam_jax.weights.files import WeightsError

# Steps between exchanges of signals among processes; an exchange waits for the step before it.
_STEPS_BETWEEN_AGREEMENTS = 10


class EvalReport(Protocol):
    """Report that an evaluator returns."""

    @property
    def pictures(self) -> Mapping[str, np.ndarray]:
        """RGB pictures by name."""
        ...

    def as_flat_dict(self) -> dict[str, float]:
        """Numbers by name."""
        ...


Evaluators = Mapping[str, Callable[[dict], EvalReport]]
# (batches of the input pipeline, variables, what to say) -> batches of the step.
Stage = Callable[[Iterator, Mapping[str, Any], Callable[[str], None]], Iterator]


class TrainingInterruptedError(UserError):
    """A signal asked the run to stop; its state is saved."""

    exit_code = 130


class DivergedError(UserError):
    """The loss is not finite any more; the last checkpoint is from before."""


def train(
    *,
    workdir: str | Path,
    program: CompiledStep,
    config: TrainConfig,
    batch_size: int,
    data_iterator: Any,
    checkpoint_config: CheckpointConfig,
    evaluators: Evaluators,
    sections: dict[str, Any] | None = None,
    stage: Stage | None = None,
) -> TrainState:
    """Trains all steps, from the newest checkpoint in ``workdir`` if there is one.

    A run that was killed and is started again goes through the same states as one that was not.
    Nothing in ``workdir`` changes before config, data and checkpoint are found to fit.

    Args:
      workdir: for checkpoints and TensorBoard files.
      program: the step of the task, on its devices.
      config: how long to train, and what to tell.
      batch_size: images of a step, of all processes.
      data_iterator: yields mappings of the fields of the task's batch, this process's share, and
        can save and restore its position.
      checkpoint_config: when to save.
      evaluators: called with the variables at evaluations, by name.
      sections: the config that all of this is from, kept beside the checkpoints; None keeps none.
      stage: makes batches of the task of those that the iterator yields; None where they are.

    Raises:
      ConfigError: if the batch does not divide by the devices.
      TrainingInterruptedError: after an interrupt or a termination signal, once the state is saved.
      DivergedError: if the loss is not finite.
      CheckpointError: if there is a checkpoint that does not fit, or the folder is not a run's.
      WeightsError, NamesError: if ``config.init_from`` cannot be read or does not fit.
    """
    program.check_batch(batch_size)
    checkpointer = Checkpointer(workdir, checkpoint_config)
    _check_workdir(Path(workdir), checkpointer.latest_step, program.task)
    first_step = checkpointer.latest_step or 0
    reporter = Reporter(workdir, first_step, config.num_steps)
    watch = None
    if config.watch is not None and config.eval_every != 0:
        watch = Watch(workdir, config.watch, config.patience, first_step, sections)
        watch.check_names(evaluators)
    try:
        _introduce(program, reporter)
        state = None
        if first_step:
            state = _restored_state(program, checkpointer, data_iterator, reporter)
            if watch and _is_evaluated(first_step, config) and watch.lacks(first_step):
                _evaluate(evaluators, program.task, state, reporter, first_step, watch)
            if watch and watch.is_over:
                reporter.say(
                    f"nothing is left to do: the run was over at step {first_step}, as "
                    f"{watch.summary}; a larger train.patience goes on from here"
                )
                return state
            if first_step >= config.num_steps:
                reporter.say(
                    f"nothing is left to do: step {first_step} of {config.num_steps} is done; a "
                    "larger train.num_steps goes on from it, and eval.py evaluates it"
                )
                return state
        # Data that cannot be read are found out here.
        batches = itertools.chain([next(data_iterator)], data_iterator)
        if state is None:
            state = _new_state(program, config, reporter)
        _begin(program, checkpointer, reporter, first_step, sections)
        if stage is not None:
            batches = stage(batches, state.variables, reporter.say)
        if not first_step:
            reporter.say("the first step is compiled now, which can take minutes")
        return _run(
            *(state, program, data_iterator, batches, config),
            *(checkpointer, reporter, evaluators, watch),
        )
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        end_now(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on, most likely as "
            f"another one ended: {str(error).strip().splitlines()[0][:300]}\nThe same command, for "
            f"any number of processes, continues from the newest checkpoint in {workdir}."
        )
        raise
    finally:
        reporter.close()
        checkpointer.close()


def _check_workdir(workdir: Path, latest_step: int | None, task: Task) -> None:
    """Refuses a folder that is something else than a run of this model.

    Shapes of arrays do not tell all of a model: its config does.
    """
    if latest_step == 0:
        raise CheckpointError(
            f"{workdir} holds weights without a state of training, as sam-jax convert writes them; "
            f"give another --workdir, and train.init_from={workdir} to start from them"
        )
    if not (workdir / CONFIG).exists():
        return
    try:
        lines = task.differences(workdir)
    except WeightsError as error:
        if latest_step is not None:
            return  # Of a run that goes on, the config is written anew.
        raise CheckpointError(
            f"{workdir} holds a {CONFIG} that is no run's, and no checkpoints; give another "
            f"--workdir. {error}"
        ) from error
    if latest_step is not None and lines:
        raise CheckpointError(
            f"the run in {workdir} trains another model than the config describes; give another "
            f"--workdir, or the model of {workdir / CONFIG} (if that is the wrong one, remove it):"
            "\n  " + "\n  ".join(lines)
        )


def _introduce(program: CompiledStep, reporter: Reporter) -> None:
    """Says what runs where."""
    mesh = program.mesh
    reporter.say(
        f"{_num_parameters(program)} on "
        f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s) of {jax.process_count()} "
        f"process(es), {' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}"
    )
    for check in program.parallel.check_kernels():
        agrees = (
            "agrees with the reference" if check.fault is None else f"is not used: {check.fault}"
        )
        reporter.say(f"kernel {check.form} of {check.operation} {agrees}")


def _num_parameters(program: CompiledStep) -> str:
    total, trained = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (program.state_shapes.params, program.trained)
    )
    if trained == total:
        return f"{total / 1e6:.1f} M parameters"
    return f"{trained / 1e6:.2f} M of {total / 1e6:.1f} M parameters are trained ({trained:,})"


def _restored_state(program, checkpointer, data_iterator, reporter) -> TrainState:
    """The newest checkpoint's state; the data are moved to their place."""
    state = checkpointer.restore(program.placed_state, data_iterator)
    reporter.say(
        f"continuing from the checkpoint of step {checkpointer.latest_step} in {reporter.workdir}"
    )
    if checkpointer.latest_has_ema and not program.keeps_ema:
        reporter.say("its averaged parameters are dropped, as train.ema_decay is 0")
    if program.keeps_ema and not checkpointer.latest_has_ema:
        reporter.say("it has no averaged parameters: the average starts from its parameters")
    return state


def _new_state(program: CompiledStep, config: TrainConfig, reporter: Reporter) -> TrainState:
    """The state before the first step, from random or from other weights."""
    key = jax.random.key(config.seed)
    if config.init_from is None:
        return program.new_state(key)
    state = program.state_from(program.task.load(config.init_from, key))
    reporter.say(f"starting from the weights in {config.init_from}")
    return state


def _begin(program, checkpointer, reporter, first_step: int, sections) -> None:
    """Makes what a run keeps in its folder; all that is needed for its steps is there."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all processes have what they need")
    checkpointer.begin()
    reporter.begin()
    if sections is not None and is_first():
        changes = config_changes(reporter.workdir, sections)
        kept = save_config(reporter.workdir, sections, done_steps=first_step)
        if kept is not None:
            what = "; ".join(changes or ["it could not be read"])
            reporter.say(f"the config is another now: {what}; the one before is kept in {kept}")
    if program.mesh.size > 1:
        params = program.state_shapes.params
        lines = describe(params, program.state_shardings.params)
        reporter.note("sharding.txt", "\n".join(lines))


def _run(state, program, data_iterator, batches, config, checkpointer, reporter, evaluators, watch):
    stopwatch, interval = Stopwatch(), []
    profile = Profile(config.profile_steps, reporter)
    first_step = int(state.step)
    with _stop_signals() as stop_requested:
        for step in range(first_step + 1, config.num_steps + 1):
            profile.before(step)
            with stopwatch.during("input"):
                batch = _global_batch(next(batches), program)
            state, metrics = program.step(state, batch)
            interval.append(metrics)
            if len(interval) > 1:
                # One step is computed while the next one's data are fetched, and no more are
                # queued: the clock, the bar and the reaction to a signal stay honest.
                jax.block_until_ready(interval[-2])
            reporter.advance(step)
            profile.after(step, metrics)

            is_last = step == config.num_steps
            is_stopping = _all_are_stopping(stop_requested, step)
            is_saved = is_last or is_stopping or checkpointer.is_due(step)
            is_evaluated = _is_evaluated(step, config)
            if step % config.log_every == 0 or is_saved:
                means = _means(interval)
                if not math.isfinite(means["loss"]):
                    raise DivergedError(
                        f"the loss is {means['loss']} in the steps up to {step}. The newest "
                        f"checkpoint is of step {checkpointer.latest_step}. A lower "
                        f"optimizer.peak_learning_rate or optimizer.clip_norm=1.0 may help."
                    )
                if step % config.log_every == 0 or is_last:
                    seconds, spent = stopwatch.read()
                    seconds -= spent["evaluation"] + spent["checkpoint"]
                    batch_size = jax.tree.leaves(batch)[0].shape[0]
                    unit = program.task.unit
                    rates = _rates(interval, unit, batch_size, seconds, spent["input"])
                    reporter.train_metrics(step, means | rates, _news(program.task, means, rates))
                    interval = []
            if is_saved:
                with stopwatch.during("checkpoint"):
                    checkpointer.save(state, data_iterator)
            if is_stopping and not is_last:
                raise TrainingInterruptedError(
                    f"stopped at step {step} of {config.num_steps}; the same command continues"
                )
            if is_evaluated:
                with stopwatch.during("evaluation"):
                    _evaluate(evaluators, program.task, state, reporter, step, watch)
                if watch and watch.is_over and not is_last:
                    checkpointer.save(state, data_iterator)
                    reporter.say(
                        f"stopping at step {step} of {config.num_steps}: in {config.patience} "
                        f"evaluations nothing was better; {watch.summary}"
                    )
                    return state
    if watch and watch.best:
        reporter.say(watch.summary)
    return state


def _evaluate(
    evaluators: Evaluators,
    task: Task,
    state: TrainState,
    reporter: Reporter,
    step: int,
    watch: Watch | None,
) -> None:
    """Evaluates a state, reports it, and has it judged."""
    variables = task.evaluated(state.evaluated_variables)
    figures: dict[str, float] = {}
    for name, evaluate in evaluators.items():
        report = evaluate(variables)
        reporter.evaluation(step, name, report)
        figures |= {f"{name}/{figure}": value for figure, value in report.as_flat_dict().items()}
    if watch:
        watch.see(step, figures, lambda: state.evaluated_variables)


def _all_are_stopping(stop_requested: list[int], step: int) -> bool:
    """True if this or another process got a signal: all must stop after the same step."""
    if jax.process_count() == 1:
        return bool(stop_requested)
    if step % _STEPS_BETWEEN_AGREEMENTS:
        return False
    return bool(np.any(multihost_utils.process_allgather(np.array(bool(stop_requested)))))


def _is_evaluated(step: int, config: TrainConfig) -> bool:
    if config.eval_every == 0:
        return False
    is_due = config.eval_every is not None and step % config.eval_every == 0
    return is_due or step == config.num_steps


def _global_batch(local: Mapping[str, np.ndarray], program: CompiledStep) -> dict[str, jax.Array]:
    """This process's share of the images as part of the arrays over all devices."""
    return {
        name: jax.make_array_from_process_local_data(program.batch_sharding, local[name])
        for name in program.task.batch_spec(1)
    }


def _means(interval: list[dict]) -> dict[str, float]:
    fetched = jax.device_get(interval)
    return {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}


def _rates(
    interval, unit: str, batch_size: int, seconds: float, input_seconds: float
) -> dict[str, float]:
    count = sum(float(m[f"num_{unit}"]) for m in interval)
    return {
        "images_per_second": len(interval) * batch_size / seconds,
        f"{unit}_per_second": count / seconds,
        "seconds_per_step": seconds / len(interval),
        "input_wait_rate": input_seconds / seconds,
    }


def _news(task: Task, means: Mapping[str, float], rates: Mapping[str, float]) -> str:
    """Figures of an interval, as one line."""
    return (
        f"{task.headline(means)}  "
        f"{rates['images_per_second']:.1f} img/s  "
        f"{rates[f'{task.unit}_per_second']:.1f} {task.unit}/s  "
        f"input wait {100 * rates['input_wait_rate']:.0f} %"
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects interrupt and termination signals instead of dying of them; a second one kills."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def receive(number, frame):
        del frame
        received.append(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
