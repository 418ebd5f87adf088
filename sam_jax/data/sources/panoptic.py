"""Annotations in COCO's panoptic format: one JSON, a folder of PNGs, a folder of images."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

from sam_jax import rle
from sam_jax.data.samples import CorruptSampleError, Sample, read_picture_file, sample_of_file
from sam_jax.data.sources import truth_bytes
from sam_jax.data.sources.coco import Crowd
from sam_jax.data.sources.coco_file import CROWD, OF_NO_IMAGE
from sam_jax.data.sources.json_form import (
    FormError,
    Id,
    Ids,
    as_object,
    flag,
    identifier,
    parse,
    records,
    text,
    wrong,
)
from sam_jax.data.sources.listed_images import UNANNOTATED
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError
from sam_jax.files import NamedFiles
from sam_jax.images import Orientation, UnreadableImageError, decode_in_own_mode

_log = logging.getLogger(__name__)

Stuff = Literal["skip", "keep"]

STUFF = "segments of stuff"
NOT_LISTED = "segment of the PNG that the JSON does not list left out"


class _PanopticImage(NamedTuple):
    """An image of the file.

    Attributes:
      file_name: of the picture.
      png_name: of its segments.
      segment_ids: of those in use, in the order of the file.
      other_ids: of those left out.
    """

    file_name: str
    png_name: str
    segment_ids: tuple[int, ...]
    other_ids: frozenset[int]


class PanopticSource:
    """Images of a COCO panoptic file with their segments, things and stuff alike.

    A pixel of the PNG belongs to the segment R + 256 G + 65536 B; 0 is none.

    Args:
      path: the JSON.
      masks: the folder of the PNGs; None means the one beside the JSON that has its name.
      images: the folder of the images; None means `images` beside the JSON.
      name: what `Sample.dataset` says.
      stuff: whether regions of classes that are no things, such as sky, are objects.
      crowd: whether groups (iscrowd) are.
      orientation: see `Sample`.
      in_channels: see `Sample`.

    Raises:
      FileNotFoundError: the JSON or a folder does not exist.
      ConfigError: the JSON is not in COCO's panoptic form, or holds no usable image.
    """

    def __init__(
        self,
        path: str | Path,
        masks: str | Path | None = None,
        images: str | Path | None = None,
        name: str = "panoptic",
        stuff: Stuff = "keep",
        crowd: Crowd = "skip",
        orientation: Orientation = "upright",
        in_channels: int | None = None,
    ):
        path = Path(path)
        self.name = name
        self.left_out = Tally()
        self._orientation, self._in_channels = orientation, in_channels
        self._masks = Path(masks) if masks is not None else path.with_suffix("")
        self._folder = Path(images) if images is not None else path.parent / "images"
        for folder, key in ((self._masks, "masks"), (self._folder, "images")):
            if not folder.is_dir():
                raise FileNotFoundError(f"no folder {folder}; say where with {key}=")
        try:
            self._images = _read(parse(path), stuff == "keep", crowd == "keep", self.left_out)
        except FormError as error:
            raise ConfigError(f"{path} is not a COCO panoptic file: {error}") from error
        if not self._images:
            raise ConfigError(f"{path} has no image with a segment to use: {self.left_out}")
        if self.left_out:
            _log.warning("%s: left out: %s", path, self.left_out)
        pictures, pngs = NamedFiles(self._folder), NamedFiles(self._masks)
        self._paths = [
            (pictures.find(image.file_name), pngs.find(image.png_name)) for image in self._images
        ]
        missing = [
            f"{image.file_name} or {image.png_name}"
            for image, paths in zip(self._images, self._paths, strict=True)
            if None in paths
        ]
        if missing:
            _log.warning(
                "%s: of %d pictures or PNGs there is no file, e.g. %s",
                *(path, len(missing), missing[0]),
            )

    def __len__(self) -> int:
        return len(self._images)

    def file_name(self, index: int) -> str:
        """The image's name as the JSON has it."""
        return self._images[index].file_name

    def num_masks(self, index: int) -> int:
        """The number of segments in use."""
        return len(self._images[index].segment_ids)

    def truth(self, index: int) -> bytes:
        """All that the JSON says of the image, and its PNG.

        Raises:
          OSError: the PNG cannot be read.
        """
        image, (_, png_path) = self._images[index], self._paths[index]
        said = [*image[:3], sorted(image.other_ids)]
        return truth_bytes(said, [] if png_path is None else [png_path])

    def __getitem__(self, index: int) -> Sample:
        """The image and its segments.

        Raises:
          CorruptSampleError: the picture or the PNG is missing, or the PNG cannot be read.
        """
        image = self._images[index]
        picture_path, png_path = self._paths[index]
        if picture_path is None:
            raise CorruptSampleError(str(self._folder / image.file_name), "missing image")
        if png_path is None:
            raise CorruptSampleError(str(self._masks / image.png_name), "missing segments")
        picture = read_picture_file(picture_path)
        ids = _segment_ids(png_path, self._orientation)
        values = np.array(image.segment_ids)
        by_value = np.argsort(values)
        places = np.minimum(np.searchsorted(values[by_value], ids), len(values) - 1)
        numbers = np.where(values[by_value][places] == ids, by_value[places] + 1, 0)
        there = np.unique(numbers)
        unusable = [
            f"segment {segment} is not in {png_path}"
            for number, segment in enumerate(image.segment_ids, start=1)
            if number not in there
        ]
        unlisted = set(np.unique(ids).tolist()) - {0, *image.segment_ids} - image.other_ids
        remarks = [(NOT_LISTED, f"{png_path}: segment {segment}") for segment in sorted(unlisted)]
        return sample_of_file(
            picture_path,
            picture,
            self.name,
            self._orientation,
            rle.from_labels(numbers.astype(np.int32)),
            unusable,
            remarks,
            self._in_channels,
        )


def _segment_ids(path: Path, orientation: Orientation) -> Int64[np.ndarray, "h w"]:
    """The id of each pixel of a PNG.

    Raises:
      CorruptSampleError: it cannot be read, or holds no 8-bit colours.
    """
    try:
        png = decode_in_own_mode(path.read_bytes(), str(path), orientation)
    except (UnreadableImageError, OSError) as error:
        raise CorruptSampleError(str(path), "unreadable segments", str(error)) from error
    if png.mode not in ("RGB", "RGBA"):
        raise CorruptSampleError(
            str(path), "unreadable segments", f"its mode is {png.mode}; expected 8-bit RGB"
        )
    return np.asarray(png)[..., :3].astype(np.int64) @ np.array([1, 1 << 8, 1 << 16])


class _Rules(NamedTuple):
    """The choice of segments that are objects.

    Attributes:
      is_thing: whether a category is one of things, by its id.
      stuff: whether regions of other categories are in use.
      crowds: whether groups are.
    """

    is_thing: Mapping[Id, bool]
    stuff: bool
    crowds: bool


def _read(
    content: Any, keep_stuff: bool, keep_crowds: bool, left_out: Tally
) -> list[_PanopticImage]:
    content = as_object(content, "the file", "an object with images and annotations")
    rules = _Rules(_things(content), keep_stuff, keep_crowds)
    names = _names(content)
    images = []
    ids = Ids("annotations", "put the segments of one picture under one annotation")
    for number, annotation in enumerate(records(content, "annotations")):
        where = f"annotations[{number}]"
        image_id = ids.add(number, identifier(annotation, "image_id", where), where)
        if image_id not in names:
            left_out.add(OF_NO_IMAGE, f"{where} with image_id {image_id!r}")
            continue
        png_name = text(annotation, "file_name", where, "the name of a PNG")
        kept, others = _segments(annotation, where, rules, left_out)
        name = names.pop(image_id)
        if kept:
            images.append(_PanopticImage(name, png_name, tuple(kept), frozenset(others)))
        else:
            left_out.add(UNANNOTATED, repr(name))
    for name in names.values():
        left_out.add(UNANNOTATED, repr(name))
    return images


def _things(content: Mapping[str, Any]) -> dict[Id, bool]:
    is_thing: dict[Id, bool] = {}
    ids = Ids("categories", "give each category an id of its own, as when files are merged")
    for number, category in enumerate(records(content, "categories")):
        where = f"categories[{number}]"
        category_id = identifier(category, "id", where)
        ids.add(number, category_id, repr(category.get("name")))
        is_thing[category_id] = flag(category, "isthing", where)
    return is_thing


def _names(content: Mapping[str, Any]) -> dict[Id, str]:
    names: dict[Id, str] = {}
    ids = Ids("images", "give each image an id of its own, as when files are merged")
    for number, record in enumerate(records(content, "images")):
        where = f"images[{number}]"
        name = text(record, "file_name", where, "the name of a file")
        names[ids.add(number, identifier(record, "id", where), repr(name))] = name
    return names


def _segments(
    annotation: Mapping[str, Any], where: str, rules: _Rules, left_out: Tally
) -> tuple[list[int], list[int]]:
    """Ids of the segments in use, and of those left out, which are counted."""
    kept: list[int] = []
    others: list[int] = []
    for place, segment in enumerate(records(annotation, "segments_info", where)):
        at = f"{where}.segments_info[{place}]"
        segment_id = identifier(segment, "id", at)
        category_id = identifier(segment, "category_id", at)
        if not isinstance(segment_id, int):
            raise wrong(f"{at}.id", segment_id, "a whole number")
        if segment_id in kept or segment_id in others:
            raise FormError(f"{at}.id is {segment_id}, as of a segment before it")
        if category_id not in rules.is_thing:
            raise FormError(f"{at}.category_id is {category_id!r}, which no category has")
        if not rules.is_thing[category_id] and not rules.stuff:
            left_out.add(STUFF, at)
            others.append(segment_id)
        elif flag(segment, "iscrowd", at) and not rules.crowds:
            left_out.add(CROWD, at)
            others.append(segment_id)
        else:
            kept.append(segment_id)
    return kept, others
