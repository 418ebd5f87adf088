"""Boxes that a detector found in images: its file, read and checked."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeGuard

from sam_jax.errors import ConfigError

# A name or a number, of an image or of a class.
Name: TypeAlias = int | str
BoxXyxy: TypeAlias = tuple[float, float, float, float]

CORNERS = ("xmin", "ymin", "xmax", "ymax")
# Boxes [x0, y0, x1, y1] in place of [x, y, w, h] leave their images; detectors' own rarely do.
_MAX_LEAVING_RATE = 0.05
# A box leaves its image where it ends further outside than this rate of the side, or these pixels.
_LEAVING_RATE, _LEAVING_PX = 0.01, 1.0


@dataclasses.dataclass(frozen=True)
class Detection:
    """A box with what the detector says about it.

    Attributes:
      place: where it stands in its file, for messages.
      box_xyxy: its edges ``(x0, y0, x1, y1)`` in pixels of the upright image.
      score: the detector's.
      label: name of its class; None where the file has numbers only.
      category_id: number of its class; None where the file has names only.
    """

    place: str
    box_xyxy: BoxXyxy
    score: float
    label: str | None = None
    category_id: int | None = None

    @property
    def box_xywh(self) -> list[float]:
        """The box as COCO writes it."""
        x0, y0, x1, y1 = self.box_xyxy
        return [x0, y0, x1 - x0, y1 - y0]


@dataclasses.dataclass(frozen=True)
class Detections:
    """The boxes of a file.

    Attributes:
      path: the file.
      names: by what it names images.
      by_image: boxes by image, in the order of the file.
      as_corners: whether the file names the corners of boxes, so that they cannot be mistaken.
    """

    path: Path
    names: Literal["file_name", "image_id"]
    by_image: Mapping[Name, Sequence[Detection]]
    as_corners: bool

    def __len__(self) -> int:
        return sum(map(len, self.by_image.values()))

    def above(self, min_score: float) -> "Detections":
        """The boxes of at least some score; images keep their place, if with fewer boxes."""
        kept = {
            name: [detection for detection in found if detection.score >= min_score]
            for name, found in self.by_image.items()
        }
        return dataclasses.replace(self, by_image=kept)

    def categories(self) -> dict[Name, dict[str, Any]]:
        """COCO's categories by the label of a box or, if the file has numbers only, its number.

        Numbers are the file's, or those of the sorted labels from 1.

        Raises:
          ConfigError: one number stands beside several labels, or one label beside several.
        """
        pairs = {(d.category_id, d.label) for found in self.by_image.values() for d in found}
        if not all(label is None or number is None for number, label in pairs):
            for place, what in ((0, "category_id"), (1, "label")):
                values = [pair[place] for pair in pairs]
                twice = next((value for value in values if values.count(value) > 1), None)
                if twice is not None:
                    raise ConfigError(
                        f"{self.path}: boxes with {what} {twice!r} differ in their "
                        f"{('label', 'category_id')[place]}; write one for each class, or leave "
                        "out the numbers"
                    )
        names = sorted((label for _, label in pairs if label is not None))
        own = {label: number for number, label in pairs if label is not None}
        by_label: dict[Name, dict[str, Any]] = {}
        taken = {number for number, _ in pairs}
        free = (number for number in itertools.count(1) if number not in taken)
        for label in names:
            number = own[label]
            by_label[label] = _category(next(free) if number is None else number, label)
        for number in sorted(n for n, label in pairs if label is None and n is not None):
            by_label[number] = _category(number, str(number))
        return by_label


def read_detections(path: Path) -> Detections:
    """Boxes of a detector's file, in one of two forms, told apart by content.

    - COCO's results: a list of ``{"image_id" or "file_name", "bbox": [x, y, w, h], "score",
      "category_id" or "label"}``.
    - What Hugging Face's pipelines return, by image: ``{file_name: [{"score", "label", "box":
      {"xmin", "ymin", "xmax", "ymax"}}]}``.

    Raises:
      ConfigError: it is neither; or a box is empty or not finite, or lacks something. The message
        names the place, what stands there, and what should.
      OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON that can be read ({error})") from error
    if isinstance(content, list):
        return _read_results(path, content)
    if isinstance(content, dict):
        return _read_by_image(path, content)
    raise _wrong(path, "the file", content, "a list of COCO's results, or an object by file name")


def check_boxes(
    detections: Detections, sizes: Mapping[Name, tuple[int, int]]
) -> list[tuple[Name, Detection]]:
    """Refuses boxes that are not of their images; those that are, but leave them, are returned.

    Args:
      detections: the boxes.
      sizes: height and width of the upright images; boxes of others are not looked at.

    Raises:
      ConfigError: more than 5 % of the boxes leave their images where they may be corners given as
        position and size, or a box lies outside of its image.
    """
    leaving, outside, num_boxes, all_are_corners = [], [], 0, True
    for name, size in sizes.items():
        for detection in detections.by_image.get(name, ()):
            num_boxes += 1
            all_are_corners &= _could_be_corners(detection, size)
            if _leaves(detection.box_xyxy, size):
                leaving.append((name, detection))
            if _is_outside(detection.box_xyxy, size):
                outside.append((name, detection))
    if not detections.as_corners and len(leaving) > _MAX_LEAVING_RATE * num_boxes:
        name, detection = leaving[0]
        reason = (
            "read as [x0, y0, x1, y1] all fit: write [x, y, width, height]"
            if all_are_corners
            else "are they of images of another size, or of pictures that were not turned upright?"
        )
        raise ConfigError(
            f"{detections.path}: {len(leaving)} of {num_boxes} boxes leave their images, such as "
            f"{_said(detections, name, detection, sizes[name])}; {reason}"
        )
    if outside:
        name, detection = outside[0]
        more = f"; and {len(outside) - 1} more" if len(outside) > 1 else ""
        raise ConfigError(
            f"{detections.path}: {_said(detections, name, detection, sizes[name])} lies outside of "
            f"its image{more}"
        )
    return leaving


def _category(number: int, name: str) -> dict[str, Any]:
    return {"id": number, "name": name, "supercategory": "object"}


def _read_results(path: Path, content: Sequence[Any]) -> Detections:
    for number, entry in enumerate(content):
        if not isinstance(entry, dict):
            raise _wrong(path, f"[{number}]", entry, "an object with bbox and score")
    names: Literal["file_name", "image_id"] = "image_id"
    if content and all("file_name" in entry for entry in content):
        names = "file_name"
    by_image: dict[Name, list[Detection]] = {}
    for number, entry in enumerate(content):
        place = f"[{number}]"
        image = _name(path, f"{place}.{names}", entry.get(names), "the image's number or name")
        x, y, width, height = _numbers(path, f"{place}.bbox", entry.get("bbox"))
        box = (x, y, x + width, y + height)
        by_image.setdefault(image, []).append(_detection(path, place, entry, box))
    return _uniform(Detections(path, names, by_image, as_corners=False))


def _read_by_image(path: Path, content: Mapping[str, Any]) -> Detections:
    if {"images", "annotations"} & content.keys():
        raise ConfigError(
            f"{path} is a COCO annotation file: expected a detector's results, a list of objects "
            "with bbox and score (the annotations of ground truth have no score)"
        )
    by_image: dict[Name, list[Detection]] = {}
    for name, entries in content.items():
        if not isinstance(entries, list):
            raise _wrong(path, f"{name!r}", entries, "a list of boxes")
        found = by_image.setdefault(name, [])
        for number, entry in enumerate(entries):
            place = f"{name!r}[{number}]"
            if not isinstance(entry, dict):
                raise _wrong(path, place, entry, "an object with score, label and box")
            corners = entry.get("box")
            if not isinstance(corners, dict) or set(corners) != set(CORNERS):
                raise _wrong(path, f"{place}.box", corners, f"an object with {', '.join(CORNERS)}")
            box = _numbers(path, f"{place}.box", [corners[corner] for corner in CORNERS])
            found.append(_detection(path, place, entry, box))
    return _uniform(Detections(path, "file_name", by_image, as_corners=True))


def _detection(path: Path, place: str, entry: Mapping[str, Any], box: BoxXyxy) -> Detection:
    x0, y0, x1, y1 = box
    if not all(map(math.isfinite, box)):
        raise _wrong(path, f"{place}: the box", list(box), "finite numbers")
    if x1 <= x0 or y1 <= y0:
        raise ConfigError(
            f"{path}, {place}: the box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) is empty; "
            "expected a width and height above 0"
        )
    score = entry.get("score")
    if not _is_number(score) or not math.isfinite(score):
        raise _wrong(path, f"{place}.score", score, "a finite number")
    label, category_id = entry.get("label"), entry.get("category_id")
    if label is None and category_id is None:
        raise _wrong(path, f"{place}.label", None, "a label, or a category_id")
    if label is not None and not isinstance(label, str):
        raise _wrong(path, f"{place}.label", label, "a name; numbers stand under category_id")
    if category_id is not None:
        category_id = _whole(category_id)
        if category_id is None:
            raise _wrong(path, f"{place}.category_id", entry["category_id"], "a whole number")
    return Detection(place, box, float(score), label, category_id)


def _uniform(detections: Detections) -> Detections:
    """Refuses a file in which some boxes have a label and others have none."""
    first = None
    for found in detections.by_image.values():
        for detection in found:
            first = first or detection
            if (detection.label is None) != (first.label is None):
                raise ConfigError(
                    f"{detections.path}, {detection.place}: of it and {first.place}, one has a "
                    "label and the other has none; give all boxes one, or only category_ids"
                )
    return detections


def _leaves(box: BoxXyxy, size: tuple[int, int]) -> bool:
    x0, y0, x1, y1 = box
    by_y, by_x = (max(_LEAVING_PX, _LEAVING_RATE * side) for side in size)
    return x0 < -by_x or y0 < -by_y or x1 > size[1] + by_x or y1 > size[0] + by_y


def _is_outside(box: BoxXyxy, size: tuple[int, int]) -> bool:
    x0, y0, x1, y1 = box
    return x1 <= 0 or y1 <= 0 or x0 >= size[1] or y0 >= size[0]


def _could_be_corners(detection: Detection, size: tuple[int, int]) -> bool:
    """True if the four numbers of a box make sense as corners, too."""
    x, y, right, bottom = detection.box_xywh
    return right > x and bottom > y and not _leaves((x, y, right, bottom), size)


def _said(detections: Detections, name: Name, detection: Detection, size: tuple[int, int]) -> str:
    x0, y0, x1, y1 = detection.box_xyxy
    return (
        f"{detection.place}, from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) in the image "
        f"{detections.names} {name!r}, {size[1]} wide and {size[0]} high,"
    )


def _numbers(path: Path, place: str, values: Any) -> BoxXyxy:
    if not isinstance(values, list) or len(values) != 4 or not all(map(_is_number, values)):
        raise _wrong(path, place, values, "four numbers")
    first, second, third, fourth = map(float, values)
    return first, second, third, fourth


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _name(path: Path, place: str, value: Any, expected: str) -> Name:
    if isinstance(value, str) and value.strip():
        return value
    number = _whole(value)
    if number is None:
        raise _wrong(path, place, value, expected)
    return number


def _wrong(path: Path, place: str, found: Any, expected: str) -> ConfigError:
    shown = "missing" if found is None else f"{found!r:.80}"
    return ConfigError(f"{path}, {place} is {shown}; expected {expected}")
