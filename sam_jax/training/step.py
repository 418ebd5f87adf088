"""One training step of any task: gradients of its loss, then an update."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from sam_jax.arrays import Array, Float
from sam_jax.errors import ConfigError
from sam_jax.parallel import Parallel
from sam_jax.trained_parameters import part_at, with_part
from sam_jax.training.state import TrainState
from sam_jax.training.task import Fields, Task

StepMetrics = dict[str, Float[Array, "..."]]
TrainStep = Callable[[TrainState, Fields], tuple[TrainState, StepMetrics]]


def build_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    parallel: Parallel = Parallel(),  # noqa: B008 - frozen
    param_specs: Any | None = None,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
    trained: Any = None,
) -> TrainStep:
    """The step as a pure function, to be jitted with shardings by the caller.

    Every random choice follows from ``seed`` and the state's step, so a step computed again gives
    the same result.

    Args:
      task: what is trained.
      optimizer: made for its trained parameters.
      seed: of whatever the task draws.
      parallel: the devices.
      param_specs: how they store the parameters; None for whole ones.
      accumulate_steps: parts into which the batch is cut; must divide every device's share.
      ema_decay: see ``experiment.TrainConfig``; the state must keep an average if it is not 0.
      trained: a tree with the paths of trained parameters; None for all. The others are no
        variables of the gradient, so nothing is differentiated that only they are part of.
    """
    loss_sums = task.loss_sums(parallel, param_specs)
    num_shares = parallel.num_batch

    def train_step(state: TrainState, batch: Fields) -> tuple[TrainState, StepMetrics]:
        share = jax.tree.leaves(batch)[0].shape[0] // num_shares
        if share % accumulate_steps:
            raise ConfigError(
                f"optimizer.accumulate_steps = {accumulate_steps} does not divide each device's "
                f"share of the batch, which is {share} images"
            )
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        # Means are taken over the whole batch, not over a device's or a part's share of it.
        count = task.count(batch)
        trained_params = part_at(state.params, trained)

        def part_gradients(part: Fields, key: Array):
            def mean_loss(trained_params):
                params = with_part(state.params, trained_params)
                loss, sums = loss_sums(params, state.constants, part, key)
                return loss / count, sums

            return jax.grad(mean_loss, has_aux=True)(trained_params)

        if accumulate_steps == 1:
            grads, sums = part_gradients(batch, key)
        else:
            grads, sums = _accumulate(part_gradients, batch, key, accumulate_steps)

        updates, opt_state = optimizer.update(grads, state.opt_state, trained_params)
        trained_params = optax.apply_updates(trained_params, updates)
        ema_params = state.ema_params
        if ema_decay:
            ema_params = optax.incremental_update(trained_params, ema_params, 1.0 - ema_decay)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=with_part(state.params, trained_params),
            opt_state=opt_state,
            ema_params=ema_params,
        )
        metrics = {name: total / count for name, total in sums.items()}
        metrics[f"num_{task.unit}"] = count
        metrics["gradient_norm"] = optax.tree.norm(grads)
        metrics["update_norm"] = optax.tree.norm(updates)
        return new_state, metrics

    return train_step


def _accumulate(part_gradients, batch: Fields, key: Array, num_parts: int):
    """Gradients and sums of a batch, computed in parts one after the other.

    Part i holds every ``num_parts``-th image from i on, so that with the batch sharded in blocks
    each device cuts its own block and nothing moves between devices.
    """
    parts = jax.tree.map(
        lambda x: rearrange(x, "(n parts) ... -> parts n ...", parts=num_parts), dict(batch)
    )

    def add_part(total, indexed_part):
        index, part = indexed_part
        return jax.tree.map(
            jnp.add, total, part_gradients(part, jax.random.fold_in(key, index))
        ), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(part_gradients, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add_part, zeros, (jnp.arange(num_parts), parts))[0]
