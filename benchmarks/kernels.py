"""Instruction counts of each TPU kernel, as the TPU's compiler schedules them.

python -m benchmarks.kernels --topology v5e:1x1

No TPU is needed, only its compiler (`pip install 'sam-jax[tpu]'`). For each kernel, at the sizes of
ViT-H and 64 masks: bundles of instructions that one step of its grid takes, one a cycle if nothing
is waited for; operations that the kernel says it does; and the part of the chip's peak that these
come to. Stalls are not counted: waits for memory and for busy units.
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
from sam_jax.cost_report import devices_of
from sam_jax.ops.attention import GRID_ATTENTION
from sam_jax.ops.dispatch import Operation
from sam_jax.ops.mask_embedding import ADD_MASK_EMBEDDINGS, MaskEmbeddingWeights
from sam_jax.ops.mask_prediction import PREDICT_MASKS, UpscalingWeights
from sam_jax.ops.mask_statistics import MASK_STATISTICS
from sam_jax.ops.norm import NormWeights
from sam_jax.ops.packed_masks import MaskLayout
from sam_jax.ops.token_attention import (
    IMAGE_TO_TOKEN_ATTENTION,
    TOKEN_TO_IMAGE_ATTENTION,
    AttentionWeights,
)
from sam_jax.ops.tpu import mask_statistics as mask_statistics_kernel
from sam_jax.ops.windows import NORM_PARTITION, UNPARTITION_ADD_NORM

# Of ViT-H and its decoder. Four objects or windows are enough: each takes the same.
GRID, WINDOW, DIM, HEADS = (64, 64), 14, 1280, 16
OBJECTS, IMAGE_TOKENS, TOKEN_DIM, TOKENS, TOKEN_HEADS = 4, 4096, 256, 16, 8
BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32


class Case(NamedTuple):
    """A function that uses a kernel, and shapes and types of its arguments, by name."""

    function: Callable[..., Any]
    arguments: dict[str, Any]


class Count(NamedTuple):
    """Instructions and work of one kernel.

    Attributes:
      bundles: instruction bundles of one step of its grid.
      flops: operations of one step, as the kernel declares them.
      moved_bytes: bytes of all steps, to and from the device's memory.
      steps: steps of its grid.
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
    """Counts of the kernels of a function and of its gradients, by kernel name."""
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.arguments
    )
    gradients, some, others = _gradients(case, arguments)
    steps = kernels_of(case)
    _empty(folder)
    text = gradients.lower(some, others).compile().as_text() or ""
    bundles = _bundles(folder)
    if "mask_statistics" in steps:
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
    """Bundles for all trips of kernels' loops, extrapolated from two lengths of loop bodies."""
    tokens = mask_statistics_kernel.MOST_TOKENS
    mask_statistics_kernel.MOST_TOKENS = tokens // 2
    _empty(folder)
    jax.clear_caches()
    gradients.lower(some, others).compile()
    mask_statistics_kernel.MOST_TOKENS = tokens
    jax.clear_caches()
    of_half = _bundles(folder)
    trips = IMAGE_TOKENS // tokens
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
    """Bundles of each kernel, from what the compiler wrote of its last schedule."""
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


def _of(*shape: int, dtype: Any = BF16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _of_operation(
    operation: Operation, arguments: dict[str, Any], form: str = "kernel", **options: Any
) -> Case:
    function = operation.forms[form].function
    return Case(lambda *args: function(*args, **options, interpret=False), arguments)


def _attention(grid: tuple[int, int], batch: int, form: str) -> Case:
    tables = [_of(2 * size - 1, DIM // HEADS, dtype=F32) for size in grid]
    arguments = {"qkv": _of(batch, *grid, 3 * DIM), "h": tables[0], "w": tables[1]}
    return _of_operation(GRID_ATTENTION, arguments, form, num_heads=HEADS)


def _norm_partition() -> Case:
    arguments = {"tokens": _of(1, *GRID, DIM), "norm": _norm(DIM)}
    return _of_operation(NORM_PARTITION, arguments, window_size=WINDOW, epsilon=1e-6)


def _unpartition() -> Case:
    num_windows = (-(-GRID[0] // WINDOW)) * (-(-GRID[1] // WINDOW))
    arguments = {
        "tokens": _of(1, *GRID, DIM),
        "windows": _of(num_windows, WINDOW, WINDOW, DIM),
        "norm": _norm(DIM),
    }
    return _of_operation(UNPARTITION_ADD_NORM, arguments, epsilon=1e-6)


def _embedding() -> Case:
    channels = 16
    weights = MaskEmbeddingWeights(
        *_dense(4, channels // 4),
        _norm(channels // 4),
        *_dense(channels, channels),
        _norm(channels),
        *_dense(channels, TOKEN_DIM),
    )
    arguments = {
        "weights": weights,
        "image": _of(1, *GRID, TOKEN_DIM),
        "logits": _of(1, OBJECTS, *(4 * size for size in GRID), dtype=F32),
        "valid": _of(1, OBJECTS, dtype=jnp.bool_),
        "no_mask": _of(TOKEN_DIM, dtype=F32),
    }
    return _of_operation(ADD_MASK_EMBEDDINGS, arguments, norm_epsilon=1e-6)


def _attention_weights() -> AttentionWeights:
    inward = _dense(TOKEN_DIM, TOKEN_DIM // 2)
    return AttentionWeights(*inward * 3, *_dense(TOKEN_DIM // 2, TOKEN_DIM))


def _token_to_image() -> Case:
    arguments = {
        "weights": _attention_weights(),
        "tokens": _of(1, OBJECTS, TOKENS, TOKEN_DIM),
        "image_tokens": _of(1, OBJECTS, IMAGE_TOKENS, TOKEN_DIM),
        "image_pe": _of(IMAGE_TOKENS, TOKEN_DIM),
    }
    return _of_operation(TOKEN_TO_IMAGE_ATTENTION, arguments, num_heads=TOKEN_HEADS)


def _image_to_token() -> Case:
    tokens = _of(1, OBJECTS, TOKENS, TOKEN_DIM)
    arguments = {
        "weights": _attention_weights(),
        "norm": _norm(TOKEN_DIM),
        "image_tokens": _of(1, OBJECTS, IMAGE_TOKENS, TOKEN_DIM),
        "image_pe": _of(IMAGE_TOKENS, TOKEN_DIM),
        "keys": tokens,
        "values": tokens,
        "valid": _of(1, OBJECTS, TOKENS, dtype=jnp.bool_),
        "seeds": _of(1, OBJECTS, dtype=I32),
    }
    return _of_operation(
        IMAGE_TO_TOKEN_ATTENTION,
        arguments,
        num_heads=TOKEN_HEADS,
        dropout_rate=0.1,
        norm_epsilon=1e-5,
    )


def _prediction() -> Case:
    dim = TOKEN_DIM
    weights = UpscalingWeights(
        *(_of(dim, 2, 2, dim // 4, dtype=F32), _of(dim // 4, dtype=F32)),
        _norm(dim // 4),
        *(_of(dim // 4, 2, 2, dim // 8, dtype=F32), _of(dim // 8, dtype=F32)),
    )
    arguments = {
        "weights": weights,
        "image_tokens": _of(1, OBJECTS, *GRID, dim),
        "filters": _of(1, OBJECTS, 1, dim // 8),
    }
    return _of_operation(PREDICT_MASKS, arguments, norm_epsilon=1e-6)


def _statistics() -> Case:
    arguments = {
        "logits": _of(1, OBJECTS, 1, *(4 * size for size in GRID), dtype=F32),
        "masks": _of(1, OBJECTS, 16, IMAGE_TOKENS, dtype=I32),
        "area": _of(1, 16, IMAGE_TOKENS, dtype=I32),
    }
    return _of_operation(
        MASK_STATISTICS, arguments, mask_layout=MaskLayout(GRID, 4), alpha=0.25, gamma=2
    )


def _dense(input_dim: int, features: int) -> tuple[Any, Any]:
    return _of(input_dim, features, dtype=F32), _of(features, dtype=F32)


def _norm(dim: int) -> NormWeights:
    return NormWeights(_of(dim, dtype=F32), _of(dim, dtype=F32))


CASES: dict[str, Callable[[], Case]] = {
    "window_attention": lambda: _attention((WINDOW, WINDOW), 4, "window_kernel"),
    "flash_attention": lambda: _attention(GRID, 1, "flash_kernel"),
    "norm_partition": _norm_partition,
    "unpartition_add_norm": _unpartition,
    "mask_embedding": _embedding,
    "token_to_image": _token_to_image,
    "image_to_token": _image_to_token,
    "predict_masks": _prediction,
    "mask_statistics": _statistics,
}

if __name__ == "__main__":
    main()
