"""Programs as users start them, and what they leave behind."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("tiny_run.py")
# A step is compiled once for each number of devices, not once for each run. Of several processes
# only the first would find it there, and not wait for the others.
CACHE = tempfile.TemporaryDirectory(prefix="compiled-")


def start(
    program: str, *flags: str, devices: int = 1, config: Path = CONFIG
) -> subprocess.Popen[str]:
    """A program of the repository with a tiny config, on a CPU that poses as so many devices."""
    environment = os.environ | {
        # A few steps of a tiny model: compiling them well would take longer than running them.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
        "PYTHONPATH": str(ROOT),
    }
    if not any(flag.startswith("--process=") for flag in flags):
        environment["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    return subprocess.Popen(
        [sys.executable, str(ROOT / program), "--config", str(config), *flags],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(program: str, *flags: str, devices: int = 1, config: Path = CONFIG) -> str:
    """What it prints, once it has ended well."""
    with start(program, *flags, devices=devices, config=config) as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def logged(workdir: Path) -> dict[str, dict[int, float]]:
    """What a run wrote to TensorBoard: values by tag and step."""
    events = EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }
