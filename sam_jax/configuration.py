"""Configs as frozen dataclasses made from mappings, strictly."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from sam_jax.errors import ConfigError

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], section: str) -> T:
    """A dataclass made from a config's section; lists become tuples.

    Args:
      cls: the dataclass.
      values: its fields.
      section: what to call the mapping in messages.

    Raises:
      ConfigError: if a key is no field, a field without a default is missing, or the dataclass
        refuses a value; the message names it, and the nearest field there is.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(fields)}"
            raise ConfigError(f"config.{section} has no field {key!r}; {hint}")
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise ConfigError(f"config.{section} lacks the field {name!r}")
    if None in values.values():
        _check_nones(cls, values, section)
    try:
        return cls(**{key: _frozen(value) for key, value in values.items()})
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.{section}: {error}") from error


def _check_nones(cls: type, values: Mapping[str, Any], section: str) -> None:
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        allowed = typing.get_args(hints[name])
        if value is None and hints[name] is not Any and type(None) not in allowed:
            raise ConfigError(f"config.{section}.{name} cannot be None")


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value
