"""The training loop: from a model and a data iterator to checkpoints."""

import dataclasses
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from sam_jax.checkpoint import CheckpointConfig, Checkpointer
from sam_jax.convert.checkpoints import variables_for
from sam_jax.errors import UserError
from sam_jax.losses import LossConfig
from sam_jax.models.sam import Sam, init_variables
from sam_jax.prompts import PromptConfig
from sam_jax.sharding import (
    ShardingConfig,
    batch_sharding,
    make_mesh,
    replicated,
    tree_shardings,
)
from sam_jax.training.optimizer import OptimizerConfig, build_optimizer
from sam_jax.training.report import Reporter, Stopwatch
from sam_jax.training.state import TrainState, init_state
from sam_jax.training.step import Batch, build_train_step


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train and what to tell.

    Attributes:
      num_steps: optimizer steps of the whole run.
      init_from: weights that a new run starts from, of any form that ``convert.checkpoints.load``
        takes: another run, a published or Hugging Face checkpoint, a masked autoencoder; None for
        random ones.
      seed: of the parameters, prompts, dropout; the data have a seed of their own.
      remat_rounds: whether rounds of prompting are computed again in the backward pass, see
        ``rounds.run_rounds``.
      log_every: steps between reports.
      eval_every: steps between evaluations; None evaluates at the end only, 0 never.
    """

    num_steps: int
    init_from: str | None = None
    seed: int = 0
    remat_rounds: bool = True
    log_every: int = 50
    eval_every: int | None = None


class EvalReport(Protocol):
    """What an evaluator answers."""

    @property
    def pictures(self) -> Mapping[str, np.ndarray]:
        """RGB pictures by name."""
        ...

    def as_flat_dict(self) -> dict[str, float]:
        """Numbers by name."""
        ...


Evaluators = Mapping[str, Callable[[dict], EvalReport]]


class TrainingInterruptedError(UserError):
    """A signal asked the run to stop; its state is saved."""

    exit_code = 130


class DivergedError(UserError):
    """The loss is not finite any more; the last checkpoint is from before."""


def train(
    *,
    workdir: str | Path,
    model: Sam,
    data_iterator: Any,
    config: TrainConfig,
    optimizer_config: OptimizerConfig,
    prompt_config: PromptConfig,
    loss_config: LossConfig,
    sharding_config: ShardingConfig,
    checkpoint_config: CheckpointConfig,
    evaluators: Evaluators,
) -> TrainState:
    """Trains until ``config.num_steps``, from the newest checkpoint in ``workdir`` if there is one.

    A run that was killed and is started again goes through the same states as one that was not.

    Args:
      workdir: for checkpoints and TensorBoard files.
      model: the model.
      data_iterator: yields mappings of the fields of ``Batch``, this process's share, and can
        save and restore its position.
      config: how long.
      optimizer_config, prompt_config, loss_config: the recipe.
      sharding_config: devices and rules.
      checkpoint_config: when to save.
      evaluators: called with the variables at evaluations, by name.

    Raises:
      TrainingInterruptedError: after an interrupt or a termination signal, once the state is saved.
      DivergedError: if the loss is not finite.
      CheckpointError: if there is a checkpoint that does not fit.
      WeightsError, NamesError: if ``config.init_from`` cannot be read or does not fit.
    """
    mesh = make_mesh(sharding_config)
    shapes = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    optimizer = build_optimizer(shapes["params"], optimizer_config, config.num_steps)

    def new_state(key):
        return init_state(init_variables(model, key), optimizer)

    state_shapes = jax.eval_shape(new_state, jax.random.key(0))
    shardings = tree_shardings(state_shapes, mesh, sharding_config)
    train_step = jax.jit(
        build_train_step(
            model,
            optimizer,
            prompt_config,
            loss_config,
            seed=config.seed,
            accumulate_steps=optimizer_config.accumulate_steps,
            remat_rounds=config.remat_rounds,
        ),
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )

    checkpointer = Checkpointer(workdir, checkpoint_config)
    first_step = checkpointer.latest_step or 0
    reporter = Reporter(workdir, first_step, config.num_steps)
    try:
        num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        reporter.say(
            f"{num_params / 1e6:.1f} M parameters on {mesh.size} {jax.devices()[0].device_kind} "
            f"device(s), data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}"
        )
        if first_step:
            state = checkpointer.restore(_with_shardings(state_shapes, shardings), data_iterator)
            reporter.say(f"continuing from the checkpoint of step {first_step} in {workdir}")
        else:
            key = jax.random.key(config.seed)
            if config.init_from is None:
                state = jax.jit(new_state, out_shardings=shardings)(key)
            else:
                weights = variables_for(model, config.init_from, key=key)
                started = jax.jit(lambda v: init_state(v, optimizer), out_shardings=shardings)
                state = started(weights)
                reporter.say(f"starting from the weights in {config.init_from}")
            reporter.say("the first step is compiled now, which can take minutes")
        return _run(
            state, train_step, data_iterator, mesh, config, checkpointer, reporter, evaluators
        )
    finally:
        reporter.close()
        checkpointer.close()


def _run(state, train_step, data_iterator, mesh, config, checkpointer, reporter, evaluators):
    stopwatch, interval = Stopwatch(), []
    first_step = int(state.step)
    with _stop_signals() as stop_requested:
        for step in range(first_step + 1, config.num_steps + 1):
            with stopwatch.during("input"):
                batch = _global_batch(next(data_iterator), mesh)
            state, metrics = train_step(state, batch)
            interval.append(metrics)
            if len(interval) > 1:
                # One step is computed while the next one's data are fetched, and no more are
                # queued: the clock, the bar and the reaction to a signal stay honest.
                jax.block_until_ready(interval[-2])
            reporter.advance(step)

            is_last = step == config.num_steps
            is_stopping = bool(stop_requested)
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
                    means |= _rates(interval, batch, seconds, spent["input"])
                    reporter.train_metrics(step, means)
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
                    for name, evaluate in evaluators.items():
                        reporter.evaluation(step, name, evaluate(state.variables))
    return state


def _is_evaluated(step: int, config: TrainConfig) -> bool:
    if config.eval_every == 0:
        return False
    is_due = config.eval_every is not None and step % config.eval_every == 0
    return is_due or step == config.num_steps


def _global_batch(local: Mapping[str, np.ndarray], mesh) -> Batch:
    """This process's share of the images as part of the arrays over all devices."""
    sharding = batch_sharding(mesh)
    fields = {field.name: local[field.name] for field in dataclasses.fields(Batch)}
    return Batch(
        **{
            name: jax.make_array_from_process_local_data(sharding, array)
            for name, array in fields.items()
        }
    )


def _means(interval: list[dict]) -> dict[str, float]:
    fetched = jax.device_get(interval)
    return {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}


def _rates(interval, batch: Batch, seconds: float, input_seconds: float) -> dict[str, float]:
    num_masks = sum(float(m["num_masks"]) for m in interval)
    return {
        "images_per_second": len(interval) * batch.image.shape[0] / seconds,
        "masks_per_second": num_masks / seconds,
        "seconds_per_step": seconds / len(interval),
        "input_wait_rate": input_seconds / seconds,
    }


def _with_shardings(shapes, shardings):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
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
