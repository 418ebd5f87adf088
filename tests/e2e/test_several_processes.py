"""Runs of two processes over the loopback, as runs of two hosts are."""

import contextlib
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from sam_jax.checkpoint import restore_variables
from tests.e2e.programs import (
    PRETRAINING,
    Program,
    logged,
    run,
    runner_limit,
    saved_steps,
    start,
)

pytestmark = runner_limit

# It is processes that count here, and what stops a run is all that it is asked for.
PLAIN = ("--config.train.log_every=1", "--config.train.eval_every=0")
# The first half of the devices, and of the images of a step, is one process's.
SHARDED = ("--config.sharding.data=2", "--config.sharding.fsdp=2", *PLAIN)
RARE = "--config.checkpoint.every_steps=100000"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def two_processes(*flags: str) -> Iterator[tuple[Program, Program]]:
    """Both with half of the four devices; they end with the block at the latest."""
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    with (
        start(
            "train.py", coordinator, "--process=0/2", *flags, devices=2, config=PRETRAINING
        ) as first,
        start(
            "train.py", coordinator, "--process=1/2", *flags, devices=2, config=PRETRAINING
        ) as second,
    ):
        yield first, second


def assert_close_parameters(first: Path, second: Path, step: int) -> None:
    """All but biases of keys: softmax does not see them, so Adam makes steps of their rounding."""
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(restore_variables(first, step)),
        jax.tree.leaves(restore_variables(second, step)),
        strict=True,
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("k_proj/bias"):
            continue
        if name.endswith("qkv/bias"):
            ours, theirs = (np.delete(np.reshape(x, (3, -1)), 1, axis=0) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=name)


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """One of them frozen, both resumed and preempted, continued on another mesh, as one does."""
    workdir = tmp_path / "two"
    flags = ("--workdir", str(workdir), *SHARDED)
    endless = "--config.train.num_steps=100000"
    with two_processes(*flags, endless, "--config.checkpoint.every_steps=5") as (first, second):
        first.wait_until("its first checkpoint", lambda: saved_steps(workdir) != [])
        # One step later, none is being written: Orbax says with a traceback that it was left alone.
        step = first.output.count("\nstep ") + 1
        first.wait_for_line(f"step {step}/")
        # As a host that is frozen or has lost its network, which closes no connection.
        second.send(signal.SIGSTOP)
        output = first.fail(seconds=120)
        # Once it thaws, it finds itself alone, or JAX's service does: whichever looks first.
        second.send(signal.SIGCONT)
        alone = second.fail()
    assert "4 cpu device(s) of 2 process(es), data 2 x fsdp 2 x tensor 1" in output
    assert "another task died" in output
    assert "Traceback" not in output
    assert "another one ended" in alone or "another task died" in alone

    killed_at = saved_steps(workdir)[-1]
    with two_processes(*flags, endless, RARE) as both:
        both[0].wait_for_line(f"step {killed_at + 1}/")
        both[1].send(signal.SIGTERM)
        first_says, second_says = (process.end(75) for process in both)
    assert f"continuing from the checkpoint of step {killed_at}" in first_says
    assert "the same command continues" in first_says
    # The other one has nothing to say.
    assert "\nstep " not in f"\n{second_says}"
    assert "data 2" not in second_says

    stopped_at = saved_steps(workdir)[-1]
    assert stopped_at > killed_at
    of_both = json.loads((workdir / "data.json").read_text())
    last = f"--config.train.num_steps={stopped_at + 2}"
    # On half of the devices, each of which has a whole copy of what four had in halves.
    mesh = ("--config.sharding.data=2", "--config.sharding.fsdp=1", *PLAIN)
    arguments = ("--workdir", str(workdir), *mesh, last, RARE)
    output = run("train.py", *arguments, devices=2, config=PRETRAINING)
    assert f"continuing from the checkpoint of step {stopped_at}" in output
    assert "2 cpu device(s) of 1 process(es), data 2 x fsdp 1 x tensor 1" in output

    straight = tmp_path / "one"
    output = run("train.py", "--workdir", str(straight), *PLAIN, last, RARE, config=PRETRAINING)
    assert "1 cpu device(s) of 1 process(es)" in output
    # Half of the images are each process's, and both are counted.
    of_one = json.loads((straight / "data.json").read_text())
    assert of_both["processes"] == 2
    assert of_both["samples_read"] * (stopped_at + 2) == of_one["samples_read"] * stopped_at
    two, one = logged(workdir), logged(straight)
    for tag in ("train/loss", "train/gradient_norm"):
        # What a process that was ended had not written yet is lost, and nothing else.
        steps = sorted(two[tag])
        assert set(one[tag]) >= set(steps) >= {s for s in one[tag] if s > killed_at}
        np.testing.assert_allclose(
            [two[tag][s] for s in steps], [one[tag][s] for s in steps], rtol=1e-5, err_msg=tag
        )
    assert_close_parameters(workdir, straight, stopped_at + 2)
