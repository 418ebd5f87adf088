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


class LabelledAnnotation(NamedTuple):
    """An annotation with all that scoring looks at.

    Attributes:
      number: its place in the file.
      category_id: its category's.
      segmentation: polygons or an RLE, not checked yet.
      area: the file's, in pixels; None where it does not say.
      bbox: the file's ``[x, y, w, h]``; None where it does not say.
      is_crowd: whether it marks a group, COCO's ``iscrowd``.
    """

    number: int
    category_id: int
    segmentation: Any
    area: float | None
    bbox: tuple[float, float, float, float] | None
    is_crowd: bool


class LabelledImage(NamedTuple):
    """An image with its annotations, of which there may be none.

    Attributes:
      image_id: as it stands in the file.
      file_name: likewise; of LVIS v1, which has none, the end of ``coco_url``.
      hw: height and width in pixels; None where the file does not say.
      annotations: all that have a segmentation.
      negative: LVIS's ``neg_category_ids``: categories that are certainly not in the image.
      not_exhaustive: LVIS's ``not_exhaustive_category_ids``: not all of their objects are marked.
    """

    image_id: Id
    file_name: str
    hw: tuple[int, int] | None
    annotations: list[LabelledAnnotation]
    negative: frozenset[int]
    not_exhaustive: frozenset[int]


class Category(NamedTuple):
    """A category; ``frequency`` is LVIS's "r", "c" or "f" (rare, common, frequent)."""

    category_id: int
    name: str
    frequency: str | None


class LabelledFile(NamedTuple):
    """A file of instances with their categories.

    Attributes:
      images: by rising id, as COCO's own evaluation takes them; also those without annotations.
      categories: by rising id.
      is_federated: whether images have LVIS's lists of categories.
      left_out: annotations that are not used.
    """

    images: list[LabelledImage]
    categories: list[Category]
    is_federated: bool
    left_out: Tally


def read_labelled(path: Path) -> LabelledFile:
    """All images of a COCO or LVIS file with categories, crowds, and LVIS's lists.

    Raises:
      OSError: the file cannot be read.
      ConfigError: see ``read_coco``; or a category that an annotation has is not in the file.
    """
    try:
        return _labelled(_parse(path))
    except _FormError as error:
        raise ConfigError(f"{path} is not a COCO or LVIS instance file: {error}") from error


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


def _labelled(content: Any) -> LabelledFile:
    if not isinstance(content, Mapping):
        raise _wrong("the file", content, "an object with images, annotations and categories")
    records = _records(content, "images")
    annotations = _records(content, "annotations")
    categories = [
        _category(category, f"categories[{number}]")
        for number, category in enumerate(_records(content, "categories"))
    ]
    _check_categories(content)
    known = {category.category_id for category in categories}
    images: dict[Id, LabelledImage] = {}
    ids = _Ids("images", "give each image an id of its own, as when files are merged")
    for number, record in enumerate(records):
        where = f"images[{number}]"
        name = _file_name(_with_name(record), where)
        image_id = ids.add(number, _id(record, "id", where), repr(name))
        negative, not_exhaustive = (
            _category_ids(record, field, where)
            for field in ("neg_category_ids", "not_exhaustive_category_ids")
        )
        size = _size({**record, "file_name": name}, where)
        images[image_id] = LabelledImage(image_id, name, size, [], negative, not_exhaustive)
    left_out = Tally()
    for number, annotation in enumerate(annotations):
        where = f"annotations[{number}]"
        image_id = _id(annotation, "image_id", where)
        reason = _reason_to_leave_out(annotation, where, image_id in images, keep_crowds=True)
        if reason:
            left_out.add(reason, f"{where} with image_id {image_id!r}")
            continue
        category_id = _whole_id(annotation, "category_id", where)
        if category_id not in known:
            raise _wrong(f"{where}.category_id", category_id, "the id of one of the categories")
        images[image_id].annotations.append(
            LabelledAnnotation(
                number,
                category_id,
                annotation["segmentation"],
                _area(annotation, where),
                _bbox(annotation, where),
                bool(annotation.get("iscrowd")),
            )
        )
    return LabelledFile(
        sorted(
            images.values(), key=lambda image: (isinstance(image.image_id, str), image.image_id)
        ),
        sorted(categories),
        any("neg_category_ids" in record for record in records),
        left_out,
    )


def _with_name(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """An image with a name: LVIS v1 has URLs only, of which folder and file are taken."""
    url = record.get("coco_url")
    if "file_name" in record or not isinstance(url, str):
        return record
    return {**record, "file_name": "/".join(url.split("/")[-2:])}


def _category(record: Mapping[str, Any], where: str) -> Category:
    name, frequency = record.get("name"), record.get("frequency")
    if not isinstance(name, str):
        raise _missing_or_wrong(record, "name", f"{where}.name", "a name")
    if frequency not in (None, "r", "c", "f"):
        raise _wrong(f"{where}.frequency", frequency, '"r", "c" or "f"')
    return Category(_whole_id(record, "id", where), name, frequency)


def _whole_id(record: Mapping[str, Any], field: str, where: str) -> int:
    value = _id(record, field, where)
    if not isinstance(value, int):
        raise _wrong(f"{where}.{field}", value, "a whole number")
    return value


def _category_ids(record: Mapping[str, Any], field: str, where: str) -> frozenset[int]:
    values = record.get(field, [])
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise _wrong(f"{where}.{field}", values, "a list of whole numbers")
    return frozenset(values)


def _area(record: Mapping[str, Any], where: str) -> float | None:
    area = record.get("area")
    if area is None:
        return None
    if not _is_finite(area) or area < 0:
        raise _wrong(f"{where}.area", area, "a number of pixels, or no such field")
    return float(area)


def _bbox(record: Mapping[str, Any], where: str) -> tuple[float, float, float, float] | None:
    bbox = record.get("bbox")
    if bbox is None:
        return None
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_finite, bbox)):
        raise _wrong(f"{where}.bbox", bbox, "[x, y, width, height], or no such field")
    x, y, width, height = map(float, bbox)
    return x, y, width, height


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
