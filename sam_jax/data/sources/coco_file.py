"""A COCO instance file, read and checked: its images with what is marked in each."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError
from sam_jax.images import MAX_SIDE_PX

Id: TypeAlias = int | str

CROWD = "annotations of a crowd (iscrowd)"
NO_SEGMENTATION = "annotations without a segmentation"
OF_NO_IMAGE = "annotations of an image that is not in the file"
UNANNOTATED = "images without an annotation in use"


class CocoImage(NamedTuple):
    """An image of the file.

    Attributes:
      file_name: as it stands there.
      hw: height and width in pixels; None where the file does not say.
      segmentations: of the annotations in use, with the number of each in the file.
    """

    file_name: str
    hw: tuple[int, int] | None
    segmentations: list[tuple[int, Any]]


def read_coco(path: Path, keep_crowds: bool) -> tuple[list[CocoImage], Tally]:
    """The images that have an annotation to use, and what was left out of the file.

    Args:
      path: the JSON.
      keep_crowds: whether annotations with iscrowd are used like others.

    Raises:
      OSError: the file cannot be read.
      ConfigError: it is not in COCO form, or ids do not tell one thing from another; the message
        names the place, what stands there, and what should.
    """
    try:
        return _read(_parse(path), keep_crowds)
    except _FormError as error:
        raise ConfigError(f"{path} is not a COCO instance file: {error}") from error


class _FormError(Exception):
    """A file is not in COCO form; the message says where, and what to do."""


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _FormError(f"it is no JSON that can be read ({error})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. JSON itself would let the last of equal names win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _FormError(f"one object has the name {twice!r} twice; merge what stands under both")
    return found


def _read(content: Any, keep_crowds: bool) -> tuple[list[CocoImage], Tally]:
    if not isinstance(content, Mapping):
        raise _wrong("the file", content, "an object with images and annotations")
    records = _records(content, "images")
    annotations = _records(content, "annotations")
    images: dict[Id, CocoImage] = {}
    ids = _Ids("images", "give each image an id of its own, as when files are merged")
    for number, record in enumerate(records):
        name = _file_name(record, f"images[{number}]")
        image_id = ids.add(number, _id(record, "id", f"images[{number}]"), repr(name))
        images[image_id] = CocoImage(name, _size(record, f"images[{number}]"), [])
    _check_categories(content)

    left_out = Tally()
    spelled_otherwise = {_other_spelling(image_id): image_id for image_id in images}
    own_ids = _Ids("annotations", "number the annotations anew, as when files are merged")
    for number, annotation in enumerate(annotations):
        where = f"annotations[{number}]"
        if annotation.get("id") is not None:
            own_id = _id(annotation, "id", where)
            own_ids.add(number, own_id, f"image_id {annotation.get('image_id')!r}")
        image_id = _id(annotation, "image_id", where)
        if image_id not in images and image_id in spelled_otherwise:
            raise _FormError(
                f"{where}.image_id is {image_id!r}, but the image's id is "
                f"{spelled_otherwise[image_id]!r}: write both as numbers, or both as strings"
            )
        reason = _reason_to_leave_out(annotation, where, image_id in images, keep_crowds)
        if reason:
            left_out.add(reason, f"{where} with image_id {image_id!r}")
        else:
            images[image_id].segmentations.append((number, annotation["segmentation"]))
    used = [image for image in images.values() if image.segmentations]
    for image in images.values():
        if not image.segmentations:
            left_out.add(UNANNOTATED, repr(image.file_name))
    return used, left_out


def _reason_to_leave_out(
    annotation: Mapping[str, Any], where: str, has_image: bool, keep_crowds: bool
) -> str | None:
    crowd = annotation.get("iscrowd")
    if crowd is not None and (not isinstance(crowd, (int, float)) or crowd not in (0, 1)):
        raise _wrong(f"{where}.iscrowd", crowd, "0 or 1")
    if not has_image:
        return OF_NO_IMAGE
    if annotation.get("segmentation") in (None, [], {}, ""):
        return NO_SEGMENTATION
    return CROWD if crowd and not keep_crowds else None


class _Ids:
    """Ids of which no two may be the same."""

    def __init__(self, what: str, advice: str):
        self._what, self._advice = what, advice
        self._seen: dict[str, tuple[int, str]] = {}

    def add(self, number: int, value: Id, owner: str) -> Id:
        """The id; the number 1 and the string "1" are the same.

        Raises:
          _FormError: another one has it already.
        """
        first, first_owner = self._seen.setdefault(str(value), (number, owner))
        if first != number:
            raise _FormError(
                f"{self._what}[{first}] ({first_owner}) and {self._what}[{number}] ({owner}) have "
                f"the same id {value!r}; {self._advice}"
            )
        return value


def _check_categories(content: Mapping[str, Any]) -> None:
    """Categories are not read, but two with one id show that files were merged wrongly."""
    if content.get("categories") is None:
        return
    ids = _Ids("categories", "give each category an id of its own, as when files are merged")
    for number, category in enumerate(_records(content, "categories")):
        category_id = _id(category, "id", f"categories[{number}]")
        ids.add(number, category_id, repr(category.get("name")))


def _records(content: Mapping[str, Any], field: str) -> Sequence[Mapping[str, Any]]:
    records = content.get(field)
    if not isinstance(records, list):
        raise _missing_or_wrong(content, field, field, "a list of objects")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise _wrong(f"{field}[{number}]", record, "an object")
    return records


def _id(record: Mapping[str, Any], field: str, where: str) -> Id:
    value = record.get(field)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise _missing_or_wrong(record, field, f"{where}.{field}", "a whole number or a string")
    return value


def _other_spelling(value: Id) -> Id | None:
    """The string of a number, or the number of a string."""
    if isinstance(value, int):
        return str(value)
    return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None


def _file_name(record: Mapping[str, Any], where: str) -> str:
    name = record.get("file_name")
    if not isinstance(name, str) or not name.strip():
        raise _missing_or_wrong(record, "file_name", f"{where}.file_name", "the name of a file")
    return name


def _size(record: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    sides = []
    for field in ("height", "width"):
        side = record.get(field)
        if isinstance(side, float) and math.isfinite(side) and side.is_integer():
            side = int(side)
        if side is None:
            continue
        if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= MAX_SIDE_PX:
            raise _wrong(
                f"{where}.{field} of {record['file_name']!r}",
                side,
                f"a whole number of pixels from 1 to {MAX_SIDE_PX:,}, or no such field: then the "
                "picture's own size is taken",
            )
        sides.append(side)
    return (sides[0], sides[1]) if len(sides) == 2 else None


def _missing_or_wrong(
    record: Mapping[str, Any], field: str, where: str, expected: str
) -> _FormError:
    if field not in record:
        return _FormError(f"{where} is missing; expected {expected}")
    return _wrong(where, record[field], expected)


def _wrong(where: str, found: Any, expected: str) -> _FormError:
    shown = f"{found!r:.80}"
    return _FormError(f"{where} is {shown}; expected {expected}")
