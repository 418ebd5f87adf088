"""Reports of benchmark runs: options that all benchmarks share, a table, a JSON file."""

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.timing import Timing
from sam_jax import places

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Rate:
    """Something achieved per second.

    Attributes:
      unit: of what.
      achieved: in the fastest call, if calls were timed one by one.
      limit: the most there could be, measured in the same run; None if there is no such thing.
    """

    unit: str
    achieved: float
    limit: float | None = None

    @property
    def limit_rate(self) -> float | None:
        """The fraction of the limit."""
        return None if self.limit is None else self.achieved / self.limit


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark, with the options that all share."""
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--repeats", type=int, default=5, help="timed calls (%(default)s)")
    result.add_argument(
        "--out", type=output_file, help="the JSON file, by default in runs/benchmarks"
    )
    return result


def output_file(text: str) -> Path:
    """A file to write, as a type of arguments: one that cannot be is found before the work."""
    try:
        places.check_file(text)
    except places.PlaceError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def publish(
    name: str,
    argv: Sequence[str] | None,
    args: argparse.Namespace,
    timing: Timing,
    rates: Sequence[Rate],
    *,
    num_devices: int = 1,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a run, which is also printed and written.

    Args:
      name: of the benchmark.
      argv: its arguments; None for those of the program.
      args: the same, parsed.
      timing: of its calls.
      rates: what it achieved, the chief one first.
      num_devices: that it ran on.
      facts: other numbers worth keeping, by name.
    """
    now = datetime.datetime.now(datetime.UTC)
    device = jax.devices()[0]
    arguments = sys.argv[1:] if argv is None else argv
    record = {
        "benchmark": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *arguments]),
        "commit": _commit(),
        "timestamp": now.isoformat(timespec="seconds"),
        "jax": jax.__version__,
        "platform": device.platform,
        "device": device.device_kind,
        "num_devices": num_devices,
        "host_cores": os.cpu_count(),
        # Above the number of cores, or the benchmark's own share of them, others were at work.
        "host_load": os.getloadavg()[0],
        "compile_seconds": timing.compile_seconds,
        "seconds": list(timing.seconds),
        "median_seconds": timing.median,
        "best_seconds": timing.best,
        "planned_bytes": timing.planned_bytes,
        "peak_bytes": timing.peak_bytes,
        "rates": {
            rate.unit: {
                "achieved": rate.achieved,
                "limit": rate.limit,
                "limit_rate": rate.limit_rate,
            }
            for rate in rates
        },
        **(facts or {}),
    }
    _print_table(record, rates, facts or {})
    out = args.out or ROOT / "runs" / "benchmarks" / f"{name}-{now:%Y%m%dT%H%M%S}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _print_table(record: dict[str, Any], rates: Sequence[Rate], facts: dict[str, Any]) -> None:
    table = Table(title=f"{record['benchmark']} on {record['num_devices']} x {record['device']}")
    for heading in ("", "measured", "limit", "of it"):
        table.add_column(heading, justify="right" if heading else "left")
    if record["compile_seconds"] is not None:
        table.add_row("compile", f"{record['compile_seconds']:.1f} s")
    table.add_row("best", f"{record['best_seconds']:.4g} s")
    table.add_row("median", f"{record['median_seconds']:.4g} s")
    for rate in rates:
        limit = [] if rate.limit is None else [_short(rate.limit), f"{rate.limit_rate:.1%}"]
        table.add_row(rate.unit, _short(rate.achieved), *limit)
    for key in ("planned_bytes", "peak_bytes"):
        if record[key] is not None:
            table.add_row(key.replace("_", " "), _short(record[key]))
    for fact, value in facts.items():
        if isinstance(value, int | float):
            table.add_row(fact.replace("_", " "), _short(value))
    for name, times in facts.get("peers", {}).items():
        if "failed" in times:
            table.add_row(name, times["failed"])
        else:
            table.add_row(f"{name}, best", f"{times['best_seconds']:.4g} s")
            table.add_row(f"times as fast as {name}", f"{times['speedup']:.3g}")
    Console().print(table)


def _short(value: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g}"


def _commit() -> str | None:
    """Commit that is checked out, marked if files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
