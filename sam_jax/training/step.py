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
from sam_jax.training.task import Fields, Sums, Task

StepMetrics = dict[str, Float[Array, "..."]]
# (parameters, constants, batch, key) -> (gradients, reported sums, what they are sums over).
Gradients = Callable[[Any, Any, Fields, Array], tuple[Any, Sums, Float[Array, ""]]]
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

    Where the loss or the gradient's norm is not finite, the step is skipped: only the state's
    count of steps moves on, and the metric ``skipped`` is 1 instead of 0. The choice is made on
    the device.

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
    gradients = build_gradients(
        task,
        parallel=parallel,
        param_specs=param_specs,
        accumulate_steps=accumulate_steps,
        trained=trained,
    )

    def train_step(state: TrainState, batch: Fields) -> tuple[TrainState, StepMetrics]:
        key = step_key(seed, state.step)
        grads, sums, count = gradients(state.params, state.constants, batch, key)
        gradient_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(gradient_norm)
        old = part_at(state.params, trained)

        def if_finite(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)

        updates, opt_state = optimizer.update(grads, state.opt_state, old)
        new = optax.apply_updates(old, updates)
        ema_params = state.ema_params
        if ema_decay:
            ema_params = optax.incremental_update(new, ema_params, 1.0 - ema_decay)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=with_part(state.params, if_finite(new, old)),
            opt_state=if_finite(opt_state, state.opt_state),
            ema_params=if_finite(ema_params, state.ema_params),
        )
        metrics = {name: total / count for name, total in sums.items()}
        metrics[f"num_{task.unit}"] = count
        metrics["gradient_norm"] = gradient_norm
        metrics["update_norm"] = optax.tree.norm(updates)
        metrics["skipped"] = 1.0 - is_finite.astype(jnp.float32)
        return new_state, metrics

    return train_step


def step_key(seed: int, step: Array | int) -> Array:
    """The random key of the step that follows so many others."""
    return jax.random.fold_in(jax.random.key(seed), step)


def build_gradients(
    task: Task,
    *,
    parallel: Parallel,
    param_specs: Any | None = None,
    accumulate_steps: int = 1,
    trained: Any = None,
) -> Gradients:
    """The gradients of a batch's mean loss as a pure function; arguments as for the step."""
    loss_sums = task.loss_sums(parallel, param_specs)
    num_shares = parallel.num_batch

    def gradients(params: Any, constants: Any, batch: Fields, key: Array):
        share = jax.tree.leaves(batch)[0].shape[0] // num_shares
        if share % accumulate_steps:
            raise ConfigError(
                f"optimizer.accumulate_steps = {accumulate_steps} does not divide each device's "
                f"share of the batch, which is {share} images"
            )
        # Means are taken over the whole batch, not over a device's or a part's share of it.
        count = task.count(batch)

        def part_gradients(part: Fields, key: Array):
            def mean_loss(trained_params):
                whole = with_part(params, trained_params)
                loss, sums = loss_sums(whole, constants, part, key)
                return loss / count, sums

            return jax.grad(mean_loss, has_aux=True)(part_at(params, trained))

        if accumulate_steps == 1:
            grads, sums = part_gradients(batch, key)
        else:
            grads, sums = _accumulate(part_gradients, batch, key, accumulate_steps)
        return grads, sums, count

    return gradients


def _accumulate(part_gradients, batch: Fields, key: Array, num_parts: int):
    """Gradients and sums of a batch, computed in parts one after the other.

    Part i holds every ``num_parts``-th image from i on, so that with the batch sharded in blocks
    each device cuts its own block and nothing moves between devices.
    """
    parts = parts_of(batch, num_parts)

    def add_part(total, indexed_part):
        index, part = indexed_part
        found = part_gradients(part, part_key(key, index, num_parts))
        return jax.tree.map(jnp.add, total, found), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(part_gradients, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add_part, zeros, (jnp.arange(num_parts), parts))[0]


def parts_of(batch: Fields, num_parts: int) -> dict[str, Array]:
    """The parts in which a batch is computed, on a new first axis; each has every n-th image."""
    return jax.tree.map(
        lambda x: rearrange(x, "(n parts) ... -> parts n ...", parts=num_parts), dict(batch)
    )


def part_key(key: Array, index: Array | int, num_parts: int) -> Array:
    """The random key of a part of a step."""
    return key if num_parts == 1 else jax.random.fold_in(key, index)
