"""A run that is killed again and again, to end where one that is left alone does, bit for bit.

    python -m tests.e2e.soak --kills 20 [--config tests/e2e/tiny_pretraining.py] [--seed 0]

Each process of the run is killed at a moment drawn from its whole life: while Python starts, a
checkpoint is read, the step is compiled, between and within steps, checkpoints and evaluations.
Before some starts the newest checkpoint is damaged besides. Takes some ten minutes of two cores;
`test_training_runs.py` has the short form.
"""

import argparse
import collections
import contextlib
import json
import logging
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.e2e.programs import CONFIG, PRETRAINING, Program, logged, saved_steps, start

# A checkpoint after every step, so that much of a run's time is spent on writing one.
OFTEN = ("--config.checkpoint.every_steps=1", "--config.train.log_every=1")
RARE = ("--config.checkpoint.every_steps=100000", "--config.train.log_every=1")

# Figures of how fast a machine was, which no two runs share.
_OF_THE_CLOCK = re.compile(r"per_second|seconds_per|input_wait")
# The figure that the best model is kept by, of the configs that can be soaked.
_WATCHED = {CONFIG: "shapes/mean/box", PRETRAINING: "shapes/mean/loss"}
_EVAL_EVERY = 3
# Steps that a process makes at most before it is killed: the run cannot end before the kills do.
_STEPS_OF_A_LIFE = 8
# After so many kills in a row without a new checkpoint, one is waited for.
_MOST_IN_VAIN = 3
# Each so manieth start finds the newest checkpoint damaged.
_DAMAGED_EVERY = 5


class Kill(NamedTuple):
    """A kill of a process of the run.

    Attributes:
      seconds: after its start.
      phase: what it was doing.
      left_half_written: what it was writing: "checkpoint", "best", both or none.
    """

    seconds: float
    phase: str
    left_half_written: tuple[str, ...]


def is_writing(workdir: Path) -> bool:
    """True while a checkpoint has not got its name yet."""
    return any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))


def phase(output: str, workdir: Path, num_starts: int) -> str:
    """Phase of a process that was killed, by what it printed and left in the run's folder.

    Args:
      output: of the process.
      workdir: of the run.
      num_starts: how often the run had begun before.
    """
    steps = [int(step) for step in re.findall(r"^step (\d+)/", output, re.MULTILINE)]
    saved = saved_steps(workdir)
    if not steps and count_starts(workdir) > num_starts:
        return "compiling"
    if not steps and (" process(es), " not in output or not saved):
        return "starting"
    step = steps[-1] if steps else saved[-1]
    is_past = steps or "continuing from the checkpoint" in output
    # Evaluations that a process was killed in are made by the next one, before its first step.
    if is_past and step % _EVAL_EVERY == 0 and step not in _judged_steps(workdir):
        has_figures = f"evaluation shapes at step {step}:" in output
        return "keeping the best" if has_figures else "evaluating"
    if not steps:
        return "restoring"
    return "writing a checkpoint" if is_writing(workdir) else "training"


def count_starts(workdir: Path) -> int:
    """How often a run has begun."""
    starts = workdir / "starts.jsonl"
    return len(starts.read_text().splitlines()) if starts.exists() else 0


def _judged_steps(workdir: Path) -> list[int]:
    """Steps whose evaluation is whole: figures, and the model where it was the best."""
    path = workdir / "evaluations.json"
    if not path.exists():
        return []
    return [entry["step"] for entry in json.loads(path.read_text())["evaluations"]]


def kill(
    process: Program, workdir: Path, rng: random.Random, life_seconds: float, *, is_patient: bool
) -> Kill:
    """Kills a run at a random moment of a process's life; says which moment it was.

    Args:
      process: that was just started.
      workdir: of the run.
      rng: draws the moment.
      life_seconds: how long a process lives that makes `_STEPS_OF_A_LIFE` steps.
      is_patient: whether to wait for a checkpoint first.
    """
    begin, num_starts = time.monotonic(), count_starts(workdir)
    before = saved_steps(workdir)[-1:]
    seconds = rng.uniform(0, life_seconds)
    if is_patient:
        process.wait_until("a checkpoint", lambda: saved_steps(workdir)[-1:] > before)
        seconds = time.monotonic() - begin + rng.uniform(0, life_seconds / 2)
    last = sum(before) + _STEPS_OF_A_LIFE

    def is_over() -> bool:
        return time.monotonic() - begin >= seconds or last in saved_steps(workdir)

    process.wait_until("its end", is_over, naps=0.002)
    workers = process.children
    process.send(signal.SIGKILL)
    seconds = time.monotonic() - begin
    process.end(-signal.SIGKILL)
    for worker in workers:
        process.wait_for_end_of(worker)
    places = {"checkpoint": workdir, "best": workdir / "best"}
    # Until a run has begun, what lies there is what the process before has left.
    has_begun = count_starts(workdir) > num_starts
    return Kill(
        seconds,
        phase(process.output, workdir, num_starts),
        tuple(name for name, folder in places.items() if has_begun and is_writing(folder)),
    )


def damage_newest(workdir: Path) -> bool:
    """Cuts a file of the newest checkpoint short, if another one is whole; true if so."""
    steps = saved_steps(workdir)
    if len(steps) < 2:
        return False
    files = (workdir / "checkpoints" / str(steps[-1])).rglob("*")
    largest = max(files, key=lambda path: path.stat().st_size * path.is_file())
    os.truncate(largest, largest.stat().st_size // 2)
    return True


def saved_state(workdir: Path) -> dict[str, Any]:
    """Everything in a run's newest checkpoint: parameters, averages, moments, place in the data."""
    folder = workdir / "checkpoints" / str(saved_steps(workdir)[-1])
    places = (folder / "data").glob("*.json")
    parts: dict[str, Any] = {path.name: json.loads(path.read_text()) for path in places}
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        for part in {"model", "ema", "optimizer"} & {path.name for path in folder.iterdir()}:
            # Not as arrays on devices, which would be those that wrote them.
            as_numpy = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                handler.metadata(folder / part).tree,
            )
            args = ocp.args.PyTreeRestore(restore_args=as_numpy)
            parts[part] = handler.restore(folder / part, args=args)
    return parts


def figures(workdir: Path) -> dict[int, dict[str, float]]:
    """Figures of a run by step and name, as its file has them; none of the clock."""
    found: dict[int, dict[str, float]] = collections.defaultdict(dict)
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        # What a kill has cut off is made again.
        if line.endswith("}"):
            entry = json.loads(line)
            found[entry["step"]] |= {k: v for k, v in entry.items() if not _OF_THE_CLOCK.search(k)}
    return found


def data_manifest(workdir: Path) -> dict[str, Any]:
    """Counts of a run's data, whatever place they came from."""
    content = json.loads((workdir / "data.json").read_text())
    sources = [{k: v for k, v in source.items() if k != "path"} for source in content["sources"]]
    return content | {"sources": sources}


def assert_same_end(first: Path, second: Path) -> None:
    """Two runs have the same state, data, figures on the way, pictures, and best model."""
    assert saved_steps(first)[-1] == saved_steps(second)[-1]
    state = saved_state(first)
    assert {"model", "ema", "optimizer", "process_0-of-1.json"} == set(state)
    assert _different(state, saved_state(second)) == []
    assert figures(first) == figures(second)
    shown = [
        {tag: x for tag, x in logged(workdir).items() if not _OF_THE_CLOCK.search(tag)}
        for workdir in (first, second)
    ]
    assert shown[0] == shown[1]
    assert data_manifest(first) == data_manifest(second)
    for pattern in ("evaluations.json", "pictures/*/*.png"):
        found = [
            {path.relative_to(workdir): path.read_bytes() for path in workdir.glob(pattern)}
            for workdir in (first, second)
        ]
        assert found[0] == found[1], pattern
    assert (first / "best").exists() == (second / "best").exists()
    if (first / "best").exists():
        assert saved_steps(first / "best") == saved_steps(second / "best")
        assert _different(*(saved_state(workdir / "best") for workdir in (first, second))) == []


def _different(first: Any, second: Any) -> list[str]:
    """Paths of the leaves that are not the same in two trees, bit for bit."""

    def bits(tree: Any) -> dict[str, tuple]:
        leaves = {
            jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)
        }
        return {path: (leaf.dtype, leaf.shape, leaf.tobytes()) for path, leaf in leaves.items()}

    ours, theirs = bits(first), bits(second)
    return [path for path in sorted(ours | theirs) if ours.get(path) != theirs.get(path)]


def soak(
    workdir: Path, config: Path, kills: int, rng: random.Random, life_seconds: float, *flags: str
) -> list[Kill]:
    """Runs to the end, killed so many times on the way; what happened each time."""
    command = ("train.py", "--workdir", str(workdir), *OFTEN, *flags)
    done, num_damaged, num_in_vain = [], 0, 0
    for number in range(1, kills + 1):
        aside = len([*(workdir / "checkpoints_damaged").glob("*")])
        # One at a time: what is damaged twice is put aside once.
        if number % _DAMAGED_EVERY == 0 and aside == num_damaged:
            num_damaged += damage_newest(workdir)
        before = saved_steps(workdir)[-1:]
        with start(*command, config=config) as process:
            is_patient = num_in_vain == _MOST_IN_VAIN
            done.append(kill(process, workdir, rng, life_seconds, is_patient=is_patient))
            assert "Traceback" not in process.output, process.output
        after = saved_steps(workdir)[-1:]
        num_in_vain = 0 if after > before else num_in_vain + 1
        seconds, name, half_written = done[-1]
        say(
            f"kill {number} after {seconds:.1f} s: {name}; newest checkpoint: "
            f"{after[0] if after else 'none'}"
            + "".join(f", {what} half-written" for what in half_written)
        )
    output = complete(*command, config=config)
    assert not saved_steps(workdir) or "continuing from the checkpoint of step" in output
    assert not is_writing(workdir)
    # No kill damages what was written.
    assert len([*(workdir / "checkpoints_damaged").glob("*")]) == num_damaged
    say(f"{num_damaged} checkpoints were damaged before a start, and put aside")
    return done


def complete(*command: str, config: Path) -> str:
    """Output of a run that may take long, once it has ended well."""
    with start(*command, config=config) as process:
        return process.end(seconds=3600)


def say(line: str) -> None:
    """Prints a line at once, for whoever watches."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Soaks, and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--config", type=Path, default=CONFIG, help="tiny_run, tiny_pretraining")
    parser.add_argument("--out", type=Path, help="folder in which the runs are kept")
    args = parser.parse_args()
    config = args.config.resolve()
    # What purges the figures that a killed run had made says so each time.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    say(f"seed {args.seed}")
    with contextlib.ExitStack() as ends:
        folder = args.out or Path(ends.enter_context(tempfile.TemporaryDirectory()))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
        flags = (f"--config.train.eval_every={_EVAL_EVERY}",)
        flags = (*flags, f"--config.train.watch={_WATCHED[config]}")
        length = f"--config.train.num_steps={10 + _STEPS_OF_A_LIFE * args.kills}"
        straight, killed, short = (folder / name for name in ("straight", "killed", "short"))
        complete("train.py", "--workdir", str(straight), *RARE, *flags, length, config=config)
        # What is compiled is kept by now, as for those that will be killed.
        begin = time.monotonic()
        life = f"--config.train.num_steps={_STEPS_OF_A_LIFE}"
        complete("train.py", "--workdir", str(short), *OFTEN, *flags, life, config=config)
        life_seconds = time.monotonic() - begin
        say(f"a process that makes {_STEPS_OF_A_LIFE} steps lives for {life_seconds:.1f} s")
        rng = random.Random(args.seed)
        done = soak(killed, config, args.kills, rng, life_seconds, *flags, length)
        assert_same_end(straight, killed)
    phases = collections.Counter(one.phase for one in done).most_common()
    say(f"{args.kills} kills: " + ", ".join(f"{count} {name}" for name, count in phases))
    for what in ("checkpoint", "best"):
        count = sum(what in one.left_half_written for one in done)
        say(f"{count} of them left a {what} half-written")
    say("state, data, figures, pictures and best model are equal, bit for bit")


if __name__ == "__main__":
    main()
