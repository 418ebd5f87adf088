"""Configs from the command line of train.py and eval.py."""

import functools
import operator
import re
from typing import Any

from absl import app
from ml_collections import config_flags

from sam_jax.errors import readable_errors

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
# With its value, or with the value as the next argument.
_FIELD = re.compile(r"--?config\.([\w.]+)(?:=(.*))?", re.DOTALL)
_NONE = "None"
_set_to_none: list[str] = []


@readable_errors(AttributeError, KeyError)
def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags, of which ``--config.X.Y=None`` means None, whatever the field's type is.

    Returns:
      The arguments that are no flags.
    """
    left, arguments = [], iter(argv)
    for argument in arguments:
        if (match := _FIELD.fullmatch(argument)) is None:
            left.append(argument)
            continue
        path, value = match.groups()
        words = [argument] if value is not None else [argument, *[next(arguments, "")]]
        if (words[-1] if value is None else value) == _NONE:
            _set_to_none.append(path)
        else:
            left += words
    positional: list[str] = app.parse_flags_with_usage(left)
    return positional


def sections() -> dict[str, Any]:
    """The config's sections, with what the command line says."""
    found: dict[str, Any] = _CONFIG.value.to_dict()
    for path in _set_to_none:
        *names, field = path.split(".")
        # All are there: that was checked when the config was read.
        functools.reduce(operator.getitem, names, found)[field] = None
    return found
