"""Manifest of a run's folder: how it was started, on what, with which code, parameters and data."""

import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from sam_jax import places
from sam_jax.hosts import gathered, host_names, is_first
from sam_jax.sharding import describe
from sam_jax.training.compiled_step import CompiledStep

_log = logging.getLogger(__name__)

STARTS = "starts.jsonl"
PARAMETERS = "parameters.txt"
DATA = "data.json"
# What it said, each time that the data were others than it says.
DATA_BEFORE = "data_before.jsonl"
SKIPPED_SAMPLES = "skipped_samples.json"

_PACKAGES = ("sam-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# What compiles and computes on accelerators: JAX's plugins, CUDA, cuDNN, NCCL, the TPU's library.
_PLUGINS = re.compile(r"(nvidia-|jax-cuda|jax-rocm|libtpu)")
_DRIVER = Path("/proc/driver/nvidia/version")
# Variables on which depends what is compiled, and whether it computes the same again.
_VARIABLES = re.compile(
    r"(XLA|JAX|LIBTPU|TPU|NCCL|CUDNN|CUBLAS|TF_CUDNN|TF_DETERMINISTIC)_|NVIDIA_TF32_OVERRIDE$"
)
# Of a source in ``data.json``: what is found there, and no option of the config.
_FOUND = ("num_samples", "files")
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

    def skipped_samples(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Names of skipped samples by reason, of processes in such states."""
        ...


def write_start(workdir: Path, compiled_step: CompiledStep, first_step: int) -> None:
    """Appends a line of JSON to ``starts.jsonl`` for this start of the run.

    The first process calls it, after all have called ``write_data``, which asks for their hosts.
    """
    devices = compiled_step.mesh.devices.flat
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "after_step": first_step,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": commit_of(_ROOT),
        "versions": versions(),
        "environment": environment(),
        "hosts": list(host_names()),
        "processes": jax.process_count(),
        "devices": [f"{device.platform} {device.device_kind} {device.id}" for device in devices],
        "mesh": dict(compiled_step.mesh.shape),
    }
    places.append_line(workdir / STARTS, json.dumps(start))


def write_parameters(workdir: Path, compiled_step: CompiledStep) -> None:
    """Writes ``parameters.txt``: path, shape, axes, elements on each device, a line each."""
    lines = describe(compiled_step.state_shapes.params, compiled_step.state_shardings.params)
    places.write_text(workdir / PARAMETERS, "\n".join(lines) + "\n")


def write_data(workdir: Path, data: Any) -> None:
    """Writes ``data.json`` and ``skipped_samples.json``; all processes call together.

    Nothing is written of data that cannot describe themselves. Where a source has other files than
    ``data.json`` says, the log says so, and what it said goes into ``data_before.jsonl``.
    """
    host_names()
    if not isinstance(data, DescribedData):
        return
    states = gathered(data.get_state())
    if not is_first():
        return
    described = json.loads(json.dumps(data.manifest(states)))
    before = _read(workdir / DATA)
    changes = data_changes(before, described)
    for line in changes:
        _log.warning("%s", line)
    if changes:
        places.append_line(workdir / DATA_BEFORE, json.dumps(before))
    places.write_text(workdir / DATA, json.dumps(described, indent=2) + "\n")
    skipped = data.skipped_samples(states)
    if skipped or (workdir / SKIPPED_SAMPLES).exists():
        places.write_text(workdir / SKIPPED_SAMPLES, json.dumps(skipped, indent=2) + "\n")


def data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sources that the same options find other files or samples for, a line each.

    Args:
      before, now: contents of ``data.json``. Where only one says something, nothing has changed.
    """
    lines = []
    known = [source for source in before.get("sources", []) if isinstance(source, dict)]
    for source in now["sources"]:
        earlier = next((other for other in known if _options(other) == _options(source)), {})
        if any(earlier.get(key, source.get(key)) != source.get(key) for key in _FOUND):
            lines.append(
                f"the data of source {source.get('name')} ({source.get('path')}) are others than "
                f"before: {_extent(earlier)} there, {_extent(source)} now. The run goes on, but is "
                "not what it would have been"
            )
    return lines


def _options(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key not in _FOUND}


def _extent(source: Mapping[str, Any]) -> str:
    files = source.get("files") or {}
    size = f" in files of {files['num_bytes']:,} bytes ({files['digest']})" if files else ""
    return f"{source.get('num_samples', 0):,} samples{size}"


def _read(path: Path) -> dict[str, Any]:
    """A file of JSON, nothing if it is damaged or not there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def versions() -> dict[str, str]:
    """Versions of Python, packages, plugins of accelerators, their runtime and driver."""
    found = {"python": platform.python_version(), **_versions(_PACKAGES)}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if _PLUGINS.match(name):
            found[name] = distribution.version
    # Of CUDA, or of the TPU's library, as it was loaded, which need not be a package's.
    found["platform"] = jax.local_devices()[0].client.platform_version
    if _DRIVER.exists():
        found["driver"] = _DRIVER.read_text(errors="replace").partition("\n")[0]
    return found


def environment() -> dict[str, str]:
    """Environment variables on which the compiled program and its numbers depend."""
    return {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.match(name)}


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
