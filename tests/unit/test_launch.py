"""Files that start training on clusters: whole, and of one mind with the programs on exit codes."""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from sam_jax.errors import TRY_AGAIN, UserError

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ("slurm.sbatch", "cloud_tpu.sh")
# That of train.py, and of signals, one of them of JAX's service when it lost a host: a shell adds
# 128 to their numbers.
START_AGAIN = {TRY_AGAIN, *(128 + n for n in (signal.SIGABRT, signal.SIGKILL, signal.SIGTERM))}


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment in which clusters' programs are stand-ins that log how they were called.

    What takes the place of train.py ends with the next of the codes in the file ``codes``.
    """
    folder = tmp_path / "programs"
    folder.mkdir()
    log = f'echo "$(basename "$0")" "$@" >> {tmp_path}/log\n'
    take = f"code=$(head -1 {tmp_path}/codes); sed -i 1d {tmp_path}/codes; exit $code\n"
    for name, body in {"python": take, "srun": take, "scontrol": "", "sleep": ""}.items():
        (folder / name).write_text(f"#!/bin/bash\n{log}{body}")
        (folder / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(folder / "python"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "a",
    }


def run(arguments: list[str], environment: dict[str, str], *codes: int) -> tuple[int, list[str]]:
    """The exit code of a script, and what it called, while train.py ends with these codes."""
    folder = Path(environment["SLURM_SUBMIT_DIR"])
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    (folder / "log").write_text("")
    ended = subprocess.run(
        ["bash", *arguments], env=environment, cwd=folder, capture_output=True, check=False
    )
    return ended.returncode, (folder / "log").read_text().splitlines()


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_whole(name: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
    (compared,) = re.findall(r"\$code =~ \^\(([\d|]+)\)\$", (LAUNCH / name).read_text())
    assert {int(code) for code in compared.split("|")} == START_AGAIN


def test_the_codes_are_documented() -> None:
    text = (ROOT / "docs/runs.md").read_text()
    rows = re.findall(r"^\| (\d+) .*\| start the same", text, re.MULTILINE)
    assert {int(code) for code in rows} >= START_AGAIN


@pytest.mark.parametrize("code", [*sorted(START_AGAIN), 0, UserError.exit_code])
def test_slurm_puts_back_what_may_go_better(code: int, programs: dict[str, str]) -> None:
    script = [str(LAUNCH / "slurm.sbatch"), "--workdir", "x"]
    ended, called = run(script, programs, code)
    assert ended == code
    assert called[0].endswith("train.py --distributed --workdir x")
    assert ("scontrol requeue 7" in called) == (code in START_AGAIN)
    _, called = run(script, {**programs, "SLURM_RESTART_COUNT": "100"}, code)
    assert "scontrol requeue 7" not in called


def test_a_host_of_a_tpu_starts_again_what_may_go_better(programs: dict[str, str]) -> None:
    script = [str(LAUNCH / "cloud_tpu.sh"), "here", "--config", "c.py:gs://b/*.tar"]
    once = "python train.py --distributed --config c.py:gs://b/*.tar"
    ended, called = run(script, programs, *sorted(START_AGAIN), 0, 0)
    assert (ended, called.count(once)) == (0, 1 + len(START_AGAIN))
    ended, called = run(script, programs, UserError.exit_code, 0)
    assert (ended, called) == (UserError.exit_code, [once])
    ended, called = run(script, {**programs, "MOST_RESTARTS": "2"}, *[TRY_AGAIN] * 9)
    assert (ended, called.count(once)) == (TRY_AGAIN, 3)


def test_commands_for_a_tpu(programs: dict[str, str]) -> None:
    environment = {**programs, "TPU": "sam", "ZONE": "z", "GCLOUD": "echo gcloud"}

    def said(*arguments: str) -> list[str]:
        script = ["bash", str(LAUNCH / "cloud_tpu.sh"), *arguments]
        ended = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
        return ended.stdout.strip().split(" --command=")

    (created,) = said("create", "v5litepod-64", "v2-alpha-tpuv5-lite")
    assert created == (
        "gcloud compute tpus queued-resources create sam --node-id=sam --zone=z "
        "--accelerator-type=v5litepod-64 --runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    place, command = said("train", "--config", "c.py:gs://b/*.tar", "--workdir", "/a b")
    assert place == "gcloud compute tpus tpu-vm ssh sam --zone=z --worker=all"
    words = shlex.split(command)
    # It outlives the connection.
    assert words[words.index("here") - 2] == "nohup"
    assert words[words.index("here") : words.index(">>train.log")] == [
        "here",
        "--config",
        "c.py:gs://b/*.tar",
        "--workdir",
        "/a b",
    ]
    _, command = said("install", "https://host/sam_jax.git")
    subprocess.run(["bash", "-nc", command], check=True)
    usage = subprocess.run(["bash", str(LAUNCH / "cloud_tpu.sh")], capture_output=True, check=False)
    assert usage.returncode == 2


def test_the_jobset_holds_together() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML, which ml_collections brings")
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (hosts,) = jobset["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    program, *arguments = container["command"][1:]
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)

    # Flags of the program, a config that is there, and as many processes as pods.
    assert set(flags) <= {
        "config",
        *re.findall(r'DEFINE_\w+\("(\w+)"', (ROOT / program).read_text()),
    }
    assert (ROOT / flags["config"]).is_file()
    assert flags["process"] == f"$(PROCESS)/{job['completions']}"
    assert job["parallelism"] == job["completions"]
    assert {variable["name"] for variable in container["env"]} >= {"PROCESS"}
    # The first pod, by the name that JobSet gives it.
    name, (port,) = jobset["metadata"]["name"], container["ports"]
    assert flags["coordinator"] == f"{name}-{hosts['name']}-0-0.{name}:{port['containerPort']}"
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    # What somebody must mend ends it, and all else starts it again.
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"], codes["values"]) == (
        "FailJob",
        "In",
        [UserError.exit_code],
    )
    assert codes["containerName"] == container["name"]
    first, last = jobset["spec"]["failurePolicy"]["rules"]
    assert (first["action"], first["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert (last["action"], "onJobFailureReasons" in last) == ("RestartJobSet", False)
    assert pod["restartPolicy"] == "Never"
