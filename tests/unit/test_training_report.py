"""Profiles of some steps."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from sam_jax.training.report import Profile, Reporter
from sam_jax.training.sinks import TensorBoardSink


@pytest.mark.parametrize(
    ("steps", "first_step", "is_written"),
    [((2, 3), 1, True), ((2, 3), 3, False), (None, 1, False), ((2, 9), 1, True)],
    ids=["some", "before-it-continued", "none", "the-last-is-not-reached"],
)
def test_a_profile_is_of_the_steps_asked_for(
    steps: tuple[int, int] | None,
    first_step: int,
    is_written: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reporter = Reporter(tmp_path, 5)
    profile = Profile(steps, reporter)
    double = jax.jit(lambda x: 2 * x)
    try:
        for step in range(first_step, 5):
            profile.before(step)
            profile.after(step, double(jnp.ones(3)))
    finally:
        profile.close()
        reporter.close()
    assert bool(list(tmp_path.glob("profile/**/*.pb"))) == is_written
    assert ("a profile is in" in capsys.readouterr().err) == is_written


@pytest.mark.parametrize(
    ("numbers", "line"),
    [
        ({"cats/box": 0.5, "mean/box": 0.25, "mean/loss": 12345.678}, "box 0.25  loss 1.235e+04"),
        ({"ODS": 0.5, "AP": 1.0}, "ODS 0.5  AP 1"),
        (
            {f"mean/center_{n}": 0.5 for n in range(10)},
            " center_7 0.5  and 2 more in metrics.jsonl",
        ),
    ],
)
def test_an_evaluation_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], numbers: dict[str, float], line: str
) -> None:
    reporter = Reporter(tmp_path, 5)
    reporter.evaluation(3, "val", SimpleNamespace(as_flat_dict=lambda: numbers, pictures={}))
    reporter.close()
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("evaluation val at step 3: ")
    assert said.endswith(" ".join(line.split()))


def test_a_full_disk_is_an_error_that_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        raise OSError(28, "No space left on device")

    reporter = Reporter(tmp_path, 5)
    reporter.begin()
    (sink,) = (sink for sink in reporter._sinks if isinstance(sink, TensorBoardSink))
    monkeypatch.setattr(sink._events, "write_event", write)
    report = SimpleNamespace(as_flat_dict=lambda: {"a": 1.0}, pictures={})
    with pytest.raises(OSError, match=r"tensorboard takes no more numbers \(.*No space left"):
        reporter.evaluation(2, "x", report)
    reporter.close()
