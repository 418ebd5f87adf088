"""A run that is killed again and again, to end where one that is left alone does, bit for bit.

    python -m tests.e2e.soak --kills 20 [--config tests/e2e/tiny_pretraining.py]

takes some ten minutes of two cores, and pre-training half of that; `test_training_runs.py` has the
short form.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from sam_jax.checkpoint import restore_variables
from tests.e2e.programs import CONFIG, Program, logged, run, saved_steps, start

# A checkpoint after every step, so that most of a run's time is spent on writing one.
OFTEN = ("--config.checkpoint.every_steps=1", "--config.train.log_every=1")


def is_writing(workdir: Path) -> bool:
    """True while a checkpoint has not got its name yet."""
    return any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))


def kill(process: Program, workdir: Path, rng: random.Random) -> str:
    """Kills a run at a random moment after its next checkpoint; says which moment it was."""
    before = saved_steps(workdir)[-1:]
    process.wait_until("a checkpoint", lambda: saved_steps(workdir)[-1:] != before)
    if is_half_written := rng.random() < 0.5:
        process.wait_until("one being written", lambda: is_writing(workdir), naps=0.0005)
        process.nap(rng.uniform(0, 0.05))
    else:
        process.nap(rng.uniform(0, 0.5))
    workers = process.children
    process.send(signal.SIGKILL)
    process.end(-signal.SIGKILL)
    for worker in workers:
        process.wait_for_end_of(worker)
    moment = "in a write" if is_half_written else "at any moment"
    return f"{moment}, {'one' if is_writing(workdir) else 'none'} left unfinished"


def assert_same_end(first: Path, second: Path) -> None:
    """Two runs have the same parameters, averages, positions of data, and figures on the way."""
    for ema in (True, False):
        trained = [restore_variables(run, ema=ema) for run in (first, second)]
        jax.tree.map(np.testing.assert_array_equal, *trained)
    step = saved_steps(first)[-1]
    place = Path("checkpoints") / str(step) / "data" / "process_0-of-1.json"
    assert json.loads((first / place).read_text()) == json.loads((second / place).read_text())
    for tag in ("train/loss", "train/gradient_norm"):
        assert logged(first)[tag] == logged(second)[tag]


def soak(workdir: Path, config: Path, kills: int, seed: int, *flags: str) -> list[str]:
    """Runs to the end, killed so many times on the way; what happened each time."""
    rng, moments = random.Random(seed), []
    for number in range(kills):
        with start("train.py", "--workdir", str(workdir), *OFTEN, *flags, config=config) as process:
            moment = kill(process, workdir, rng)
            assert "Traceback" not in process.output
        moments.append(f"kill {number + 1} after step {saved_steps(workdir)[-1]}, {moment}")
        say(moments[-1])
    killed_at = saved_steps(workdir)[-1] if kills else 0
    output = run("train.py", "--workdir", str(workdir), *OFTEN, *flags, config=config)
    assert not kills or f"continuing from the checkpoint of step {killed_at}" in output
    assert not is_writing(workdir)
    # No kill damages what was written.
    assert not (workdir / "checkpoints_damaged").exists()
    return moments


def say(line: str) -> None:
    """Prints a line at once, for whoever watches."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Soaks, and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=CONFIG)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
        flags = (f"--config.train.num_steps={10 + 8 * args.kills}", "--config.train.eval_every=0")
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"
        rare = ("--config.checkpoint.every_steps=100000", "--config.train.log_every=1")
        run("train.py", "--workdir", str(straight), *rare, *flags, config=args.config)
        moments = soak(killed, args.config, args.kills, args.seed, *flags)
        assert_same_end(straight, killed)
    half = sum(", one left unfinished" in moment for moment in moments)
    say(f"{args.kills} kills, {half} of them left a write unfinished: parameters equal bit for bit")


if __name__ == "__main__":
    main()
