"""Configs from the command line of train.py and eval.py."""

import ast
import functools
import operator
import re
import sys
from typing import Any

from absl import app
from ml_collections import config_flags

from sam_jax.errors import readable_errors

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_NONE = "None"
_FIELD = re.compile(r"--?config\.([\w.]+)")
_FIELD_OF_NONE = re.compile(f"{_FIELD.pattern}={_NONE}")
_set_to_none: list[str] = []
# What differs from the variant's shape: a config names few of these fields, and any can be set.
_SHAPE_FIELD = re.compile(r"--?config\.model\.(encoder|decoder)\.(\w+)(?:=(.*))?")
_shape_fields: list[tuple[str, str, Any]] = []


@readable_errors(AttributeError, KeyError)
def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags, ``--config.X.Y=None`` for a field of any type and the model's shape among them.

    Returns:
      The arguments that are no flags.
    """
    argv = _without_shape_fields(argv)
    left: list[str] = []
    for argument in argv:
        # A value may be the next argument.
        if argument == _NONE and left and _FIELD.fullmatch(left[-1]):
            argument = f"{left.pop()}={_NONE}"
        if match := _FIELD_OF_NONE.fullmatch(argument):
            _set_to_none.append(match[1])
        else:
            left.append(argument)
    # ml_collections looks there for the fields that a config must have.
    given, sys.argv = sys.argv, argv
    try:
        positional: list[str] = app.parse_flags_with_usage(left)
    finally:
        sys.argv = given
    return positional


def _without_shape_fields(argv: list[str]) -> list[str]:
    """The arguments but for those of the model's shape, which are kept for ``sections``."""
    left: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if match := _SHAPE_FIELD.fullmatch(argument):
            value = next(arguments, "") if match[3] is None else match[3]
            _shape_fields.append((match[1], match[2], _literal(value)))
        else:
            left.append(argument)
    return left


def sections() -> dict[str, Any]:
    """The config's sections, with what the command line says."""
    found: dict[str, Any] = _CONFIG.value.to_dict()
    for path in _set_to_none:
        *names, field = path.split(".")
        # All are there: that was checked when the config was read.
        functools.reduce(operator.getitem, names, found)[field] = None
    for part, field, value in _shape_fields:
        found["model"][part] = {**found["model"].get(part, {}), field: value}
    return found


def _literal(text: str) -> Any:
    """The value of a Python literal; the text itself if it is none."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
