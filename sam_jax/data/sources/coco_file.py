"""A COCO or LVIS instance file, read and checked: its images with what is marked in each."""

import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from sam_jax.buckets import DataPath
from sam_jax.data.sources.json_form import (
    FormError,
    Id,
    Ids,
    as_object,
    flag,
    identifier,
    image_size,
    other_spelling,
    parse,
    records,
    text,
    wrong,
)
from sam_jax.data.sources.listed_images import ListedImage, with_objects
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError

CROWD = "annotations of a crowd (iscrowd)"
NO_SEGMENTATION = "annotations without a segmentation"
OF_NO_IMAGE = "annotations of an image that is not in the file"

# COCO's pictures lost the first part of their names in 2017; LVIS v0.5 has them with it.
_NAME_OF_2014 = re.compile(r"COCO_(?:train|val|test)2014_(\d{12}\.jpg)")


def read_coco(path: DataPath, keep_crowds: bool) -> tuple[list[ListedImage], Tally]:
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
        return _read(parse(path), keep_crowds)
    except FormError as error:
        raise ConfigError(f"{path} is not a COCO instance file: {error}") from error


def _read(content: Any, keep_crowds: bool) -> tuple[list[ListedImage], Tally]:
    content = as_object(content, "the file", "an object with images and annotations")
    image_records = records(content, "images")
    annotations = records(content, "annotations")
    images: dict[Id, ListedImage] = {}
    ids = Ids("images", "give each image an id of its own, as when files are merged")
    for number, record in enumerate(image_records):
        where = f"images[{number}]"
        name, *others = file_names(record, where)
        image_id = ids.add(number, identifier(record, "id", where), repr(name))
        images[image_id] = ListedImage(name, image_size(record, where, name), [], tuple(others))
    _check_categories(content)

    left_out = Tally()
    spelled_otherwise = {other_spelling(image_id): image_id for image_id in images}
    own_ids = Ids("annotations", "number the annotations anew, as when files are merged")
    for number, annotation in enumerate(annotations):
        where = f"annotations[{number}]"
        if annotation.get("id") is not None:
            own_id = identifier(annotation, "id", where)
            own_ids.add(number, own_id, f"image_id {annotation.get('image_id')!r}")
        image_id = identifier(annotation, "image_id", where)
        if image_id not in images and image_id in spelled_otherwise:
            raise FormError(
                f"{where}.image_id is {image_id!r}, but the image's id is "
                f"{spelled_otherwise[image_id]!r}: write both as numbers, or both as strings"
            )
        reason = reason_to_leave_out(annotation, where, image_id in images, keep_crowds)
        if reason:
            left_out.add(reason, f"{where} with image_id {image_id!r}")
        else:
            images[image_id].segmentations.append((where, annotation["segmentation"]))
    return with_objects(images.values(), left_out), left_out


def reason_to_leave_out(
    annotation: Mapping[str, Any], where: str, has_image: bool, keep_crowds: bool
) -> str | None:
    """The reason why an annotation is not used; None if it is.

    Args:
      annotation: the annotation.
      where: its place in the file.
      has_image: whether its image is in the file.
      keep_crowds: see ``read_coco``.

    Raises:
      FormError: it does not say whether it marks a crowd.
    """
    is_crowd = flag(annotation, "iscrowd", where)
    if not has_image:
        return OF_NO_IMAGE
    if annotation.get("segmentation") in (None, [], {}, ""):
        return NO_SEGMENTATION
    return CROWD if is_crowd and not keep_crowds else None


def _check_categories(content: Mapping[str, Any]) -> None:
    """Categories are not read, but two with one id show that files were merged wrongly."""
    if content.get("categories") is None:
        return
    ids = Ids("categories", "give each category an id of its own, as when files are merged")
    for number, category in enumerate(records(content, "categories")):
        category_id = identifier(category, "id", f"categories[{number}]")
        ids.add(number, category_id, repr(category.get("name")))


def file_names(record: Mapping[str, Any], where: str) -> list[str]:
    """The names that an image's file may have, the likeliest first.

    LVIS v1 has no file_name, but the address of COCO's picture, whose last folder tells the split;
    LVIS v0.5 has the names of 2014 for the pictures of 2017.

    Raises:
      FormError: it has none.
    """
    url = record.get("coco_url")
    if "file_name" in record or not isinstance(url, str):
        name = text(record, "file_name", where, "the name of a file")
    else:
        name = "/".join(urllib.parse.urlsplit(url).path.strip("/").split("/")[-2:])
        if not name:
            raise wrong(f"{where}.coco_url", url, "the address of a picture")
    of_2014 = _NAME_OF_2014.fullmatch(name.split("/")[-1])
    return [name, of_2014[1]] if of_2014 else [name]
