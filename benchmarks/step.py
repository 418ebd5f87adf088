"""A config's whole training step against the devices' fastest matrix products.

python -m benchmarks.step --config configs/demo.py [--fresh-batches] [--synthetic]
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import limits, recipe, report
from benchmarks.timing import compile_for, time_compiled
from sam_jax import work
from sam_jax.data import train_iterator
from sam_jax.hosts import HostsConfig, start_devices
from sam_jax.training.program import TrainProgram
from sam_jax.training.step import Batch


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Times the step, on one batch again and again or on fresh ones, and reports it."""
    args = parse(argv)
    run = recipe.load(args)
    start_devices(HostsConfig(), run.sharding.cpu_devices)
    program = run.program()
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
    count = (run.model.config, run.prompts, run.data.batch_size)
    flops = work.step_flops(*count, run.data.max_masks)
    useful = work.step_flops(*count, per_image, useful=True)
    devices = list(program.mesh.devices.flat)
    limit = limits.matmul_flops_per_second(run.model.dtype, devices)
    rates = [
        report.Rate("FLOP/s", flops / timing.best, limit),
        report.Rate("FLOP/s without padding", useful / timing.best, limit),
        report.Rate("images/s", run.data.batch_size / timing.best),
        report.Rate("masks/s", run.data.batch_size * per_image / timing.best),
    ]
    facts = {
        "work_flops": flops,
        "useful_flops": useful,
        "num_rounds": run.prompts.num_rounds,
        "sources": recipe.names_of(run.data.sources),
        "fresh_batches": args.fresh_batches,
    }
    return report.publish("step", argv, args, timing, rates, num_devices=len(devices), facts=facts)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the benchmark."""
    parser = report.parser("step", __doc__)
    recipe.add_options(parser)
    parser.add_argument(
        "--fresh-batches", action="store_true", help="read a batch for each step, as in training"
    )
    return parser.parse_args(argv)


def _on_devices(local: dict[str, Any], program: TrainProgram) -> dict[str, jax.Array]:
    """The fields of ``Batch`` by name."""
    fields = {field.name: local[field.name] for field in dataclasses.fields(Batch)}
    return jax.device_put(fields, program.batch_sharding)


if __name__ == "__main__":
    main()
