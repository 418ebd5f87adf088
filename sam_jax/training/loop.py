"""The training loop: from a compiled step and a data iterator to checkpoints."""

import contextlib
import dataclasses
import itertools
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

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
from sam_jax.errors import TRY_AGAIN, UserError, end_now, exit_code_of
from sam_jax.hosts import gathered, is_first
from sam_jax.training import diagnosis, manifest
from sam_jax.training.agreement import StopAgreement
from sam_jax.training.best import Watch
from sam_jax.training.checkpoint_copies import CheckpointCopies
from sam_jax.training.compiled_step import CompiledStep
from sam_jax.training.experiment import TrainConfig
from sam_jax.training.report import Profile, Reporter, Stopwatch
from sam_jax.training.skipped_steps import DivergedError, SkippedSteps
from sam_jax.training.state import TrainState
from sam_jax.training.stop_signals import EXIT_CODES, StopSignals, collected_signals
from sam_jax.training.task import Task
from sam_jax.training.watchdog import Watchdog
from sam_jax.weights.files import WeightsError


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
    """An interrupt from the keyboard stopped the run; its state is saved."""

    exit_code = EXIT_CODES[signal.SIGINT]


class PreemptedError(UserError):
    """A termination signal stopped the run; its state is saved, and it may be started again."""

    exit_code = TRY_AGAIN


def train(
    *,
    workdir: str | Path,
    compiled_step: CompiledStep,
    config: TrainConfig,
    batch_size: int,
    data_iterator: Any,
    checkpoint_config: CheckpointConfig,
    evaluators: Evaluators,
    sections: dict[str, Any] | None = None,
    stage: Stage | None = None,
    stop_signals: StopSignals | None = None,
) -> TrainState:
    """Trains all steps, from the newest checkpoint in ``workdir`` if there is one.

    A run that was killed and is started again goes through the same states as one that was not.
    Nothing in ``workdir`` changes before config, data and checkpoint are found to fit.

    Args:
      workdir: for checkpoints and TensorBoard files.
      compiled_step: the step of the task, on its devices.
      config: how long to train, and what to tell.
      batch_size: images of a step, of all processes.
      data_iterator: yields mappings of the fields of the task's batch, this process's share, and
        can save and restore its position.
      checkpoint_config: when to save.
      evaluators: called with the variables at evaluations, by name.
      sections: the config that all of this is from, kept beside the checkpoints; None keeps none.
      stage: makes batches of the task of those that the iterator yields; None where they are.
      stop_signals: those that the program catches from its start on; None in a program of
        somebody else's, whose signals are taken during the steps alone.

    Raises:
      ConfigError: if the batch does not divide by the devices.
      TrainingInterruptedError: after an interrupt, once the state is saved.
      PreemptedError: after a termination signal, once the state is saved.
      DivergedError: if ``config.max_skipped_steps`` in a row had nothing finite to learn from.
      CheckpointError: if there is a checkpoint that does not fit, or the folder is not a run's.
      BucketError, CopyError: if the run cannot be copied to or from where the config says.
      WeightsError, NamesError: if ``config.init_from`` cannot be read or does not fit.
    """
    compiled_step.check_batch(batch_size)
    checkpointer = Checkpointer(workdir, checkpoint_config)
    reporter = Reporter(workdir, config.num_steps, config.wandb)
    copies = CheckpointCopies(workdir, checkpoint_config, reporter.say)
    with contextlib.closing(Watchdog(config.max_stall_seconds)) as watchdog:
        try:
            # Before anybody looks for checkpoints.
            copies.bring_back()
            _check_workdir(Path(workdir), checkpointer, compiled_step.task)
            _introduce(compiled_step, reporter)
            state = None
            if checkpointer.latest_step:
                with watchdog.during("reading a checkpoint", may_work=True):
                    state = _restored_state(compiled_step, checkpointer, data_iterator, reporter)
            done = 0 if state is None else int(state.step)
            watch = None
            if config.watch is not None and config.eval_every != 0:
                watch = Watch(workdir, config.watch, config.patience, done, sections)
                watch.check_names(evaluators)
            if state is not None:
                if _is_evaluated(done, config) and _lacks(done, evaluators, reporter, watch):
                    reporter.begin(done, sections)
                    with watchdog.during("evaluating", may_work=True):
                        _evaluate(evaluators, compiled_step.task, state, reporter, watch)
                # It may have been stopped before it was copied.
                copies.request(done)
                if end := _end_before(done, config, watch):
                    reporter.say(f"nothing is left to do: {end}")
                    return state
            # Data that cannot be read are found out here.
            with watchdog.during("waiting for data", may_work=True):
                batches = itertools.chain([next(data_iterator)], data_iterator)
            if state is None:
                state = _new_state(compiled_step, config, reporter)
            _begin(compiled_step, checkpointer, reporter, done, sections, data_iterator)
            if not done and _is_evaluated(0, config):
                with watchdog.during("evaluating", may_work=True):
                    _evaluate(evaluators, compiled_step.task, state, reporter, watch)
            if stage is not None:
                batches = stage(batches, state.variables, reporter.say)
            if not done:
                reporter.say("the first step is compiled now, which can take minutes")
            given = contextlib.nullcontext(stop_signals) if stop_signals else collected_signals()
            with given as signals:
                run = _Run(
                    compiled_step=compiled_step,
                    config=config,
                    batch_size=batch_size,
                    data_iterator=data_iterator,
                    checkpointer=checkpointer,
                    copies=copies,
                    reporter=reporter,
                    evaluators=evaluators,
                    watch=watch,
                    watchdog=watchdog,
                    stop_signals=signals,
                )
                return run.steps(state, batches)
        except Exception as error:
            # The others would wait for this process, and it for them when it ends.
            if jax.process_count() > 1 and not isinstance(error, _OF_ALL_PROCESSES):
                _end_alone(error, workdir)
            raise
        finally:
            with contextlib.ExitStack() as ends:
                # Which bounds its wait itself, and comes when the files are closed.
                ends.callback(copies.close)
                ends.enter_context(watchdog.during("writing the last of a checkpoint"))
                ends.callback(checkpointer.close)
                ends.callback(reporter.close)


def _end_before(done: int, config: TrainConfig, watch: Watch | None) -> str:
    """Reason why a run of so many steps does not go on; empty if it does."""
    if watch and watch.is_over:
        return (
            f"the run was over at step {done}, as {watch.summary}; a larger train.patience goes on "
            "from here"
        )
    if done >= config.num_steps:
        return (
            f"step {done} of {config.num_steps} is done; a larger train.num_steps goes on from it, "
            "and eval.py evaluates it"
        )
    return ""


# What ends all processes of a run after the same step.
_OF_ALL_PROCESSES = (TrainingInterruptedError, PreemptedError, DivergedError)


def _end_alone(error: Exception, workdir: str | Path) -> None:
    """Ends this process of several at an error of its own."""
    process = f"process {jax.process_index()} of {jax.process_count()}"
    again = (
        f"The same command, for any number of processes, continues from the newest checkpoint in "
        f"{workdir}."
    )
    if isinstance(error, jax.errors.JaxRuntimeError):
        reason = str(error).strip().splitlines()[0][:300]
        end_now(
            f"{process} cannot go on, most likely as another one ended: {reason}\n{again}",
            TRY_AGAIN,
        )
    if not isinstance(error, UserError | OSError):
        traceback.print_exception(error)
    end_now(f"{process} ends, and so will the others: {error}\n{again}", exit_code_of(error))


def _check_workdir(workdir: Path, checkpointer: Checkpointer, task: Task) -> None:
    """Refuses a folder that is something else than a run of this model.

    Shapes of arrays do not tell all of a model: its config does.
    """
    if checkpointer.holds_weights_alone:
        raise CheckpointError(
            f"{workdir} holds weights without a state of training, as sam-jax convert writes them "
            "and a run keeps its best; give another --workdir, and "
            f"train.init_from={workdir} to start from them"
        )
    latest_step = checkpointer.latest_step
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


def _introduce(compiled_step: CompiledStep, reporter: Reporter) -> None:
    """Says what runs where."""
    mesh = compiled_step.mesh
    reporter.say(
        f"{_num_parameters(compiled_step)} on "
        f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s) of {jax.process_count()} "
        f"process(es), {' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}"
    )
    for check in compiled_step.parallel.check_kernels():
        reporter.say(str(check))


def _num_parameters(compiled_step: CompiledStep) -> str:
    total, trained = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (compiled_step.state_shapes.params, compiled_step.trained)
    )
    if trained == total:
        return f"{total / 1e6:.1f} M parameters"
    return f"{trained / 1e6:.2f} M of {total / 1e6:.1f} M parameters are trained ({trained:,})"


def _restored_state(compiled_step, checkpointer, data_iterator, reporter) -> TrainState:
    """The newest checkpoint's state; the data are moved to their place."""
    state = checkpointer.restore(compiled_step.placed_state, data_iterator)
    for step, fault in checkpointer.damaged:
        reporter.say(f"the checkpoint of step {step} is damaged: {fault}")
    reporter.say(
        f"continuing from the checkpoint of step {checkpointer.latest_step} in {reporter.workdir}"
    )
    if checkpointer.latest_has_ema and not compiled_step.keeps_ema:
        reporter.say("its averaged parameters are dropped, as train.ema_decay is 0")
    if compiled_step.keeps_ema and not checkpointer.latest_has_ema:
        reporter.say("it has no averaged parameters: the average starts from its parameters")
    return state


def _new_state(compiled_step: CompiledStep, config: TrainConfig, reporter: Reporter) -> TrainState:
    """The state before the first step, from random or from other weights."""
    key = jax.random.key(config.seed)
    if config.init_from is None:
        return compiled_step.new_state(key)
    state = compiled_step.state_from(compiled_step.task.load(config.init_from, key))
    reporter.say(f"starting from the weights in {config.init_from}")
    return state


def _begin(compiled_step, checkpointer, reporter, first_step: int, sections, data_iterator) -> None:
    """Makes what a run keeps in its folder; all that is needed for its steps is there."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all processes have what they need")
    for (step, _), folder in zip(checkpointer.damaged, checkpointer.begin(), strict=True):
        reporter.say(f"the damaged checkpoint of step {step} is now {folder}")
    reporter.begin(first_step, sections)
    manifest.write_data(reporter.workdir, data_iterator)
    if not is_first():
        return
    if sections is not None:
        changes = config_changes(reporter.workdir, sections)
        kept = save_config(reporter.workdir, sections, done_steps=first_step)
        if kept is not None:
            what = "; ".join(changes or ["it could not be read"])
            reporter.say(f"the config is another now: {what}; the one before is kept in {kept}")
    manifest.write_start(reporter.workdir, compiled_step, first_step)
    manifest.write_parameters(reporter.workdir, compiled_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """The steps of a run, and what is done between them."""

    compiled_step: CompiledStep
    config: TrainConfig
    batch_size: int
    data_iterator: Any
    checkpointer: Checkpointer
    copies: CheckpointCopies
    reporter: Reporter
    evaluators: Evaluators
    watch: Watch | None
    watchdog: Watchdog
    stop_signals: StopSignals

    def steps(self, state: TrainState, batches: Iterator[Mapping[str, Any]]) -> TrainState:
        """All steps that are left."""
        compiled_step, config = self.compiled_step, self.config
        reporter, watchdog = self.reporter, self.watchdog
        stopwatch, interval = Stopwatch(), []
        profile = Profile(config.profile_steps, reporter)
        skipped = SkippedSteps(reporter.workdir, config.max_skipped_steps, reporter.say)
        first_step = int(state.step)
        agreement = StopAgreement(first_step)

        def diagnose(*what: Any) -> list[str]:
            with watchdog.during("finding out what is not finite", may_work=True):
                return diagnosis.diagnose(compiled_step, state, *what)

        with contextlib.closing(profile):
            for step in range(first_step + 1, config.num_steps + 1):
                profile.before(step)
                with stopwatch.during("input"), watchdog.during("waiting for data", may_work=True):
                    local = next(batches)
                batch = compiled_step.global_batch(local)
                with watchdog.during("compiling the step", may_work=True):
                    state, metrics = compiled_step.step(state, batch)
                # From here on there is something to save.
                self.stop_signals.collect()
                is_last = step == config.num_steps
                is_evaluated = bool(self.evaluators) and _is_evaluated(step, config)
                # What is evaluated is saved first: an evaluation may take as long as many steps,
                # and one that is cut short is made when the run continues.
                is_due = is_last or is_evaluated or self.checkpointer.is_due(step)
                interval.append(metrics)
                with watchdog.during(f"computing step {step}"):
                    if len(interval) > 1:
                        # One step is computed while the next one's data are fetched, and no more
                        # are queued: the clock, the bar and the reaction to a signal stay honest.
                        jax.block_until_ready(interval[-2])
                    skipped.watch(step, metrics, local, diagnose)
                    reporter.advance(step)
                    profile.after(step, metrics)
                    stop_signal = agreement.agreed(step, self.stop_signals.received, is_due=is_due)

                is_saved = is_due or stop_signal
                is_logged = is_last or step % config.log_every == 0
                if is_logged or is_saved:
                    with watchdog.during(f"computing step {step}"):
                        skipped.finish(diagnose)
                if is_logged:
                    self._report(step, interval, stopwatch)
                    interval = []
                if is_saved:
                    with stopwatch.during("checkpoint"), watchdog.during("saving a checkpoint"):
                        # A run that goes on from there does not make these numbers again.
                        reporter.flush()
                        manifest.write_data(reporter.workdir, self.data_iterator)
                        self.checkpointer.save(state, self.data_iterator)
                        self.copies.request(step)
                if stop_signal and (is_evaluated or not is_last):
                    self._stop(stop_signal, step)
                if is_evaluated:
                    with stopwatch.during("evaluation"):
                        self._evaluate(state)
                    if self.watch and self.watch.is_over and not is_last:
                        reporter.say(
                            f"stopping at step {step} of {config.num_steps}: in {config.patience} "
                            f"evaluations nothing was better; {self.watch.summary}"
                        )
                        return state
        if self.watch and self.watch.best:
            reporter.say(self.watch.summary)
        return state

    def _report(self, step: int, interval: list[dict], stopwatch: Stopwatch) -> None:
        """Reports the figures of an interval, of the steps that were not skipped."""
        seconds, spent = stopwatch.read()
        seconds -= spent["evaluation"] + spent["checkpoint"]
        fetched = jax.device_get(interval)
        task = self.compiled_step.task
        rates = _rates(fetched, task.unit, self.batch_size, seconds, spent["input"])
        good = [metrics for metrics in fetched if not metrics["skipped"]]
        num_skipped = len(fetched) - len(good)
        means = {
            name: float(np.mean([metrics[name] for metrics in good]))
            for name in (good[0] if good else ())
            if name != "skipped"
        }
        news = _news(task, means, rates, num_skipped)
        self.reporter.train_metrics(step, means | rates | {"skipped_steps": num_skipped}, news)

    def _evaluate(self, state: TrainState) -> None:
        """Evaluates a state that is saved, or is being saved, which is what a signal waits for."""
        where = f"in the evaluation of step {int(state.step)}, which is saved"
        with (
            self.watchdog.during("evaluating", may_work=True),
            self.stop_signals.at_once(where, self._finish),
        ):
            _evaluate(self.evaluators, self.compiled_step.task, state, self.reporter, self.watch)

    def _finish(self) -> None:
        """Waits for the checkpoint that is being saved, and for its copy."""
        self.checkpointer.wait()
        self.copies.wait()

    def _stop(self, stop_signal: int, step: int) -> NoReturn:
        """Ends the run; its checkpoint is written before the program ends."""
        kind = TrainingInterruptedError if stop_signal == signal.SIGINT else PreemptedError
        raise kind(
            f"stopped at step {step} of {self.config.num_steps} by "
            f"{signal.Signals(stop_signal).name}; the same command continues"
        )


def _evaluate(
    evaluators: Evaluators,
    task: Task,
    state: TrainState,
    reporter: Reporter,
    watch: Watch | None,
) -> None:
    """Evaluates a state, reports it, and has it judged."""
    step, variables = int(state.step), task.evaluated(state.evaluated_variables)
    figures: dict[str, float] = {}
    for name, evaluate in evaluators.items():
        report = evaluate(variables)
        reporter.evaluation(step, name, report)
        figures |= {f"{name}/{figure}": value for figure, value in report.as_flat_dict().items()}
    if watch:
        watch.see(step, figures, lambda: state.evaluated_variables)


def _lacks(done: int, evaluators: Evaluators, reporter: Reporter, watch: Watch | None) -> bool:
    """True if evaluations of a step are missing, as the run was stopped before they were made."""
    is_missing = not reporter.has_evaluated(done, evaluators)
    # All processes do what the first has seen.
    return bool(gathered(is_missing or (watch is not None and watch.lacks(done)))[0])


def _is_evaluated(step: int, config: TrainConfig) -> bool:
    if config.eval_every == 0:
        return False
    if step == 0:
        return config.eval_before
    is_due = config.eval_every is not None and step % config.eval_every == 0
    return is_due or step == config.num_steps


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


def _news(
    task: Task, means: Mapping[str, float], rates: Mapping[str, float], num_skipped: int
) -> str:
    """Figures of an interval, as one line."""
    return (
        (f"{task.headline(means)}  " if means else "")
        + (f"{num_skipped} steps skipped  " if num_skipped else "")
        + f"{rates['images_per_second']:.1f} img/s  "
        f"{rates[f'{task.unit}_per_second']:.1f} {task.unit}/s  "
        f"input wait {100 * rates['input_wait_rate']:.0f} %"
    )
