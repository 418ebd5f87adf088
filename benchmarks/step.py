"""A config's whole training step against the devices' fastest matrix products.

python -m benchmarks.step --config configs/demo.py [--fresh-batches] [--synthetic]
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import limits, recipe, report, work
from benchmarks.recipe import Recipe
from benchmarks.timing import compile_for, time_compiled
from sam_jax.data import train_iterator
from sam_jax.models.sam import init_variables
from sam_jax.sharding import (
    batch_sharding,
    make_mesh,
    replicated,
    start_devices,
    tree_shardings,
)
from sam_jax.training.optimizer import build_optimizer
from sam_jax.training.state import TrainState, init_state
from sam_jax.training.step import Batch, build_train_step


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Times the step, on one batch again and again or on fresh ones, and reports it."""
    parser = report.parser("step", __doc__)
    recipe.add_options(parser)
    parser.add_argument(
        "--fresh-batches", action="store_true", help="read a batch for each step, as in training"
    )
    args = parser.parse_args(argv)
    run = recipe.load(args)
    start_devices(run.sharding)
    mesh = make_mesh(run.sharding)

    new_state, train_step = _build(run, mesh)
    iterator = train_iterator(run.data)
    batch = _on_devices(next(iterator), mesh)
    state = new_state(jax.random.key(run.train.seed))
    compiled, seconds = compile_for(train_step, state, batch)
    num_masks = []

    def one_step():
        nonlocal state, batch
        if args.fresh_batches:
            batch = _on_devices(next(iterator), mesh)
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
    devices = list(mesh.devices.flat)
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


def _build(run: Recipe, mesh: jax.sharding.Mesh) -> tuple[Callable[[jax.Array], TrainState], Any]:
    """What makes a state, and the jitted step, as the training loop has them."""
    shapes = jax.eval_shape(lambda key: init_variables(run.model, key), jax.random.key(0))
    optimizer = build_optimizer(shapes["params"], run.optimizer, run.train.num_steps)

    def new_state(key):
        return init_state(init_variables(run.model, key), optimizer)

    state_shapes = jax.eval_shape(new_state, jax.random.key(0))
    shardings = tree_shardings(state_shapes, mesh, run.sharding)
    train_step = build_train_step(
        run.model,
        optimizer,
        run.prompts,
        run.losses,
        seed=run.train.seed,
        accumulate_steps=run.optimizer.accumulate_steps,
        remat_rounds=run.train.remat_rounds,
    )
    # The compiler's inspection rebuilds its arguments from placeholders, which a checked ``Batch``
    # refuses, so a mapping goes in.
    return jax.jit(new_state, out_shardings=shardings), jax.jit(
        lambda state, fields: train_step(state, Batch(**fields)),
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )


def _on_devices(local: dict[str, Any], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """The fields of ``Batch`` by name."""
    fields = {field.name: local[field.name] for field in dataclasses.fields(Batch)}
    return jax.device_put(fields, batch_sharding(mesh))


if __name__ == "__main__":
    main()
