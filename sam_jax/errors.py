"""Errors that whoever runs a program can mend: shown as a message, not as a traceback."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import NoReturn, TextIO

# What sysexits.h has for what may go better next time (EX_TEMPFAIL): the same command continues.
TRY_AGAIN = 75


class UserError(Exception):
    """Something outside the code is not as it must be; the message says what and where.

    Attributes:
      exit_code: 1 where somebody must mend something first, `TRY_AGAIN` where a scheduler may start
        the same command again.
    """

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A config asks for what does not exist or cannot be."""


@contextlib.contextmanager
def readable_errors(*others: type[Exception]) -> Iterator[None]:
    """Ends the program with a message and an exit code at an error that the user can mend.

    Anything else keeps its traceback: it is a fault of the code. What the program prints may hold
    any name of a file.

    Args:
      *others: what else is the user's to mend here.
    """
    mendable: tuple[type[Exception], ...] = (UserError, OSError, *others)
    # Names of files need not be UTF-8, and must not end a program that prints them.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except mendable as error:
        _print_last(f"error: {_said(error)}")
        sys.exit(exit_code_of(error))
    except (RuntimeError, AssertionError):
        reason = _missing_devices()
        if reason is None:
            raise
        _print_last(f"error: {reason}")
        sys.exit(1)


def _print_last(message: str) -> None:
    """Prints a program's last words; whoever read them may be gone, and the exit code must stay."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{message}\n")):
        try:
            if stream is not None:
                stream.write(text)
                stream.flush()
        except OSError:
            silence(stream)


def silence(stream: TextIO) -> None:
    """Sends to nowhere what a stream is still given, once nobody reads it any more."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def end_now(message: str, exit_code: int = 1) -> NoReturn:
    """Ends this process with a message, without waiting for others that may be gone.

    JAX's own shutdown waits for everybody, which a dead process never joins.
    """
    # Past Python's stream: a progress bar may stand in its place, another thread may hold its lock,
    # and nobody may read it.
    with contextlib.suppress(OSError, ValueError):
        if sys.__stderr__ is not None:
            # A progress bar hides the cursor of a terminal.
            shown = "\x1b[?25h" if sys.__stderr__.isatty() else ""
            text = f"{shown}error: {message}\n"
            os.write(sys.__stderr__.fileno(), text.encode("utf-8", "backslashreplace"))
    os._exit(exit_code)


def exit_code_of(error: Exception) -> int:
    """The exit code of a program that ends with an error."""
    return error.exit_code if isinstance(error, UserError) else 1


def _said(error: Exception) -> str:
    """The message of an error; ml_collections' own is a key in quotes, at times in two pairs."""
    if not isinstance(error, (AttributeError, KeyError)):
        return str(error)
    key, meant = (re.search(p, str(error)) for p in (r"\w+", r'Did you mean "(\w+)"'))
    hint = f"; did you mean {meant[1]}?" if meant else ""
    name = key[0] if key else error
    return f"a --config flag, or the config file, names a key that there is not: {name}{hint}"


def _missing_devices() -> str | None:
    """Message that says why JAX has no devices here, None if it has some.

    JAX itself says so at the first use of a device, in errors of several kinds that look like
    faults of the code.
    """
    platforms = os.environ.get("JAX_PLATFORMS")
    if not platforms or "jax" not in sys.modules:
        return None
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = (str(error) or "its plugin for them is not installed").splitlines()[0]
        return (
            f"JAX_PLATFORMS={platforms} asks for devices that JAX does not find ({reason}): "
            "install JAX for them, as in pip install 'jax[cuda12]' or 'jax[tpu]', or unset "
            "JAX_PLATFORMS to take what there is"
        )
    return None
