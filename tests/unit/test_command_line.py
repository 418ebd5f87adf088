"""Fields of configs that the command line sets to None."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from absl import app
from configs import command_line
from sam_jax.errors import readable_errors

@readable_errors()
def main(argv):
    print(json.dumps([command_line.sections(), argv[1:]]))

app.run(main, flags_parser=command_line.parse_flags)
"""


def parsed(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "--config", "configs/demo.py", *flags]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def test_none_is_none_whatever_a_field_holds() -> None:
    """A number, a text, a tuple; "none" is a word of some options, and stays one."""
    result = parsed(
        "--config.train.max_stall_seconds=None",
        "--config.train.init_from",
        "None",
        "-config.data.scale_jitter=None",
        "--config.model.kernels=none",
        "--config.train.num_steps",
        "7",
        "--config.model.encoder.patch_size=8",
        "--config.model.decoder.depth",
        "1",
        "--config.model.encoder.global_attention_blocks=(1, 3)",
        "left",
    )
    assert result.returncode == 0, result.stderr
    config, left = json.loads(result.stdout)
    for name in ("max_stall_seconds", "init_from"):
        assert config["train"][name] is None
    assert config["data"]["scale_jitter"] is None
    assert config["model"]["kernels"] == "none"
    assert config["train"]["num_steps"] == 7
    # Fields that the config does not name.
    assert config["model"]["encoder"]["patch_size"] == 8
    assert config["model"]["encoder"]["global_attention_blocks"] == [1, 3]
    assert config["model"]["decoder"]["depth"] == 1
    assert left == ["left"]


@pytest.mark.parametrize("flag", ["--config.train.lenght=None", "--config.nowhere.x=None"])
def test_a_field_that_there_is_not_is_named(flag: str) -> None:
    result = parsed(flag)
    assert result.returncode == 1
    assert "names a key that there is not: " in result.stderr
    assert "Traceback" not in result.stderr
