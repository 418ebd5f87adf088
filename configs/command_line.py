"""Configs from the command line of train.py and eval.py."""

import functools
import operator
import re
from typing import Any

from absl import app
from ml_collections import config_flags

from sam_jax.errors import readable_errors

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_NONE = "None"
_FIELD = re.compile(r"--?config\.([\w.]+)")
_FIELD_OF_NONE = re.compile(f"{_FIELD.pattern}={_NONE}")
_set_to_none: list[str] = []


@readable_errors(AttributeError, KeyError)
def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags, of which ``--config.X.Y=None`` means None, whatever the field's type is.

    Returns:
      The arguments that are no flags.
    """
    left: list[str] = []
    for argument in argv:
        # A value may be the next argument.
        if argument == _NONE and left and _FIELD.fullmatch(left[-1]):
            argument = f"{left.pop()}={_NONE}"
        if match := _FIELD_OF_NONE.fullmatch(argument):
            _set_to_none.append(match[1])
        else:
            left.append(argument)
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
