"""What ends a program with a message, and what with a traceback."""

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
