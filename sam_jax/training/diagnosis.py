"""Diagnosis of a step whose loss or gradient is not finite: which parameters, parts, samples."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_jax.sharding import path_name, replicated
from sam_jax.training.compiled_step import CompiledStep
from sam_jax.training.state import TrainState
from sam_jax.training.step import build_gradients, part_key, parts_of, step_key
from sam_jax.training.task import ItemizedTask

_MOST_LINES = 8


def diagnose(
    compiled_step: CompiledStep,
    state: TrainState,
    step: int,
    batch: Mapping[str, np.ndarray],
    samples: Sequence[str],
) -> list[str]:
    """Reasons why a step was skipped, a line each: what is not finite, the cause first.

    The step is computed again, with the same random choices, by programs that are compiled for it.
    All processes must call this.

    Args:
      compiled_step: of the run.
      state: its parameters are still those that the step began with.
      step: its number, from 1.
      batch: its images, this process's share.
      samples: their names, of all processes.
    """
    key = step_key(compiled_step.seed, step - 1)
    fields = compiled_step.global_batch(batch)
    for find in (_in_parameters, _in_losses, _in_gradients):
        lines = find(compiled_step, state, fields, key, samples)
        if len(lines) > _MOST_LINES + 1:
            lines[_MOST_LINES:] = [f"  and {len(lines) - _MOST_LINES} more"]
        if lines:
            return lines
    return ["computed again, all of it is finite: the devices do not compute the same twice"]


def _in_parameters(compiled_step, state, fields, key, samples) -> list[str]:
    del fields, key, samples
    count_bad = jax.jit(_count_bad, out_shardings=replicated(compiled_step.mesh))
    lines = list(_counted(compiled_step.state_shapes.params, count_bad(state.params)))
    return ["parameters are not finite before the step:", *lines] if lines else []


def _in_losses(compiled_step, state, fields, key, samples) -> list[str]:
    if not isinstance(compiled_step.task, ItemizedTask):
        return []
    num_parts = compiled_step.accumulate_steps
    loss_parts = compiled_step.task.loss_parts(compiled_step.parallel, compiled_step.param_specs)

    def bad_losses(params: Any, constants: Any, batch: Any, index: Any) -> Any:
        part = jax.tree.map(lambda x: x[index], parts_of(batch, num_parts))
        losses = loss_parts(params, constants, part, part_key(key, index, num_parts))
        return jax.tree.map(lambda x: ~jnp.isfinite(x), losses)

    compiled = jax.jit(bad_losses, out_shardings=replicated(compiled_step.mesh))
    found = [
        jax.device_get(compiled(state.params, state.constants, fields, index))
        for index in range(num_parts)
    ]
    # Image n of part i is image n * num_parts + i of the batch.
    bad = {
        name: np.stack([losses[name] for losses in found], axis=2).reshape(
            found[0][name].shape[0], -1, found[0][name].shape[2]
        )
        for name in found[0]
    }
    is_bad = np.any([part.any(axis=(0, 2)) for part in bad.values()], axis=0)
    if not is_bad.any():
        return []
    num_rounds = next(iter(bad.values())).shape[0]
    rounds = f" ({num_rounds} rounds)" if num_rounds > 1 else ""
    lines = [f"the loss of {int(is_bad.sum())} of {len(is_bad)} images is not finite{rounds}:"]
    for image in np.flatnonzero(is_bad):
        parts = []
        for name, part in bad.items():
            in_rounds = np.asarray(part[:, image].any(axis=1))
            if in_rounds.any():
                where = f" in round {_numbers(in_rounds)}" if num_rounds > 1 else ""
                parts.append(f"{name}{where}")
        lines.append(f"  {samples[image]}: {', '.join(parts)}")
    return lines


def _in_gradients(compiled_step, state, fields, key, samples) -> list[str]:
    del samples
    gradients = build_gradients(
        compiled_step.task,
        parallel=compiled_step.parallel,
        param_specs=compiled_step.param_specs,
        accumulate_steps=compiled_step.accumulate_steps,
        trained=compiled_step.trained,
    )

    def bad_gradients(params: Any, constants: Any, batch: Any) -> tuple[Any, Any, Any]:
        grads, sums, _ = gradients(params, constants, batch, key)
        is_finite = jnp.isfinite(jnp.stack([sums["loss"], optax.tree.norm(grads)]))
        return _count_bad(grads), *is_finite

    compiled = jax.jit(bad_gradients, out_shardings=replicated(compiled_step.mesh))
    counts, *is_finite = compiled(state.params, state.constants, fields)
    loss_is_finite, norm_is_finite = map(bool, is_finite)
    lines = list(_counted(compiled_step.trained, counts))
    if not loss_is_finite:
        parts = (
            "though each part of it is"
            if isinstance(compiled_step.task, ItemizedTask)
            else "and this task does not tell of which samples"
        )
        gradient = "nor is its gradient, by" if lines else "its gradient is"
        return [f"the loss is not finite, {parts}; {gradient}", *lines]
    if lines:
        return ["the loss is finite, and its gradient is not, by", *lines]
    if norm_is_finite:
        return []
    return ["the loss and each gradient are finite; the gradients' norm overflows float32"]


def _count_bad(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.sum(~jnp.isfinite(leaf)), tree)


def _counted(shapes: Any, counts: Any) -> Iterator[str]:
    """A line for each array that has something that is not finite."""
    leaves = jax.tree.leaves(shapes)
    named = jax.tree.leaves_with_path(jax.device_get(counts))
    for (path, count), leaf in zip(named, leaves, strict=True):
        if count:
            yield f"  {path_name(path)}: {int(count):,} of {leaf.size:,} values"


def _numbers(flags: np.ndarray) -> str:
    """Numbers from 1 of what is true, as in "1 to 3, 5"."""
    numbers = np.flatnonzero(flags) + 1
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
