"""A COCO or LVIS file of instances, with all that scoring looks at: categories, crowds, areas."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sam_jax.data.sources.coco_file import file_names, reason_to_leave_out
from sam_jax.data.sources.json_form import (
    FormError,
    Id,
    Ids,
    as_object,
    identifier,
    image_size,
    parse,
    records,
    text,
    wrong,
)
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError


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
      other_names: further names that its file may have.
      hw: height and width in pixels; None where the file does not say.
      annotations: all that have a segmentation.
      negative: LVIS's ``neg_category_ids``: categories that are certainly not in the image.
      not_exhaustive: LVIS's ``not_exhaustive_category_ids``: not all of their objects are marked.
    """

    image_id: Id
    file_name: str
    other_names: tuple[str, ...]
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
        return _read(parse(path))
    except FormError as error:
        raise ConfigError(f"{path} is not a COCO or LVIS instance file: {error}") from error


def _read(content: Any) -> LabelledFile:
    expected = "an object with images, annotations and categories"
    content = as_object(content, "the file", expected)
    image_records = records(content, "images")
    annotations = records(content, "annotations")
    categories = _categories(content)
    known = {category.category_id for category in categories}
    images: dict[Id, LabelledImage] = {}
    ids = Ids("images", "give each image an id of its own, as when files are merged")
    for number, record in enumerate(image_records):
        where = f"images[{number}]"
        name, *others = file_names(record, where)
        image_id = ids.add(number, identifier(record, "id", where), repr(name))
        negative, not_exhaustive = (
            _category_ids(record, field, where)
            for field in ("neg_category_ids", "not_exhaustive_category_ids")
        )
        size = image_size(record, where, name)
        images[image_id] = LabelledImage(
            image_id, name, tuple(others), size, [], negative, not_exhaustive
        )
    left_out = Tally()
    for number, annotation in enumerate(annotations):
        where = f"annotations[{number}]"
        image_id = identifier(annotation, "image_id", where)
        reason = reason_to_leave_out(annotation, where, image_id in images, keep_crowds=True)
        if reason:
            left_out.add(reason, f"{where} with image_id {image_id!r}")
            continue
        category_id = _whole_id(annotation, "category_id", where)
        if category_id not in known:
            raise wrong(f"{where}.category_id", category_id, "the id of one of the categories")
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
        categories,
        any("neg_category_ids" in record for record in image_records),
        left_out,
    )


def _categories(content: Mapping[str, Any]) -> list[Category]:
    """The categories, by rising id."""
    ids = Ids("categories", "give each category an id of its own, as when files are merged")
    found = []
    for number, record in enumerate(records(content, "categories")):
        where = f"categories[{number}]"
        name, frequency = text(record, "name", where, "a name"), record.get("frequency")
        if frequency not in (None, "r", "c", "f"):
            raise wrong(f"{where}.frequency", frequency, '"r", "c" or "f"')
        category_id = _whole_id(record, "id", where)
        ids.add(number, category_id, repr(name))
        found.append(Category(category_id, name, frequency))
    return sorted(found, key=lambda category: category.category_id)


def _whole_id(record: Mapping[str, Any], field: str, where: str) -> int:
    value = identifier(record, field, where)
    if not isinstance(value, int):
        raise wrong(f"{where}.{field}", value, "a whole number")
    return value


def _category_ids(record: Mapping[str, Any], field: str, where: str) -> frozenset[int]:
    values = record.get(field, [])
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise wrong(f"{where}.{field}", values, "a list of whole numbers")
    return frozenset(values)


def _area(record: Mapping[str, Any], where: str) -> float | None:
    area = record.get("area")
    if area is None:
        return None
    if not _is_finite(area) or area < 0:
        raise wrong(f"{where}.area", area, "a number of pixels, or no such field")
    return float(area)


def _bbox(record: Mapping[str, Any], where: str) -> tuple[float, float, float, float] | None:
    bbox = record.get("bbox")
    if bbox is None:
        return None
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_finite, bbox)):
        raise wrong(f"{where}.bbox", bbox, "[x, y, width, height], or no such field")
    x, y, width, height = map(float, bbox)
    return x, y, width, height


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
