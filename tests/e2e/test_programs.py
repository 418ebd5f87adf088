"""A program that hangs or ends too early is named, with what it printed, before pytest gives up."""

import sys

import pytest

from tests.e2e.programs import MOST_WAITS, WAIT_SECONDS, Program, runner_limit

PYTHON = [sys.executable, "-uc"]


def test_a_wait_ends_before_the_runner_s_limit(pytestconfig: pytest.Config) -> None:
    (limit,) = runner_limit.args
    assert limit > MOST_WAITS * WAIT_SECONDS
    assert float(pytestconfig.getini("timeout")) > WAIT_SECONDS


def test_a_program_that_hangs_is_named_with_what_it_printed() -> None:
    with Program([*PYTHON, "import time; print('half way'); time.sleep(600)"]) as program:
        program.wait_for_line("half way")
        with pytest.raises(pytest.fail.Exception, match=r"half way\n[^$]*come to its end in 0.1 s"):
            program.end(seconds=0.1)


def test_a_program_that_ends_too_early_is_named_with_what_it_printed() -> None:
    with Program([*PYTHON, "print('no such thing'); raise SystemExit(3)"]) as program:
        with pytest.raises(pytest.fail.Exception, match=r"no such thing\n[^$]*ended with 3 before"):
            program.wait_for_line("step 3/")
        with pytest.raises(AssertionError, match="no such thing"):
            program.end()
        assert "no such thing" in program.end(3)
        assert "no such thing" in program.fail()
