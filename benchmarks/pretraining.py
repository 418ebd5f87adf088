"""Masked pre-training, then segmentation, against segmentation from scratch in the same time.

python -m benchmarks.pretraining --data FOLDER --runs DIR [--minutes 28 --seeds 3]

FOLDER holds one folder per data set, each with `train.json`, `val.json` and `images/`. All runs of
a seed have the same small model, data and schedules, and differ in where they start and how long:

- `mae`: masked reconstruction of the training images, then segmentation from its encoder;
- `scratch, same steps`: as many steps of segmentation, from random weights;
- `scratch, same time`: so many steps more as pre-training has taken.

Seconds of a step of either task are measured first, one after the other in turn, and kept with the
numbers of steps that follow from them in DIR/plan.json. The same command goes on where it was: with
the run that was stopped, and without those that are finished.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import report
from configs.mae_tiny import tiny_config
from configs.small_coco import sources
from configs.small_recipe import small_config
from sam_jax import places
from sam_jax.checkpoint import CheckpointConfig
from sam_jax.data.pipeline import train_iterator
from sam_jax.evaluation.run import build_evaluators, model_of
from sam_jax.training import loop
from sam_jax.training.experiment import Experiment
from sam_jax.weights.files import written_whole

STARTS = ("mae", "scratch, same steps", "scratch, same time")
MEASURES = ("center_1", "center_1_oracle", "center_3", "box")
# Of the time that the runs of a seed take: pre-training one part, and segmentation one part after
# it, one with the same steps, and two with the same time.
_PARTS_OF_A_SEED = 5
_TIMED_STEPS = 5
# Small enough that minutes on a CPU are a thousand steps: from a hundred, nothing is learned.
_SIZE, _PATCH = (64, 64), 8
# Of small_config, as configs/demo.py has it at this size.
_MAX_MASKS, _MIN_MASK_AREA_PX, _NUM_CORRECTIONS = 3, 4, 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps of all runs.

    Attributes:
      mae_seconds, segment_seconds: of a step, the fastest of some.
      mae_steps: of pre-training.
      segment_steps: of segmentation after it, and with the same steps from scratch.
      longer_steps: of segmentation from scratch in the time of both.
    """

    mae_seconds: float
    segment_seconds: float
    mae_steps: int
    segment_steps: int
    longer_steps: int


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Makes all runs that are not finished, and prints the table of those that are."""
    args = _parse(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    plan = _plan(args)
    results: dict[str, list[dict[str, float]]] = {start: [] for start in STARTS}
    for seed in range(args.seeds):
        for start in STARTS:
            results[start].append(_result(args, plan, start, seed))
    summary = {
        "plan": dataclasses.asdict(plan),
        "seeds": args.seeds,
        "device": jax.devices()[0].device_kind,
        "results": results,
        "mean": {start: _over_seeds(found, np.mean) for start, found in results.items()},
        "deviation": {start: _over_seeds(found, _deviation) for start, found in results.items()},
    }
    _write(args.out or args.runs / "results.json", summary)
    _print(plan, summary)
    return summary


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretraining",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=28.0, help="of training, all runs together (%(default)s)"
    )
    parser.add_argument("--max-images", type=int, default=20, help="to evaluate on, of a set")
    parser.add_argument("--max-masks", type=int, default=8, help="to evaluate on, of an image")
    parser.add_argument("--out", type=report.output_file, help="the JSON; by default in --runs")
    args = parser.parse_args(argv)
    places.check_folder(args.runs)
    return args


def _pretraining(args: argparse.Namespace, plan: Plan | None, seed: int) -> dict[str, Any]:
    """The config of pre-training."""
    config = tiny_config(sources(str(args.data), "train", "benchmarks.pretraining"), {})
    config.model.image_size, config.model.encoder.patch_size = _SIZE, _PATCH
    return _sections(config, plan.mae_steps if plan else None, seed)


def _segmentation(
    args: argparse.Namespace, num_steps: int | None, seed: int, init_from: Path | None
) -> dict[str, Any]:
    """The config of segmentation."""
    train, val = (
        sources(str(args.data), split, "benchmarks.pretraining") for split in ("train", "val")
    )
    config = small_config(train, val)
    config.model.image_size, config.model.encoder.patch_size = _SIZE, _PATCH
    config.data.max_masks, config.data.min_mask_area_px = _MAX_MASKS, _MIN_MASK_AREA_PX
    config.prompts.num_corrections = _NUM_CORRECTIONS
    config.evals.val.update(
        {
            "num_clicks": (1, 3),
            "baselines": (),
            "max_images": args.max_images,
            "max_masks_per_image": args.max_masks,
            "num_examples": 0,
        }
    )
    if init_from is not None:
        config.train.init_from = str(init_from)
    return _sections(config, num_steps, seed)


def _sections(config: Any, num_steps: int | None, seed: int) -> dict[str, Any]:
    """The sections of a config, of a seed, on one device, for so many steps."""
    config.train.seed = config.data.seed = seed
    config.sharding.cpu_devices = None
    if num_steps is not None:
        config.train.num_steps = num_steps
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, max(num_steps // 10, 1))
    found: dict[str, Any] = config.to_dict()
    return found


def _plan(args: argparse.Namespace) -> Plan:
    """The plan that is kept, or one from what steps take now."""
    path = args.runs / "plan.json"
    if path.is_file():
        return Plan(**json.loads(path.read_text()))
    experiments = [
        Experiment.of(config)
        for config in (_pretraining(args, None, 0), _segmentation(args, None, 0, None))
    ]
    mae_seconds, segment_seconds = _seconds_of_steps(experiments)
    part = 60 * args.minutes / (_PARTS_OF_A_SEED * args.seeds)
    mae_steps, segment_steps = (
        max(round(part / seconds), 2) for seconds in (mae_seconds, segment_seconds)
    )
    plan = Plan(
        mae_seconds,
        segment_seconds,
        mae_steps,
        segment_steps,
        segment_steps + round(mae_steps * mae_seconds / segment_seconds),
    )
    _write(path, dataclasses.asdict(plan))
    return plan


def _seconds_of_steps(experiments: Sequence[Experiment]) -> list[float]:
    """Seconds of a step of each, in turn, so that what else runs here slows all alike."""
    programs = [experiment.compiled_step(jax.devices()[:1]) for experiment in experiments]
    states = [program.new_state(jax.random.key(0)) for program in programs]
    batches = []
    for experiment, program in zip(experiments, programs, strict=True):
        with contextlib.closing(train_iterator(experiment.data)) as data:
            fields = next(data)
        fields = {name: fields[name] for name in program.task.batch_spec(1)}
        batches.append(jax.device_put(fields, program.batch_sharding))
    seconds: list[list[float]] = [[] for _ in programs]
    for _ in range(_TIMED_STEPS + 1):
        for index, program in enumerate(programs):
            start = time.perf_counter()
            states[index], metrics = program.step(states[index], batches[index])
            jax.block_until_ready(metrics)
            seconds[index].append(time.perf_counter() - start)
    # The first compiles.
    return [min(taken[1:]) for taken in seconds]


def _result(args: argparse.Namespace, plan: Plan, start: str, seed: int) -> dict[str, float]:
    """The measures of a run, which is made if it is not finished."""
    folder = args.runs / f"seed{seed}" / start.replace(", ", "_").replace(" ", "_")
    done = folder / "result.json"
    if done.is_file():
        found: dict[str, float] = json.loads(done.read_text())
        return found
    seconds, init_from = 0.0, None
    if start == "mae":
        init_from = folder / "pretraining"
        seconds += _train(_pretraining(args, plan, seed), init_from)
    num_steps = plan.longer_steps if start == "scratch, same time" else plan.segment_steps
    config = _segmentation(args, num_steps, seed, init_from)
    seconds += _train(config, folder / "segmentation")
    result = _evaluated(config, folder / "segmentation") | {"seconds": seconds}
    _write(done, result)
    return result


def _train(sections: dict[str, Any], folder: Path) -> float:
    """Trains to the end, and says how long it took; a run that was stopped goes on."""
    experiment = Experiment.of(sections)
    start = time.perf_counter()
    with contextlib.closing(train_iterator(experiment.data)) as data:
        loop.train(
            workdir=folder,
            compiled_step=experiment.compiled_step(jax.devices()[:1]),
            config=experiment.train,
            batch_size=experiment.data.batch_size,
            data_iterator=data,
            checkpoint_config=CheckpointConfig(every_steps=100, keep=1),
            evaluators={},
            sections=sections,
        )
    return time.perf_counter() - start


def _evaluated(sections: dict[str, Any], folder: Path) -> dict[str, float]:
    """Mean IoUs over the data sets."""
    model, variables, kernels = model_of(sections, str(folder), step=None, ema=True)
    (evaluate,) = build_evaluators(sections["evals"], model, kernels=kernels).values()
    flat = evaluate(jax.device_put(variables)).as_flat_dict()
    return {measure: flat[f"mean/{measure}"] for measure in MEASURES}


def _over_seeds(found: Sequence[Mapping[str, float]], reduce: Any) -> dict[str, float]:
    return {name: float(reduce([one[name] for one in found])) for name in found[0]}


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


def _print(plan: Plan, summary: Mapping[str, Any]) -> None:
    table = Table(title=f"mean IoU, %, mean and deviation of {summary['seeds']} seeds")
    table.add_column("start")
    table.add_column("steps", justify="right")
    for measure in (*MEASURES, "seconds"):
        table.add_column(measure, justify="right")
    steps = (
        f"{plan.mae_steps} + {plan.segment_steps}",
        f"{plan.segment_steps}",
        f"{plan.longer_steps}",
    )
    for start, of_start in zip(STARTS, steps, strict=True):
        mean, deviation = summary["mean"][start], summary["deviation"][start]
        ious = (f"{100 * mean[m]:.1f} ± {100 * deviation[m]:.1f}" for m in MEASURES)
        table.add_row(start, of_start, *ious, f"{mean['seconds']:.0f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    main()
