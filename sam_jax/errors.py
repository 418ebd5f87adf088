"""Errors that whoever runs a program can mend: shown as a message, not as a traceback."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """Something outside the code is not as it must be; the message says what and where."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A config asks for what does not exist or cannot be."""


@contextlib.contextmanager
def readable_errors(*others: type[Exception]) -> Iterator[None]:
    """Ends the program with a message and an exit code at an error that the user can mend.

    Anything else keeps its traceback: it is a fault of the code.

    Args:
      *others: what else is the user's to mend here.
    """
    mendable: tuple[type[Exception], ...] = (UserError, OSError, *others)
    try:
        yield
    except mendable as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
