"""Annotations in COCO's instance format: one JSON, a folder of images."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from sam_jax.data.rle import BadRleError, check_size
from sam_jax.data.samples import CorruptSampleError, Sample
from sam_jax.errors import ConfigError
from sam_jax.images import Orientation

_log = logging.getLogger(__name__)


class CocoSource:
    """Images of a COCO instance file with their polygons or RLEs.

    Crowd annotations (iscrowd) are groups, not objects, and are left out, and
    so are images without any other annotation. Classes are not read.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None = None,
        name: str = "coco",
        orientation: Orientation = "upright",
    ):
        """Reads the annotation file.

        Args:
            path: the JSON.
            images: the folder of the images; None means `images` beside the
                JSON. A file_name may repeat the folder's own name.
            name: what `Sample.dataset` says.
            orientation: see `Sample`.

        Raises:
            FileNotFoundError: the JSON or the folder does not exist.
            ConfigError: the JSON is not in COCO form, or holds no usable image.
        """
        path = Path(path)
        self.name = name
        self._orientation = orientation
        self._folder = Path(images) if images is not None else path.parent / "images"
        if not self._folder.is_dir():
            raise FileNotFoundError(f"no image folder {self._folder}; say where with images=")
        try:
            content = json.loads(path.read_bytes())
            records = {record["id"]: record for record in content["images"]}
            by_image: dict[Any, list] = {image_id: [] for image_id in records}
            for annotation in content["annotations"]:
                if not annotation.get("iscrowd"):
                    by_image[annotation["image_id"]].append(annotation.get("segmentation"))
            self._images = [
                (record["file_name"], record.get("height"), record.get("width"))
                for image_id, record in records.items()
                if by_image[image_id]
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is not a COCO instance file: {error!r}") from error
        self._segmentations = [masks for masks in by_image.values() if masks]
        if not self._images:
            raise ConfigError(f"{path} has no image with an annotation")
        unannotated = len(records) - len(self._images)
        if unannotated:
            _log.info("%s: %d images without annotation left out", path, unannotated)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        """The image and its masks.

        Raises:
            CorruptSampleError: the image file is missing.
        """
        file_name, height, width = self._images[index]
        path = self._folder / file_name
        if not path.exists():
            path = self._folder / Path(file_name).name
        try:
            image = path.read_bytes()
        except FileNotFoundError as error:
            raise CorruptSampleError(str(path), "missing image") from error
        masks_rle, unusable = [], []
        for segmentation in self._segmentations[index]:
            try:
                masks_rle.append(segmentation_to_rle(segmentation, [height, width]))
            except BadRleError as error:
                unusable.append(str(error))
        return Sample(
            image, tuple(masks_rle), self.name, str(path), tuple(unusable), self._orientation
        )


def segmentation_to_rle(segmentation: Any, size: Any) -> dict[str, Any]:
    """A COCO `segmentation` as an RLE: {"size": [h, w], "counts": ...}.

    RLEs pass through as they are (and are validated where they are decoded);
    the polygons of one object are rasterised and united.

    Args:
        segmentation: an RLE mapping, or a list of polygons
            [x0, y0, x1, y1, ...] in pixels.
        size: [h, w] of the image, from its record; only polygons need it.

    Raises:
        BadRleError: it is neither, or a polygon makes no sense.
    """
    if isinstance(segmentation, dict):
        return segmentation
    if not isinstance(segmentation, list) or not segmentation:
        raise BadRleError(f"segmentation is {segmentation!r:.80}")
    h, w = check_size(size)
    for polygon in segmentation:
        _check_polygon(polygon, max(h, w))
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, h, w))


def _check_polygon(polygon: Any, side: int) -> None:
    """The rasteriser (C) allocates in proportion to the outline: bound it."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise BadRleError(f"a polygon needs 3 or more points: {polygon!r:.80}")
    for value in polygon:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadRleError(f"a polygon holds {value!r:.80}")
        if not math.isfinite(value) or abs(value) > 4 * side:
            raise BadRleError(f"a polygon reaches far outside the image: {value}")
