"""Manifest of a run's folder: how it was started, on what, with which code, parameters and data."""

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from sam_jax import places
from sam_jax.hosts import gathered, is_first
from sam_jax.sharding import describe
from sam_jax.training.compiled_step import CompiledStep

STARTS = "starts.jsonl"
PARAMETERS = "parameters.txt"
DATA = "data.json"

_PACKAGES = ("sam-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_ROOT = Path(__file__).resolve().parents[2]


@runtime_checkable
class DescribedData(Protocol):
    """Data that can say where they come from and what was left out."""

    def get_state(self) -> dict[str, Any]:
        """Position and counts of this process, as values of JSON."""
        ...

    def manifest(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Sources, counts, and what was skipped by reason, of processes in such states."""
        ...


def write_start(workdir: Path, program: CompiledStep, first_step: int) -> None:
    """Appends a line of JSON to ``starts.jsonl`` for this start of the run."""
    devices = program.mesh.devices.flat
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "after_step": first_step,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": commit_of(_ROOT),
        "versions": {"python": platform.python_version(), **_versions(_PACKAGES)},
        "host": platform.node(),
        "processes": jax.process_count(),
        "devices": [f"{device.platform} {device.device_kind} {device.id}" for device in devices],
        "mesh": dict(program.mesh.shape),
    }
    places.append_line(workdir / STARTS, json.dumps(start))


def write_parameters(workdir: Path, program: CompiledStep) -> None:
    """Writes ``parameters.txt``: path, shape, axes, elements on each device, a line each."""
    lines = describe(program.state_shapes.params, program.state_shardings.params)
    places.write_text(workdir / PARAMETERS, "\n".join(lines) + "\n")


def write_data(workdir: Path, data: Any) -> None:
    """Writes ``data.json``, of data that can describe themselves; all processes call together."""
    if not isinstance(data, DescribedData):
        return
    states = gathered(data.get_state())
    if is_first():
        places.write_text(workdir / DATA, json.dumps(data.manifest(states), indent=2) + "\n")


def commit_of(folder: Path) -> dict[str, Any] | None:
    """The commit that a folder's code is of, and whether files differ from it; None if unknown."""

    def git(*arguments: str) -> str | None:
        try:
            ended = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return ended.stdout.strip()

    # A package in a folder of somebody else's repository is none of it.
    root = git("rev-parse", "--show-toplevel")
    if root is None or Path(root) != folder:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"hash": git("rev-parse", "HEAD"), "dirty": changed != ""}


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
