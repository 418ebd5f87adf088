"""The ground truth of instances: the masks of a COCO or LVIS file, with their pictures."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam_jax import rle
from sam_jax.arrays import Float, UInt8
from sam_jax.buckets import DataPath
from sam_jax.data.samples import (
    CorruptSampleError,
    Sample,
    SkippedSampleError,
    decode_image,
    image_hw,
    read_picture_file,
)
from sam_jax.data.sources.json_form import Id
from sam_jax.data.sources.labelled_file import (
    LabelledAnnotation,
    LabelledImage,
    read_labelled,
)
from sam_jax.data.sources.listed_images import ListedImage, find_pictures, segmentation_to_rle
from sam_jax.errors import ConfigError
from sam_jax.evaluation.clicks import keyed_number
from sam_jax.evaluation.detection.figures_report import SKIPPED
from sam_jax.evaluation.evaluation import Record
from sam_jax.rle import BadRleError


@dataclasses.dataclass(frozen=True)
class TruthMask:
    """A marked object.

    Attributes:
      number: its annotation's place in the file.
      category_id: its category's.
      mask_rle: COCO's compressed run lengths.
      area: the file's, or the mask's where it does not say; decides which objects are small.
      box_xywh: the file's, or the mask's.
      is_crowd: whether it marks a group.
    """

    number: int
    category_id: int
    mask_rle: dict[str, Any]
    area: float
    box_xywh: tuple[float, float, float, float]
    is_crowd: bool


@dataclasses.dataclass(frozen=True, eq=False)
class TruthImage:
    """An image with what is marked in it.

    Attributes:
      image_id: the file's.
      name: the picture file.
      pixels: RGB, or other channels of the model, upright.
      masks: by category, as COCO's own evaluation takes them, then in the order of the file.
      negative, not_exhaustive: see ``LabelledImage``.
      unusable: what was wrong with each annotation that is no mask.
    """

    image_id: Id
    name: str
    pixels: UInt8[np.ndarray, "oh ow 3"] | Float[np.ndarray, "oh ow c"]
    masks: Sequence[TruthMask]
    negative: frozenset[int]
    not_exhaustive: frozenset[int]
    unusable: Sequence[str]


class InstanceTruth:
    """Images of a COCO or LVIS file, in the order of their ids, read one by one.

    Args:
      path: the JSON.
      images: the folder of the pictures; None means ``images`` beside the JSON.
      max_images: most images, drawn by ``seed``; None takes all.
      seed: of the draw.
      in_channels: of the pictures; None for 8-bit RGB.

    Raises:
      FileNotFoundError: the JSON or the folder does not exist.
      ConfigError: see ``read_labelled``; or a name may mean several pictures.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None = None,
        max_images: int | None = None,
        seed: int = 0,
        in_channels: int | None = None,
    ):
        self.path = Path(path)
        folder = Path(images) if images is not None else self.path.parent / "images"
        if not folder.is_dir():
            raise FileNotFoundError(f"no image folder {folder}; say where with images=")
        file = read_labelled(self.path)
        if not file.images:
            raise ConfigError(f"{path} has no image")
        self.digest = hashlib.blake2b(self.path.read_bytes(), digest_size=8).hexdigest()
        self.categories = file.categories
        self.is_federated = file.is_federated
        self.left_out = file.left_out
        self._folder, self._in_channels = folder, in_channels
        listed = [ListedImage(i.file_name, i.hw, [], i.other_names) for i in file.images]
        paths = find_pictures(self.path, listed, folder)
        chosen = range(len(file.images))
        if max_images is not None and max_images < len(chosen):
            drawn = sorted(chosen, key=lambda i: keyed_number(f"{seed}/{file.images[i].file_name}"))
            chosen = sorted(drawn[:max_images])
        # Of all images, so that boxes of those that were not drawn are known to be no mistake.
        self.all_images: Sequence[LabelledImage] = file.images
        self.images = [file.images[index] for index in chosen]
        self._paths = [paths[index] for index in chosen]

    def __len__(self) -> int:
        return len(self.images)

    def size(self, index: int) -> tuple[int, int] | None:
        """Height and width of an upright image, without decoding it; None if it cannot be read."""
        record, path = self.images[index], self._paths[index]
        if record.hw is not None:
            return record.hw
        if path is None:
            return None
        try:
            return image_hw(self._sample(record, path))
        except CorruptSampleError:
            return None

    def read(self, index: int) -> TruthImage:
        """An image and its masks.

        Raises:
          CorruptSampleError: the picture is missing or damaged, or of another size than its masks.
        """
        record, path = self.images[index], self._paths[index]
        if path is None:
            raise CorruptSampleError(str(self._folder / record.file_name), "missing image")
        sample = self._sample(record, path)
        pixels = decode_image(sample)
        size = pixels.shape[:2]
        if record.hw is not None and record.hw != size:
            detail = f"the picture is {list(size)}, {self.path.name} says {list(record.hw)}"
            raise CorruptSampleError(str(path), "size mismatch", detail)
        masks, unusable = [], []
        for annotation in record.annotations:
            try:
                masks.append(_truth_mask(annotation, size))
            except BadRleError as error:
                unusable.append(f"annotations[{annotation.number}]: {error}")
        return TruthImage(
            record.image_id,
            str(path),
            pixels,
            sorted(masks, key=lambda mask: mask.category_id),
            record.negative,
            record.not_exhaustive,
            unusable,
        )

    def skipped_record(self, index: int, error: SkippedSampleError) -> Record:
        """The record of an image that cannot be read."""
        image = self.images[index]
        return {
            "image_id": image.image_id,
            "image": image.file_name,
            SKIPPED: [error.reason, str(error)],
        }

    def _sample(self, record: LabelledImage, path: DataPath) -> Sample:
        """The picture with its RLEs, whose sizes tell which way up a turned one was annotated."""
        sizes = [{"size": list(record.hw), "counts": []}] if record.hw is not None else []
        runs = [a.segmentation for a in record.annotations if isinstance(a.segmentation, dict)]
        return Sample(
            read_picture_file(path),
            (*runs, *sizes),
            self.path.stem,
            str(path),
            in_channels=self._in_channels,
        )


def _truth_mask(annotation: LabelledAnnotation, size: tuple[int, int]) -> TruthMask:
    """The mask of an annotation; polygons lose the parts that are none.

    Raises:
      BadRleError: it is no mask of an image of this size.
    """
    found, _ = segmentation_to_rle(annotation.segmentation, size)
    runs = rle.run_lengths(found)
    if tuple(found["size"]) != size:
        raise BadRleError(f"it is of an image {list(found['size'])}, the picture is {list(size)}")
    height, width = size
    encoded = coco_mask.frPyObjects(
        {"size": [height, width], "counts": runs.tolist()}, height, width
    )
    area, box = annotation.area, annotation.bbox
    x, y, box_width, box_height = coco_mask.toBbox(encoded).tolist()
    return TruthMask(
        annotation.number,
        annotation.category_id,
        encoded,
        float(coco_mask.area(encoded)) if area is None else area,
        (x, y, box_width, box_height) if box is None else box,
        annotation.is_crowd,
    )
