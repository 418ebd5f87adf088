"""Encoder, decoder and training step, beside their peers, in one table.

python -m benchmarks.table [--folder DIR] [--only encoder-vit_b]

Each row is a benchmark in a process of its own and leaves its JSON record in the folder, with what
it printed beside it. The same command continues where it was stopped. On a CPU the rows are small
ones, to see that all of it runs.
"""

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peer import COMPILED, EAGER, SDPA
from benchmarks.report import ROOT

PEERS = ("--peer", EAGER, COMPILED)
LIMITS = "limits"


@dataclasses.dataclass(frozen=True)
class Row:
    """One benchmark.

    Attributes:
      name: of the row and its files.
      benchmark: the script.
      arguments: of it.
    """

    name: str
    benchmark: str
    arguments: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs what has no record yet and prints all records, which it returns."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ROOT / "runs" / "benchmarks" / "table"
    parser.add_argument("--folder", type=Path, default=default, help="of the records (%(default)s)")
    parser.add_argument("--only", default="", help="rows with this in their names")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls (%(default)s)")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    limits = _record(Row(LIMITS, "limits"), args)
    rows = small_rows() if limits.get("platform") == "cpu" else accelerator_rows()
    records = [limits]
    records += [_record(row, args) for row in rows if args.only in row.name]
    _print(records)
    return records


def accelerator_rows() -> list[Row]:
    """The published sizes in bfloat16."""
    rows = []
    for variant in ("vit_b", "vit_l", "vit_h"):
        for batch in (1, 8):
            common = ("--variant", variant, "--batch", str(batch), "--dtype", "bfloat16", *PEERS)
            rows.append(Row(f"encoder-{variant}-{batch}", "encoder", common))
            # Eight images leave too much for the backward pass of the larger ones.
            remat = ("--remat", "none" if batch == 1 or variant == "vit_b" else "blocks")
            name = f"encoder-{variant}-{batch}-backward"
            rows.append(Row(name, "encoder", (*common, "--backward", *remat)))
    for batch in (1, 8):
        common = ("--batch", str(batch), "--prompts", "64", "--dtype", "bfloat16", *PEERS)
        rows.append(Row(f"decoder-{batch}", "decoder", common))
        rows.append(Row(f"decoder-{batch}-mask", "decoder", (*common, "--with-mask")))
    for variant in ("vit_b", "vit_h"):
        rows += [_step(f"configs/sam_{variant}.py", f"{variant}-{n}", n) for n in (1, 4)]
    return rows


def small_rows() -> list[Row]:
    """The same, small enough for a CPU."""
    common = ("--variant", "vit_ti", *PEERS)
    return [
        Row("encoder-vit_ti-1", "encoder", common),
        Row("encoder-vit_ti-1-backward", "encoder", (*common, "--backward")),
        Row("decoder-1", "decoder", (*common, "--prompts", "8")),
        Row("decoder-1-mask", "decoder", (*common, "--prompts", "8", "--with-mask")),
        _step("configs/demo.py", "demo-8", 8),
    ]


def _step(config: str, name: str, batch: int) -> Row:
    settings = (f"data.batch_size={batch}", "data.num_workers=0", "sharding.fsdp=1")
    changes = [part for setting in settings for part in ("--set", setting)]
    return Row(f"step-{name}", "step", ("--config", config, "--synthetic", *changes))


def _record(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """The record of a row, from its file or by running it, under the row's name."""
    file = args.folder / f"{row.name}.json"
    if not file.exists():
        command = [sys.executable, "-m", f"benchmarks.{row.benchmark}", *row.arguments]
        command += ["--repeats", str(args.repeats), "--out", str(file)]
        Console().print(f"{row.name}: {shlex.join(command[1:])}", markup=False, style="dim")
        # Each framework takes what it needs, so that a peer has the memory that we left.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        run = subprocess.run(
            command,
            check=False,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        file.with_suffix(".txt").write_text(run.stdout, encoding="utf-8")
        if not file.exists():
            last = (run.stdout.strip().splitlines() or ["it printed nothing"])[-1]
            return {"name": row.name, "failed": last[:200]}
    return {"name": row.name, **json.loads(file.read_text(encoding="utf-8"))}


def _print(records: Sequence[dict[str, Any]]) -> None:
    limits, *rest = records
    table = Table(title=_title(limits))
    columns = ("", "best", "rate", "TFLOP/s", "of the limit", "useful", "memory")
    for heading in (*columns, EAGER, COMPILED):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for record in rest:
        table.add_row(record["name"], *_cells(record))
    console = Console()
    if not console.is_terminal:
        # A file has no width to keep to.
        console.width = 140
    console.print(table)
    console.print(
        "Rates are of the fastest call. The limit is the fastest matrix product of the same run; "
        "useful leaves out padding, and of a training step is its MFU against that limit. Memory "
        "is the device's peak, or what the compiler plans. Peers: their time over ours.",
        style="dim",
    )


def _title(limits: dict[str, Any]) -> str:
    if "failed" in limits:
        return limits["failed"]
    products = limits["rates"]["bfloat16 FLOP/s"]["achieved"]
    return f"{limits['device']}, {limits['commit']}, {products / 1e12:.3g} TFLOP/s in bfloat16"


def _cells(record: dict[str, Any]) -> list[str]:
    if "failed" in record:
        return [record["failed"]]
    rates = record["rates"]
    unit = next(unit for unit in ("masks/s", "prompts/s", "images/s") if unit in rates)
    products = rates["FLOP/s"]
    useful = rates.get("FLOP/s without padding", products)
    memory = record["peak_bytes"] or record["planned_bytes"]
    peers = record.get("peers", {})
    return [
        f"{1e3 * record['best_seconds']:.4g} ms",
        f"{_number(rates[unit]['achieved'])} {unit}",
        f"{products['achieved'] / 1e12:.3g}",
        f"{products['limit_rate']:.1%}",
        f"{useful['limit_rate']:.1%}",
        f"{memory / 2**30:.2f} GiB",
        _peer(peers.get(EAGER)),
        _peer(peers.get(COMPILED) or peers.get(SDPA)),
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _peer(times: dict[str, Any] | None) -> str:
    if times is None:
        return ""
    return times.get("failed") or f"{times['speedup']:.2f}"


if __name__ == "__main__":
    main()
