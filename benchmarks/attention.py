"""Attention with relative positions alone, every form that the device can run, in one table.

python -m benchmarks.attention --grid 64 64 --heads 16 --channels 80 --dtype bfloat16 [--backward]
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import limits, report
from benchmarks.random_inputs import random_like
from benchmarks.timing import Timing, compile_for, time_compiled
from sam_jax import flop_counts
from sam_jax.ops.attention import GRID_ATTENTION, Implementation, grid_attention

# By platform: what runs there and is not merely interpreted. The reference holds all logits.
FORMS: dict[str, tuple[Implementation, ...]] = {
    "cpu": ("reference", "extended", "chunked"),
    "gpu": ("reference", "extended", "chunked", "cudnn"),
    "tpu": ("reference", "extended", "chunked", "window_kernel", "flash_kernel"),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Times every form; those that cannot do the shape are named."""
    args = _parse(argv)
    grid = tuple(args.grid)
    chosen = GRID_ATTENTION.choose(*_shapes(args, grid), num_heads=args.heads).name
    timings: dict[str, Timing] = {}
    refused: dict[str, str] = {}
    for form in FORMS.get(jax.default_backend(), FORMS["cpu"]):
        try:
            timings[form] = _time(args, grid, form)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            refused[form] = str(error).splitlines()[0][:200]
    passes = flop_counts.TRAINING_FACTOR if args.backward else 1
    flops = passes * args.batch * flop_counts.attention_flops(grid, args.heads * args.channels)
    limit = limits.matmul_flops_per_second(args.dtype, jax.devices()[:1])
    rates = [report.Rate("FLOP/s", flops / timings[chosen].best, limit)]
    rates += [
        report.Rate(f"{form} FLOP/s", flops / timing.best, limit)
        for form, timing in timings.items()
    ]
    facts = {
        "work_flops": flops,
        "chosen": chosen,
        "refused": refused,
        "reference_over_chosen": timings["reference"].best / timings[chosen].best,
        "planned_bytes_by_form": {form: t.planned_bytes for form, t in timings.items()},
    }
    return report.publish("attention", argv, args, timings[chosen], rates, facts=facts)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("attention", __doc__)
    parser.add_argument("--grid", type=int, nargs=2, default=(64, 64), help="rows and columns")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--channels", type=int, default=64, help="of a head")
    parser.add_argument("--batch", type=int, default=1, help="grids: images, or their windows")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--backward", action="store_true", help="gradients too")
    return parser.parse_args(argv)


def _shapes(args: argparse.Namespace, grid: tuple[int, int]) -> list[jax.ShapeDtypeStruct]:
    """Shapes and types of the qkv projections and of both relative-position tables."""
    dtype = jnp.dtype(args.dtype)
    return [
        jax.ShapeDtypeStruct((args.batch, *grid, 3 * args.heads * args.channels), dtype),
        *(jax.ShapeDtypeStruct((2 * size - 1, args.channels), dtype) for size in grid),
    ]


def _time(args: argparse.Namespace, grid: tuple[int, int], form: Implementation) -> Timing:
    dtype, width = jnp.dtype(args.dtype), args.heads * args.channels
    arguments = [random_like(shape) for shape in _shapes(args, grid)]

    def attend(qkv, rel_pos_h, rel_pos_w):
        return grid_attention(qkv, rel_pos_h, rel_pos_w, args.heads, implementation=form)

    function = attend
    if args.backward:
        arguments.append(random_like(jax.ShapeDtypeStruct((args.batch, *grid, width), dtype)))
        function = _gradients(attend)
    compiled, seconds = compile_for(jax.jit(function), *arguments)
    return time_compiled(
        compiled, lambda: compiled(*arguments), compile_seconds=seconds, repeats=args.repeats
    )


def _gradients(function: Any) -> Any:
    return lambda *args: jax.vjp(function, *args[:-1])[1](args[-1])


if __name__ == "__main__":
    main()
