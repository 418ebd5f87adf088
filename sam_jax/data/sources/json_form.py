"""JSON annotation files, read strictly: an error says where, what stands there, and what should."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from sam_jax.buckets import DataPath
from sam_jax.images import MAX_SIDE_PX

Id: TypeAlias = int | str


class FormError(Exception):
    """A file is not in the form it should be in; the message says where, and what to do."""


def parse(path: DataPath) -> Any:
    """The content of a JSON file in which no object has a name twice.

    Raises:
      OSError: the file cannot be read.
      FormError: it is no JSON, or has a name twice.
    """
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormError(f"it is no JSON that can be read ({error})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. JSON itself would let the last of equal names win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FormError(f"one object has the name {twice!r} twice; merge what stands under both")
    return found


class Ids:
    """Ids of which no two may be the same."""

    def __init__(self, what: str, advice: str):
        self._what, self._advice = what, advice
        self._seen: dict[str, tuple[int, str]] = {}

    def add(self, number: int, value: Id, owner: str) -> Id:
        """The id; the number 1 and the string "1" are the same.

        Raises:
          FormError: another one has it already.
        """
        first, first_owner = self._seen.setdefault(str(value), (number, owner))
        if first != number:
            raise FormError(
                f"{self._what}[{first}] ({first_owner}) and {self._what}[{number}] ({owner}) have "
                f"the same id {value!r}; {self._advice}"
            )
        return value


def as_object(value: Any, where: str, expected: str = "an object") -> Mapping[str, Any]:
    """The value, which must be an object of JSON.

    Raises:
      FormError: it is none.
    """
    if not isinstance(value, dict):
        raise wrong(where, value, expected)
    return value


def records(content: Mapping[str, Any], field: str, where: str = "") -> Sequence[Mapping[str, Any]]:
    """The list of objects under a name.

    Args:
      content: where it stands.
      field: the name.
      where: the place of ``content`` in the file, for messages.

    Raises:
      FormError: it is missing, or something else.
    """
    place = f"{where}.{field}" if where else field
    found = content.get(field)
    if not isinstance(found, list):
        raise missing_or_wrong(content, field, place, "a list of objects")
    for number, record in enumerate(found):
        as_object(record, f"{place}[{number}]")
    return found


def identifier(record: Mapping[str, Any], field: str, where: str) -> Id:
    """The id under a name: a whole number, or any string.

    Raises:
      FormError: it is missing, or something else.
    """
    value = record.get(field)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise missing_or_wrong(record, field, f"{where}.{field}", "a whole number or a string")
    return value


def other_spelling(value: Id) -> Id | None:
    """The string of a number, or the number of a string."""
    if isinstance(value, int):
        return str(value)
    return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None


def text(record: Mapping[str, Any], field: str, where: str, expected: str) -> str:
    """The text under a name, which is more than spaces.

    Raises:
      FormError: it is missing, empty, or something else.
    """
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise missing_or_wrong(record, field, f"{where}.{field}", expected)
    return value


def image_size(
    record: Mapping[str, Any],
    where: str,
    owner: str,
    fields: tuple[str, str] = ("height", "width"),
) -> tuple[int, int] | None:
    """Height and width in pixels; None where the record does not say both.

    Args:
      record: where they stand.
      where: its place in the file.
      owner: the image, for messages.
      fields: the names of height and width.

    Raises:
      FormError: one is no number of pixels that a picture can have.
    """
    sides = []
    for field in fields:
        side = record.get(field)
        if isinstance(side, float) and math.isfinite(side) and side.is_integer():
            side = int(side)
        if side is None:
            continue
        if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= MAX_SIDE_PX:
            raise wrong(
                f"{where}.{field} of {owner!r}",
                side,
                f"a whole number of pixels from 1 to {MAX_SIDE_PX:,}, or no such field: then the "
                "picture's own size is taken",
            )
        sides.append(side)
    return (sides[0], sides[1]) if len(sides) == 2 else None


def flag(record: Mapping[str, Any], field: str, where: str) -> bool:
    """The truth under a name, 0 or 1; missing or null is 0.

    Raises:
      FormError: it is something else.
    """
    value = record.get(field)
    if value is not None and (not isinstance(value, (int, float)) or value not in (0, 1)):
        raise wrong(f"{where}.{field}", value, "0 or 1")
    return bool(value)


def missing_or_wrong(record: Mapping[str, Any], field: str, where: str, expected: str) -> FormError:
    """The error of a field that is not as expected."""
    if field not in record:
        return FormError(f"{where} is missing; expected {expected}")
    return wrong(where, record[field], expected)


def wrong(where: str, found: Any, expected: str) -> FormError:
    """The error of a value that is not as expected."""
    return FormError(f"{where} is {found!r:.80}; expected {expected}")
