"""Fine-tuning on few images: what is trained, against quality, time and memory.

python -m benchmarks.finetuning --weights FILE --data FOLDER [FOLDER ...] [--folder DIR]

Each FOLDER holds `train.json`, `val.json` and `images/`. Before training, and then for the decoder
alone, LoRA and everything, from 10, 50 and all images: mean IoU of the last model on `val.json`
after one and three clicks and from the box, trained parameters, seconds of an epoch (the last
intervals, when all is compiled and cached) and of the whole run, and the most memory of its
process. Runs are those of configs/finetune_*.py, all with as many steps; no model is chosen by what
it is then scored on. Every row leaves a JSON record, and the same command goes on where it was
stopped, in the midst of a run as well.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import ROOT
from sam_jax.weights.files import written_whole

METHODS = ("decoder", "lora", "full")
BEFORE = "before"
MEASURES = ("center_1", "center_3", "box")
_TRAINED = re.compile(r"\((\d[\d,]*)\)")
_ALL = re.compile(r"([\d.]+) M parameters on")
_RATE = re.compile(r"step (\d+)/\d+ .*?([\d.]+) img/s", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Row:
    """A run, or the weights before any.

    Attributes:
      data: folder of the data set.
      method: of ``METHODS``, or ``BEFORE``.
      num_images: that it is trained on; None for all.
    """

    data: Path
    method: str
    num_images: int | None = None

    @property
    def name(self) -> str:
        """Name of its record and of its run's folder."""
        return f"{self.data.name}-{self.method}-{self.num_images or 'all'}"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs what has no record yet, prints all records, and returns them."""
    args = _parse(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    records = []
    for data in args.data:
        rows = [Row(data, BEFORE)]
        rows += [Row(data, method, n) for n in args.num_images for method in args.methods]
        for row in rows:
            records.append(_record(row, args))
            _write_table(records, args.folder)
    Console().print(_table(records))
    return records


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ROOT / "runs" / "benchmarks" / "finetuning"
    parser.add_argument("--weights", required=True, help="what is fine-tuned, of any form")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of data sets")
    parser.add_argument("--folder", type=Path, default=default, help="of the runs (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--num-images",
        nargs="+",
        type=lambda text: None if text == "all" else int(text),
        default=(10, 50, None),
        help="to train on; 'all' takes all (10 50 all)",
    )
    parser.add_argument("--num-steps", type=int, default=300, help="of each run (%(default)s)")
    parser.add_argument("--image-size", type=int, default=256, help="side in pixels (%(default)s)")
    parser.add_argument("--max-images", type=int, default=1000, help="evaluated (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of images and runs (%(default)s)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="of all runs' configs"
    )
    return parser.parse_args(argv)


def _record(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """The record of a row, from its file or by running it."""
    file = args.folder / f"{row.name}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    run = args.folder / row.name
    data, num_images = subset(row.data, row.num_images, args.folder / "data", args.seed)
    method = "full" if row.method == BEFORE else row.method
    side = args.image_size
    settings = [
        f"model.image_size=({side}, {side})",
        f"prompts.box_noise_max_px={20 * side / 1024}",
        f"evals.val.max_images={args.max_images}",
        f"train.num_steps={args.num_steps}",
        f"train.seed={args.seed}",
        f"data.seed={args.seed}",
        *args.set,
    ]
    if method == "decoder":
        settings.append(f"train.embedding_cache={args.folder / 'embeddings'}")
    config = [f"--config=configs/finetune_{method}.py:{data}:{args.weights}"]
    config += [f"--config.{setting}" for setting in settings]
    record: dict[str, Any] = {"data": row.data.name, "method": row.method, "num_images": num_images}
    if row.method != BEFORE:
        record |= measured(
            ["train.py", *config, "--config.train.eval_every=0", f"--workdir={run}"], num_images
        )
    checkpoint = args.weights if row.method == BEFORE else run
    _run(["eval.py", *config, f"--checkpoint={checkpoint}", f"--out={run}-eval"])
    report = json.loads((Path(f"{run}-eval") / "val" / "report.json").read_text())
    record["miou"] = {name: report["mean"][name] for name in MEASURES}
    record["settings"] = {
        "num_steps": args.num_steps,
        "image_size": args.image_size,
        "max_images": args.max_images,
        "seed": args.seed,
        "set": args.set,
    }
    with written_whole(file) as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n")
    return record


def subset(data: Path, num_images: int | None, folder: Path, seed: int) -> tuple[Path, int]:
    """A data set with a part of the training images, and how many they are.

    Args:
      data: folder of the data set.
      num_images: to keep, drawn by the seed among those that have a mask; None for all.
      folder: of such parts.
      seed: of the draw; of one seed, few images are among the many.
    """
    annotations = json.loads((data / "train.json").read_text())
    with_mask = {annotation["image_id"] for annotation in annotations["annotations"]}
    images = [image for image in annotations["images"] if image["id"] in with_mask]
    if num_images is None or num_images >= len(images):
        return data, len(images)
    random.Random(seed).shuffle(images)
    kept = images[:num_images]
    ids = {image["id"] for image in kept}
    annotations |= {
        "images": kept,
        "annotations": [a for a in annotations["annotations"] if a["image_id"] in ids],
    }
    part = folder / f"{data.name}-{num_images}-{seed}"
    part.mkdir(parents=True, exist_ok=True)
    (part / "train.json").write_text(json.dumps(annotations))
    (part / "val.json").write_text((data / "val.json").read_text())
    if not (part / "images").exists():
        (part / "images").symlink_to((data / "images").resolve())
    return part, num_images


def measured(command: Sequence[str], num_images: int) -> dict[str, Any]:
    """Facts about a training run: what it says, how long it took, how much memory.

    A run that goes on from a checkpoint counts from there only, and says so.
    """
    start = time.monotonic()
    said, peak_bytes = _run(command)
    text = " ".join(said.split())
    rates = [float(rate) for _, rate in _RATE.findall(text)]
    if not rates:
        raise SystemExit(f"the run is over already, and has no record: remove {command[-1]}")
    trained = _TRAINED.search(text)
    num_trained = int(trained[1].replace(",", "")) if trained else None
    everything = _ALL.search(text)
    return {
        "num_trained": num_trained or (float(everything[1]) * 1e6 if everything else None),
        # The first intervals compile, and embed images for the first time.
        "seconds_per_epoch": num_images / statistics.median(rates[len(rates) // 2 :]),
        "seconds": time.monotonic() - start,
        "peak_bytes": peak_bytes,
        "is_whole": "continuing from" not in text,
    }


def _run(command: Sequence[str]) -> tuple[str, int]:
    """Runs a program of the project: what it says, and the most memory that it had."""
    Console(stderr=True).print(" ".join(command), markup=False, style="dim")
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said[-3000:]}")
    # Linux counts in KiB, macOS in bytes.
    return said, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _columns(record: dict[str, Any]) -> list[str]:
    miou = [f"{100 * record['miou'][measure]:.1f}" for measure in MEASURES]
    if record["method"] == BEFORE:
        return [record["data"], "-", BEFORE, *miou, "-", "-", "-", "-"]
    return [
        record["data"],
        str(record["num_images"]),
        record["method"],
        *miou,
        f"{record['num_trained'] / 1e6:.2f} M",
        f"{record['seconds_per_epoch']:.1f} s",
        f"{record['seconds'] / 60:.1f} min" + ("" if record["is_whole"] else " (resumed)"),
        f"{record['peak_bytes'] / 2**30:.1f} GiB",
    ]


_HEADINGS = (
    *("data", "images", "trained", "1 click", "3 clicks", "box"),
    *("parameters", "epoch", "run", "memory"),
)


def _table(records: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="mean IoU on validation, in percent")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right")
    for record in records:
        table.add_row(*_columns(record))
    return table


def _write_table(records: Sequence[dict[str, Any]], folder: Path) -> None:
    rows = [_HEADINGS, ["---"] * len(_HEADINGS), *map(_columns, records)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    (folder / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
