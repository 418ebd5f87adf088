"""What the instructions of each TPU kernel come to, as the TPU's compiler schedules them.

python -m benchmarks.kernels --topology v5e:1x1

No TPU is needed, only its compiler (`pip install 'sam-jax[tpu]'`). For each kernel, at the sizes of
ViT-H and 64 masks: bundles of instructions that one step of its grid takes, one a cycle if nothing
is waited for; operations that the kernel says it does; and the part of the chip's peak that these
come to. What is waited for is not in it: memory, and units that are busy.
"""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from benchmarks.report import output_file
from sam_jax import hlo
from sam_jax.models.mask_decoder import Upscaling
from sam_jax.models.prompt_encoder import MaskDownscaling
from sam_jax.models.token_attention import Weights, answer_cells
from sam_jax.ops import mask_sums_kernel
from sam_jax.ops.cell_means_kernel import cell_means
from sam_jax.ops.cells import MaskGrid
from sam_jax.ops.flash_kernel import flash_attention
from sam_jax.ops.mask_sums_kernel import mask_sums
from sam_jax.ops.window_cut_kernel import join_and_norm, norm_and_cut
from sam_jax.ops.window_kernel import window_attention
from sam_jax.plan import devices_of

# Of ViT-H and its decoder. Four objects or windows are enough: each takes the same.
GRID, WINDOW, DIM, HEADS = (64, 64), 14, 1280, 16
OBJECTS, CELLS, CELL_DIM, TOKENS, CELL_HEADS = 4, 4096, 256, 16, 8
BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32


class Case(NamedTuple):
    """A function that uses a kernel, and shapes and types of its arguments, by name."""

    function: Callable[..., Any]
    arguments: dict[str, Any]


class Count(NamedTuple):
    """Of a kernel.

    Attributes:
      bundles: of one step of its grid.
      flops: that it says it does in one.
      moved_bytes: of all steps, to and from the device's memory.
      steps: of its grid.
    """

    bundles: int
    flops: float
    moved_bytes: int
    steps: int


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Compiles each kernel, forward and backward, and counts."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--topology", default="v5e:1x1", help="one chip (%(default)s)")
    parser.add_argument("--only", nargs="*", default=sorted(CASES), help="cases (all)")
    parser.add_argument("--out", type=output_file, help="a JSON file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        # Read when the compiler is loaded, which is when the devices are described.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            + os.environ.get("LIBTPU_INIT_ARGS", "")
        )
        devices, chip = devices_of(args.topology)
        if chip is None or chip.clock_rate is None:
            parser.error(f"--topology {args.topology} is no TPU whose clock is known")
        counts: dict[str, Count] = {}
        for name in args.only:
            counts |= _count(CASES[name](), devices[0], Path(folder))
    peak = chip.peak_flops / chip.clock_rate
    record = {
        kernel: {**count._asdict(), "peak_rate": count.flops / count.bundles / peak}
        for kernel, count in counts.items()
    }
    table = Table(title=f"kernels on {args.topology}")
    for heading in ("kernel", "bundles a step", "MFLOP a step", "of the peak"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for kernel, count in counts.items():
        rate = f"{record[kernel]['peak_rate']:.3f}"
        table.add_row(kernel, f"{count.bundles:,}", f"{count.flops / 1e6:.1f}", rate)
    Console().print(table)
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def kernels_of(case: Case) -> dict[str, int]:
    """Steps of the grids of the kernels of a function and of its gradients, by name."""
    gradients, *arguments = _gradients(case, case.arguments)
    return dict(_grids(jax.make_jaxpr(gradients)(*arguments).jaxpr))


def _gradients(case: Case, arguments: dict[str, Any]) -> tuple[Any, Any, Any]:
    """A function of what has gradients, and of the rest, and both."""

    def is_float(tree: Any) -> bool:
        return all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(tree))

    def loss(some: Any, others: Any) -> jax.Array:
        given = {**some, **others}
        outputs = jax.tree.leaves(case.function(*(given[name] for name in case.arguments)))
        outputs = [x for x in outputs if is_float(x)]
        return jnp.sum(jnp.stack([jnp.sum(jnp.square(x.astype(jnp.float32))) for x in outputs]))

    some = {name: x for name, x in arguments.items() if is_float(x)}
    others = {name: x for name, x in arguments.items() if not is_float(x)}
    return jax.jit(jax.grad(loss)), some, others


def _count(case: Case, device: Any, folder: Path) -> dict[str, Count]:
    """Of the kernels of a function and of its gradients."""
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.arguments
    )
    gradients, some, others = _gradients(case, arguments)
    steps = kernels_of(case)
    _empty(folder)
    text = gradients.lower(some, others).compile().as_text() or ""
    bundles = _bundles(folder)
    if "mask_sums" in steps:
        bundles = _with_trips(bundles, gradients, some, others, folder)
    return {
        i.kernel_name: Count(
            bundles[i.kernel_name],
            i.kernel_flops / steps[i.kernel_name],
            i.moved_bytes,
            steps[i.kernel_name],
        )
        for i in hlo.instructions(text)
        if i.is_kernel
    }


def _empty(folder: Path) -> None:
    for old in folder.iterdir():
        old.unlink()


def _with_trips(bundles: dict[str, int], gradients, some, others, folder: Path) -> dict[str, int]:
    """Of kernels that loop over cells: from two lengths of the loop's body, what all trips take."""
    cells = mask_sums_kernel.MOST_CELLS
    mask_sums_kernel.MOST_CELLS = cells // 2
    _empty(folder)
    jax.clear_caches()
    gradients.lower(some, others).compile()
    mask_sums_kernel.MOST_CELLS = cells
    jax.clear_caches()
    of_half = _bundles(folder)
    trips = CELLS // cells
    return {
        name: count + 2 * (count - of_half[name]) * (trips - 1) for name, count in bundles.items()
    }


def _grids(jaxpr: Any) -> Iterator[tuple[str, int]]:
    """Names of kernels, and steps of their grids."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            steps = 1
            for size in equation.params["grid_mapping"].grid:
                steps *= size
            yield equation.params["name"], steps
        else:
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _grids(inner)


def _bundles(folder: Path) -> dict[str, int]:
    """By kernel, from what the compiler wrote of its last schedule."""
    found: dict[str, tuple[int, int]] = {}
    for path in folder.glob("*-schedule-analysis_final_bundles.txt"):
        match = re.match(r"\d+-(.+)\.\d+-(\d+)-schedule", path.name)
        total = re.search(r"total scheduled bundles:\s+(\d+)", path.read_text(encoding="utf-8"))
        if match and total:
            # The compiler's names say through which of JAX's transformations a kernel came.
            name = re.sub(r"^(transpose_|jvp_)+|_+$", "", match[1])
            stage = int(match[2])
            if stage >= found.get(name, (0, 0))[0]:
                found[name] = (stage, int(total[1]))
    return {name: count for name, (_, count) in found.items()}


def _of(*shape: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _window() -> Case:
    table = _of(2 * WINDOW - 1, DIM // HEADS)
    return Case(
        lambda qkv, h, w: window_attention(qkv, h, w, HEADS, interpret=False),
        {"qkv": _of(4, WINDOW, WINDOW, 3 * DIM), "h": table, "w": table},
    )


def _flash() -> Case:
    table = _of(2 * GRID[0] - 1, DIM // HEADS)
    return Case(
        lambda qkv, h, w: flash_attention(qkv, h, w, HEADS, interpret=False),
        {"qkv": _of(1, *GRID, 3 * DIM), "h": table, "w": table},
    )


def _cut() -> Case:
    vector = _of(DIM, dtype=F32)

    def both(tokens, scale, shift):
        windows, tokens = norm_and_cut(tokens, scale, shift, WINDOW, epsilon=1e-6, interpret=False)
        return join_and_norm(tokens, windows, scale, shift, epsilon=1e-6, interpret=False)

    return Case(both, {"tokens": _of(1, *GRID, DIM), "scale": vector, "shift": vector})


def _embed() -> Case:
    module = MaskDownscaling(CELL_DIM, 16, BF16)
    variables = _variables(module, jnp.zeros((1, 1, 16, 1)))
    kernels = module.clone(kernels="compiled")
    return Case(
        lambda variables, shared, logits, valid, no_mask: kernels.apply(
            variables, shared, logits, valid, no_mask, method="added_to"
        ),
        {
            "variables": variables,
            "shared": _of(1, CELLS, CELL_DIM),
            "logits": _of(1, OBJECTS, 16, CELLS),
            "valid": _of(1, OBJECTS, dtype=jnp.bool_),
            "no_mask": _of(CELL_DIM),
        },
    )


def _means() -> Case:
    return Case(
        lambda rows, cells, positions: cell_means(rows, cells, positions, interpret=False),
        {
            "rows": _of(OBJECTS, TOKENS * CELL_HEADS, CELL_DIM),
            "cells": _of(OBJECTS, CELLS, CELL_DIM),
            "positions": _of(CELLS, CELL_DIM),
        },
    )


def _answer() -> Case:
    heads, channels = CELL_HEADS, CELL_DIM // 2 // CELL_HEADS
    kernel, bias = _of(CELL_DIM, heads, channels), _of(heads, channels)
    weights: Any = [kernel, bias] * 3 + [_of(heads, channels, CELL_DIM), _of(CELL_DIM)]
    tokens, vector = _of(1, OBJECTS, TOKENS, CELL_DIM), _of(CELL_DIM, dtype=F32)
    return Case(
        lambda weights, norm, cells, positions, tokens, valid, seeds: answer_cells(
            weights, norm, cells, positions, tokens, tokens, valid, seeds, 0.1, interpret=False
        ),
        {
            "weights": Weights(*weights),
            "norm": (vector, vector),
            "cells": _of(1, OBJECTS, CELLS, CELL_DIM),
            "positions": _of(CELLS, CELL_DIM),
            "tokens": tokens,
            "valid": _of(1, OBJECTS, TOKENS, dtype=jnp.bool_),
            "seeds": _of(1, OBJECTS, dtype=I32),
        },
    )


def _draw() -> Case:
    module = Upscaling(CELL_DIM, BF16)
    cells, filters = _of(1, OBJECTS, *GRID, CELL_DIM), _of(1, OBJECTS, 1, CELL_DIM // 8)
    small = jnp.zeros((1, 1, 1, 1, CELL_DIM)), jnp.zeros((1, 1, 1, CELL_DIM // 8))
    kernels = module.clone(kernels="compiled")
    return Case(
        kernels.apply,
        {"variables": _variables(module, *small), "cells": cells, "filters": filters},
    )


def _sums() -> Case:
    mask_grid = MaskGrid(GRID, 4)
    return Case(
        lambda logits, masks, area: mask_sums(
            logits, masks, area, mask_grid, alpha=0.25, gamma=2.0, interpret=False
        ),
        {
            "logits": _of(1, OBJECTS, 1, 16, CELLS, dtype=F32),
            "masks": _of(1, OBJECTS, 16, CELLS, dtype=I32),
            "area": _of(1, 16, CELLS, dtype=I32),
        },
    )


def _variables(module: Any, *arguments: Any) -> Any:
    return jax.eval_shape(module.init, jax.random.key(0), *arguments)


CASES: dict[str, Callable[[], Case]] = {
    "window": _window,
    "flash": _flash,
    "cut": _cut,
    "embed": _embed,
    "means": _means,
    "answer": _answer,
    "draw": _draw,
    "sums": _sums,
}

if __name__ == "__main__":
    main()
