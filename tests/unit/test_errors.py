"""Errors that end a program with a message, and those that end it with a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sam_jax.errors import readable_errors


@pytest.mark.parametrize(
    "error",
    # Without a plugin for CUDA JAX says nothing at all.
    [AssertionError(), RuntimeError("Unable to initialize backend 'tpu': no libtpu.so\nx")],
)
def test_devices_that_are_not_there_are_a_message(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def devices() -> None:
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(SystemExit) as end, readable_errors():
        devices()
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: JAX_PLATFORMS=cuda asks for devices that JAX does not find (")
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("a fault of the code")])
def test_other_errors_keep_their_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(type(error)), readable_errors():
        raise error


@pytest.mark.parametrize("kind", [AttributeError, KeyError])
def test_a_key_that_is_not_there_is_named(
    kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    """As ml_collections raises them for ``--config.train.num_step=3``."""
    hint = 'Did you mean "num_steps" instead of "num_step"?'
    for message, end in ((f"'num_step'\n{hint}", "; did you mean num_steps?"), ("'num_step'", "")):
        with pytest.raises(SystemExit), readable_errors(AttributeError, KeyError):
            raise kind(message)
        assert capsys.readouterr().err == (
            "error: a --config flag, or the config file, names a key that there is not: "
            f"num_step{end}\n"
        )


def test_the_exit_code_stays_where_nobody_reads() -> None:
    program = """
import os, sys
from sam_jax.errors import TRY_AGAIN, UserError, readable_errors
class Again(UserError):
    exit_code = TRY_AGAIN
print("before", flush=True)
sys.stdin.readline()
with readable_errors():
    print("lost")
    raise Again("lost, too")
"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        # Or what is printed would not wait for the end.
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        **pipes,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        process.stderr.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(timeout=60) == 75


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_names_that_are_not_utf8_are_printed(stream: str) -> None:
    program = f"""
import os, sys
from sam_jax.errors import readable_errors
with readable_errors():
    print(os.fsdecode(b"caf\\xe9.jpg"), file=sys.{stream})
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env={"PYTHONIOENCODING": "utf-8:strict"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert getattr(result, stream) == "caf\\udce9.jpg\n"
