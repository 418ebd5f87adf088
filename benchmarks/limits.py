"""Measured limits of the machine: matrix products, copies, JPEG decoding.

python -m benchmarks.limits [--repeats 5] [--out FILE.json]

A benchmark measures the limit that it is held against itself, in the same run, so that both met
the same machine in the same state.
"""

import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from PIL import Image

from benchmarks import report
from benchmarks.timing import Timing, time_calls

# Sides of the square matrices. Small ones do not fill an accelerator, large ones try a CPU's (and
# the user's) patience and are no faster there.
MATMUL_SIZES = {"cpu": (1024, 2048), "accelerator": (4096, 8192)}
# Larger than any cache.
COPY_BYTES = 2**28


def matmul_flops_per_second(
    dtype: DTypeLike, devices: Sequence[jax.Device], repeats: int = 5
) -> float:
    """Operations per second of all devices at once, each with its own matrix product.

    The best of all sizes and calls. Products have the precision that the model's have: JAX's
    default for the type.
    """
    product = jax.jit(jnp.matmul)
    rng = np.random.default_rng(0)
    platform = "cpu" if devices[0].platform == "cpu" else "accelerator"
    rates = []
    for size in MATMUL_SIZES[platform]:
        matrix = rng.standard_normal((size, size), np.float32).astype(dtype)
        operands = [jax.device_put(matrix, device) for device in devices]
        seconds = time_calls(_on_each(product, operands), repeats)
        rates.append(len(devices) * 2 * size**3 / min(seconds))
    return max(rates)


def _on_each(function: Any, operands: list[jax.Array]) -> Callable[[], list[jax.Array]]:
    return lambda: [function(x, x) for x in operands]


def copy_bytes_per_second(device: jax.Device, repeats: int = 5) -> float:
    """Bytes read plus bytes written per second by one large elementwise operation."""
    array = jax.device_put(np.ones(COPY_BYTES // 4, np.float32), device)
    # A mere copy might be optimised away.
    add_one = jax.jit(lambda x: x + 1)
    return 2 * COPY_BYTES / min(time_calls(lambda: add_one(array), repeats))


def host_copy_bytes_per_second(repeats: int = 5) -> float:
    """Bytes read plus bytes written per second when one core copies an array in host memory."""
    source = np.ones(COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    return 2 * COPY_BYTES / min(time_calls(lambda: np.copyto(target, source), repeats))


def jpeg_images_per_second(files: Sequence[bytes], repeats: int = 3) -> float:
    """Images per second that one core decodes to RGB, from memory."""

    def decode_all():
        for content in files:
            Image.open(io.BytesIO(content)).convert("RGB")

    return len(files) / min(time_calls(decode_all, repeats))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures the limits of the default device and its host, in float32 and bfloat16."""
    args = report.parser("limits", __doc__).parse_args(argv)
    device, start = jax.devices()[0], time.perf_counter()
    rates = [
        report.Rate(f"{dtype} FLOP/s", matmul_flops_per_second(dtype, [device], args.repeats))
        for dtype in ("float32", "bfloat16")
    ]
    rates += [
        report.Rate("device bytes/s", copy_bytes_per_second(device, args.repeats)),
        report.Rate("host bytes/s, one core", host_copy_bytes_per_second(args.repeats)),
    ]
    timing = Timing([time.perf_counter() - start])
    return report.publish("limits", argv, args, timing, rates)


if __name__ == "__main__":
    main()
