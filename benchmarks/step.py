"""A config's whole training step against the devices' fastest matrix products.

python -m benchmarks.step --config configs/demo.py [--fresh-batches] [--synthetic] [--parts]
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import experiment, limits, report
from benchmarks.timing import compile_for, time_compiled
from sam_jax import flop_counts
from sam_jax.data import train_iterator
from sam_jax.errors import ConfigError
from sam_jax.hosts import HostsConfig, start_devices
from sam_jax.models.sam import PROMPTED_PARTS, Sam
from sam_jax.ops.images import normalize_images
from sam_jax.training.compiled_step import CompiledStep
from sam_jax.training.experiment import Experiment
from sam_jax.training.state import TrainState
from sam_jax.training.tasks.segment import Batch, SegmentTask, build_rounds


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Times the step, on one batch again and again or on fresh ones, and reports it."""
    args = parse(argv)
    run = experiment.load(args)
    start_devices(HostsConfig(), run.sharding.cpu_devices)
    program, task = run.compiled_step(), run.task
    if not isinstance(task, SegmentTask):
        raise ConfigError(
            f"{args.config} pre-trains, expected a config of promptable training, whose rounds are "
            "timed here"
        )
    iterator = train_iterator(run.data)
    batch = _on_devices(next(iterator), program)
    state = program.new_state(jax.random.key(run.train.seed))
    compiled, seconds = compile_for(program.step, state, batch)
    num_masks = []

    def one_step():
        nonlocal state, batch
        if args.fresh_batches:
            batch = _on_devices(next(iterator), program)
        state, metrics = compiled(state, batch)
        num_masks.append(metrics["num_masks"])
        return state, metrics

    timing = time_compiled(compiled, one_step, compile_seconds=seconds, repeats=args.repeats)
    iterator.close()

    # The count of objects matters for what was useful, and their slots for what was computed.
    per_image = float(np.mean(num_masks)) / run.data.batch_size
    count = (task.model.config, task.prompts, run.data.batch_size)
    flops = flop_counts.step_flops(*count, run.data.max_masks)
    useful = flop_counts.step_flops(*count, per_image, useful=True)
    devices = list(program.mesh.devices.flat)
    limit = limits.matmul_flops_per_second(task.dtype, devices)
    rates = [
        report.Rate("FLOP/s", flops / timing.best, limit),
        report.Rate("FLOP/s without padding", useful / timing.best, limit),
        report.Rate("images/s", run.data.batch_size / timing.best),
        report.Rate("masks/s", run.data.batch_size * per_image / timing.best),
    ]
    facts = {
        "work_flops": flops,
        "useful_flops": useful,
        "num_rounds": task.prompts.num_rounds,
        "sources": experiment.names_of(run.data.sources),
        "fresh_batches": args.fresh_batches,
    }
    if args.parts:
        seconds_of = _time_parts(run, program, state, batch, args.repeats)
        facts |= {f"{part}_seconds": seconds for part, seconds in seconds_of.items()}
        facts["step_over_parts"] = timing.best / sum(seconds_of.values())
    return report.publish("step", argv, args, timing, rates, num_devices=len(devices), facts=facts)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the benchmark."""
    parser = report.parser("step", __doc__)
    experiment.add_options(parser)
    parser.add_argument(
        "--fresh-batches", action="store_true", help="read a batch for each step, as in training"
    )
    parser.add_argument(
        "--parts", action="store_true", help="time encoder, rounds and update by themselves as well"
    )
    return parser.parse_args(argv)


def _time_parts(
    run: Experiment,
    program: CompiledStep,
    state: TrainState,
    batch: dict[str, jax.Array],
    repeats: int,
) -> dict[str, float]:
    """Best seconds of a step's parts: gradients of the encoder, gradients of the rounds, update."""
    task, params, constants = run.task, state.params, state.constants
    assert isinstance(task, SegmentTask)
    model = task.model
    fields = Batch(**batch)
    images = jax.jit(normalize_images)(fields.image, fields.image_hw)
    rounds = build_rounds(model, task.prompts, task.losses, remat=run.train.remat_rounds)
    keys = jax.random.split(jax.random.key(0), fields.mask_valid.shape)
    key = jax.random.key(1)

    def encode(params):
        scales = model.draw_path_scales(key, len(images))
        return model.apply({"params": params}, images, scales, method=Sam.encode)

    def encoder_gradients(params, cotangents):
        return jax.vjp(encode, params)[1](cotangents)

    def rounds_gradients(params, embeddings):
        def loss(params, embeddings):
            results = rounds(
                params, constants, embeddings, keys, fields.masks_packed, fields.image_hw
            )
            return jnp.sum(results.loss.total)

        return jax.grad(loss, argnums=(0, 1))(params, embeddings)

    def update(grads, opt_state, params):
        updates, opt_state = program.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    embeddings = jax.jit(encode)(params)
    prompted = {part: params[part] for part in PROMPTED_PARTS}
    parts: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "encoder": (encoder_gradients, (params, embeddings)),
        "rounds": (rounds_gradients, (prompted, embeddings)),
        "update": (update, (params, state.opt_state, params)),
    }
    seconds = {}
    for name, (function, arguments) in parts.items():
        compiled, compile_seconds = compile_for(jax.jit(function), *arguments)
        call = functools.partial(compiled, *arguments)
        timing = time_compiled(compiled, call, compile_seconds=compile_seconds, repeats=repeats)
        seconds[name] = timing.best
    return seconds


def _on_devices(local: dict[str, Any], program: CompiledStep) -> dict[str, jax.Array]:
    """The fields of the task's batch."""
    fields = {name: local[name] for name in program.task.batch_spec(1)}
    return jax.device_put(fields, program.batch_sharding)


if __name__ == "__main__":
    main()
