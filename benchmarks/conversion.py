"""Cost of converting a checkpoint: seconds, and peak memory over the size of the file.

python -m benchmarks.conversion [--variant vit_h] [--json FILE]

A file of random weights is written first. Each conversion runs in a process of its own, whose peak
is its largest resident set (which counts the mapped file's pages, too).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.report import output_file
from sam_jax.export import onnx as onnx_export
from sam_jax.models.sam import Sam, init_variables
from sam_jax.models.variants import VARIANTS
from sam_jax.weights import load as checkpoints

TARGETS = ("official", "hugging-face", "orbax", "onnx")


def main() -> None:
    """Measures all conversions, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="vit_h", choices=VARIANTS)
    parser.add_argument("--json", type=output_file, help="write the figures there")
    parser.add_argument("--convert", nargs=3, metavar=("SOURCE", "TARGET", "TO"))
    args = parser.parse_args()
    if args.convert:
        print(json.dumps(_convert(*args.convert)))
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"{args.variant}.pth"
        _write_random(args.variant, source)
        size = source.stat().st_size
        rows = []
        for to in TARGETS:
            target = Path(folder) / ("out.pth" if to == "official" else f"out-{to}")
            command = [sys.executable, "-m", "benchmarks.conversion"]
            command += ["--convert", str(source), str(target), to]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"to": to, **json.loads(done.stdout)})
    print(f"{args.variant}: {size / 2**30:.2f} GiB")
    for row in rows:
        rate = (row["peak_bytes"] - row["idle_bytes"]) / size
        row["peak_rate"] = rate
        print(
            f"  to {row['to']:13} {row['seconds']:6.1f} s   peak {row['peak_bytes'] / 2**30:.2f} "
            f"GiB, {rate:.2f} x the file above the idle process"
        )
    if args.json:
        args.json.write_text(json.dumps({"variant": args.variant, "bytes": size, "rows": rows}))


def _convert(source: str, target: str, to: str) -> dict[str, float]:
    idle, start = _peak(), time.perf_counter()
    if to == "onnx":
        weights = checkpoints.open_weights(source)
        onnx_export.export_onnx(target, weights.config, checkpoints.native_variables(weights))
    else:
        checkpoints.convert(source, target, to)  # type: ignore[arg-type]
    return {
        "seconds": time.perf_counter() - start,
        "peak_bytes": _peak(),
        "idle_bytes": idle,
    }


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _write_random(variant: str, path: Path) -> None:
    config, rng = VARIANTS[variant], np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_variables(Sam(config), jax.random.key(0)))
    variables = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, dtype=np.float32), shapes)
    checkpoints.save(path, config, variables, "official")


if __name__ == "__main__":
    main()
