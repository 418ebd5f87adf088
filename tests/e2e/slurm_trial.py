"""A run of two tasks under a Slurm of its own, preempted and requeued by it in the middle.

apt-get install slurm-wlm munge, then as root: python -m tests.e2e.slurm_trial [STEPS]

Starts munged, slurmctld and slurmd for one node, this computer, in a temporary folder. Its log is
in docs/launch.md. Slurm is not what the tests are installed with, so this is none of them.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.e2e.programs import COMPILED_QUICKLY, ONE_ROUND

ROOT = Path(__file__).parents[2]
# Enough that the run has not ended before Slurm takes its node.
NUM_STEPS = 300
# Two partitions on one node: jobs of the second take it from those of the first, which have a
# minute to save and are put back into the queue.
SETTINGS = """
ClusterName=trial
SlurmctldHost=localhost
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=30
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=5,bf_interval=5
NodeName=localhost CPUs=2 State=UNKNOWN
PartitionName=low Nodes=localhost Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=localhost PriorityTier=2 PreemptMode=OFF
"""


def main() -> None:
    """Submits the run and what preempts it, and prints the run's log once it has ended."""
    num_steps = int(sys.argv[1]) if sys.argv[1:] else NUM_STEPS
    with tempfile.TemporaryDirectory(prefix="slurm-trial-") as name:
        folder = Path(name)
        with _slurm(folder):
            workdir, log = folder / "run", folder / "run.log"
            job = _submit(
                "--partition=low",
                "--ntasks=2",
                "--cpus-per-task=1",
                f"--output={log}",
                "launch/slurm.sbatch",
                "--config=tests/e2e/tiny_run.py",
                f"--workdir={workdir}",
                f"--config.train.num_steps={num_steps}",
                "--config.checkpoint.every_steps=20",
                *ONE_ROUND,
            )
            _wait(lambda: list((workdir / "checkpoints").glob("[0-9]*")) or _has_ended(job))
            _submit("--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
            _wait(lambda: _has_ended(job))
            sys.stdout.write(log.read_text().replace(str(folder), "/shared"))
            sys.stdout.write(_called("scontrol", "show", "job", job))


@contextlib.contextmanager
def _slurm(folder: Path) -> Iterator[None]:
    """A Slurm of one node for this process and those it starts."""
    settings = folder / "slurm.conf"
    settings.write_text(SETTINGS.format(folder=folder))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    os.environ |= {
        "SLURM_CONF": str(settings),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": COMPILED_QUICKLY,
    }
    options = [
        f"--{what}={folder}/munge.{ending}"
        for what, ending in {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }.items()
    ]
    daemons = [
        subprocess.Popen(["munged", "--foreground", "--force", *options]),
        subprocess.Popen(["slurmctld", "-D", "-f", settings]),
        subprocess.Popen(["slurmd", "-D", "-N", "localhost", "-f", settings]),
    ]
    try:
        _wait(lambda: "idle" in _called("sinfo", "--noheader", "--format=%T"))
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def _submit(*options: str) -> str:
    """The number of the job that sbatch makes of these."""
    return _called("sbatch", "--parsable", *options).strip()


def _has_ended(job: str) -> bool:
    state = _called("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()
    return state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def _called(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def _wait(is_so: Callable[[], Any], seconds: float = 3600) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            sys.exit("the trial took too long")
        time.sleep(0.5)


if __name__ == "__main__":
    main()
