"""Images that annotation files list by name, with polygons or run lengths of what is in them."""

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from pycocotools import mask as coco_mask

from sam_jax.buckets import DataPath
from sam_jax.data.samples import (
    CorruptSampleError,
    Sample,
    image_hw,
    picture_remarks,
    read_picture_file,
    sample_of_file,
)
from sam_jax.data.sources import truth_bytes
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError
from sam_jax.files import NamedFiles
from sam_jax.images import Orientation
from sam_jax.rle import BadRleError, check_size

_log = logging.getLogger(__name__)
# The reason under which a part of a polygon is counted that is left out of its object.
PART_LEFT_OUT = "polygon part left out"
UNANNOTATED = "images without an annotation in use"


class ListedImage(NamedTuple):
    """An image of an annotation file.

    Attributes:
      file_name: as it stands there.
      hw: height and width in pixels; None where the file does not say.
      segmentations: of the objects in use, each with its place in the file; see
        ``segmentation_to_rle``.
      other_names: further names that its file may have, in the order in which they are tried.
    """

    file_name: str
    hw: tuple[int, int] | None
    segmentations: list[tuple[str, Any]]
    other_names: tuple[str, ...] = ()


def with_objects(images: Iterable[ListedImage], left_out: Tally) -> list[ListedImage]:
    """The images that have an object in use; counts the others."""
    used = []
    for image in images:
        if image.segmentations:
            used.append(image)
        else:
            left_out.add(UNANNOTATED, repr(image.file_name))
    return used


class ListedImagesSource:
    """Samples of listed images; what the readers of such files have in common.

    Args:
      images: what was read.
      left_out: what was not.
      path: the annotations, for messages.
      folder: where the images are.
      name: what ``Sample.dataset`` says.
      orientation: see ``Sample``.
      in_channels: see ``Sample``.
      advice: what brings in more of what was left out, for messages.

    Raises:
      FileNotFoundError: the folder does not exist.
      ConfigError: there is no usable image, or a file name may mean several files.
    """

    def __init__(
        self,
        images: list[ListedImage],
        left_out: Tally,
        *,
        path: DataPath,
        folder: DataPath,
        name: str,
        orientation: Orientation,
        in_channels: int | None = None,
        advice: str = "",
    ):
        if not folder.is_dir():
            raise FileNotFoundError(f"no image folder {folder}; say where with images=")
        if not images:
            found = f": {left_out}" if left_out else ""
            raise ConfigError(f"{path} has no image with an annotation to use{found}{advice}")
        if left_out:
            _log.warning("%s: left out: %s%s", path, left_out, advice)
        self.name = name
        self.left_out = left_out
        self._orientation, self._in_channels = orientation, in_channels
        self._folder = folder
        self._images = images
        self._paths = find_pictures(path, images, folder)

    def __len__(self) -> int:
        return len(self._images)

    def file_name(self, index: int) -> str:
        """The image's name as the annotation file has it."""
        return self._images[index].file_name

    def num_masks(self, index: int) -> int:
        """The number of segmentations, before any is decoded."""
        return len(self._images[index].segmentations)

    def truth(self, index: int) -> bytes:
        """All that the annotation file says of the image."""
        return truth_bytes(self._images[index])

    def __getitem__(self, index: int) -> Sample:
        """The image and its masks.

        Raises:
          CorruptSampleError: the image file is missing.
        """
        record = self._images[index]
        path = self._paths[index]
        if path is None:
            raise CorruptSampleError(str(self._folder / record.file_name), "missing image")
        image = read_picture_file(path)
        masks_rle, unusable, remarks = [], [], list[tuple[str, str]]()
        size: Any = record.hw
        if size is None and any(isinstance(mask, list) for _, mask in record.segmentations):
            # Polygons have no size, so which way up they were drawn only the others tell.
            runs = tuple(mask for _, mask in record.segmentations if isinstance(mask, dict))
            drawn_on = Sample(
                image,
                runs,
                self.name,
                str(path),
                orientation=self._orientation,
                in_channels=self._in_channels,
            )
            size = image_hw(drawn_on)
            remarks += picture_remarks(drawn_on)
        for where, segmentation in record.segmentations:
            try:
                mask, bad_parts = segmentation_to_rle(segmentation, size)
            except BadRleError as error:
                unusable.append(f"{where}: {error}")
                continue
            masks_rle.append(mask)
            remarks += [(PART_LEFT_OUT, f"{where}: {part}") for part in bad_parts]
        found = (masks_rle, unusable, remarks)
        return sample_of_file(path, image, self.name, self._orientation, *found, self._in_channels)


def find_pictures(
    path: DataPath, images: list[ListedImage], folder: DataPath
) -> list[DataPath | None]:
    """The file of each image, None where there is none; says how many are missing or renamed.

    Args:
      path: the annotations, for messages.
      images: what was read.
      folder: where the images are.

    Raises:
      ConfigError: a name may mean several files, or two images are one file.
    """
    files, paths = NamedFiles(folder), []
    owners: dict[DataPath, ListedImage] = {}
    missing, renamed = [], []
    for image in images:
        try:
            found = next(
                (
                    file
                    for name in (image.file_name, *image.other_names)
                    if (file := files.find(name))
                ),
                None,
            )
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        paths.append(found)
        if found is None:
            missing.append(image.file_name)
            continue
        if found not in (folder / name for name in (image.file_name, *image.other_names)):
            renamed.append((image.file_name, str(found)))
        if (other := owners.setdefault(found, image)) is not image:
            raise ConfigError(
                f"{path}: two images, {other.file_name!r} and {image.file_name!r}, are both the "
                f"file {found}; give each picture a name of its own, or put the annotations of one "
                "picture under one id"
            )
    if missing:
        _log.warning(
            "%s: %d of %d pictures are not in %s, e.g. %r",
            *(path, len(missing), len(images), folder, missing[0]),
        )
    if renamed:
        _log.warning(
            "%s: %d file names are not those of the files found for them, e.g. %r is %s",
            *(path, len(renamed), *renamed[0]),
        )
    return paths


def segmentation_to_rle(segmentation: Any, size: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A COCO `segmentation` as an RLE: {"size": [h, w], "counts": ...}.

    RLEs pass through as they are (and are validated where they are decoded);
    the polygons of one object are rasterised and united.

    Args:
      segmentation: an RLE mapping, or a list of polygons [x0, y0, x1, y1, ...] in pixels.
      size: [h, w] of the image; only polygons need it.

    Returns:
      The RLE, and what was wrong with each polygon that was left out of it.

    Raises:
      BadRleError: it is neither, or none of its polygons makes sense.
    """
    if isinstance(segmentation, dict):
        return segmentation, ()
    if not isinstance(segmentation, list) or not segmentation:
        raise BadRleError(f"segmentation is {segmentation!r:.80}")
    h, w = check_size(size)
    polygons, bad = [], []
    for number, polygon in enumerate(segmentation, start=1):
        try:
            _check_polygon(polygon, max(h, w))
        except BadRleError as error:
            bad.append(f"part {number} of {len(segmentation)}: {error}")
        else:
            polygons.append(polygon)
    if not polygons:
        raise BadRleError("; ".join(bad[:3]))
    return coco_mask.merge(coco_mask.frPyObjects(polygons, h, w)), tuple(bad)


def _check_polygon(polygon: Any, side: int) -> None:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise BadRleError(
            f"a polygon is a list [x, y, x, y, ...] of 3 points or more: {polygon!r:.80}"
        )
    for value in polygon:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadRleError(f"a polygon holds {value!r:.80}")
        # The rasteriser (C) allocates in proportion to the outline. False for what is no number.
        if not abs(value) <= 4 * side:
            raise BadRleError(f"a polygon reaches far outside the image: {value!r:.40}")
    if side > 1 and all(0 <= value <= 1 for value in polygon):
        raise BadRleError(
            "a polygon lies within the first pixel; coordinates are pixels, not rates of the "
            f"image's size: {polygon!r:.80}"
        )
