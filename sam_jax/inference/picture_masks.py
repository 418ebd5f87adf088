"""The masks that are made of pictures: everything in them, or one for each box of a detector."""

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from pycocotools import mask as coco_mask

from sam_jax.arrays import Float, UInt8
from sam_jax.errors import ConfigError
from sam_jax.inference.automatic import AutomaticOptions, generate_masks_of_many
from sam_jax.inference.box_masks import BoxedImage, BoxMask, BoxOptions, masks_of_boxes
from sam_jax.inference.detections import Detection, Name
from sam_jax.inference.picture_boxes import PictureBoxes
from sam_jax.inference.predictor import Predictor

# A picture file and its pixels.
Picture: TypeAlias = tuple[Path, UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w c"]]


@runtime_checkable
class PictureMasks(Protocol):
    """Masks of pictures, as records like those of the published generator."""

    @property
    def missing(self) -> Sequence[str]:
        """Lines about what was asked for and is not among the pictures."""
        ...

    @property
    def categories(self) -> Mapping[Name, Mapping[str, Any]]:
        """COCO's categories by the label or number of a mask; those of masks without are empty."""
        ...

    def settings(self) -> dict[str, Any]:
        """All that masks depend on besides the weights and the pictures."""
        ...

    def records(
        self, predictor: Predictor, pictures: Iterator[Picture]
    ) -> Iterator[list[dict[str, Any]]]:
        """The masks of each picture, in their order."""
        ...


def picture_masks(
    options: AutomaticOptions | BoxOptions | None, boxes: PictureBoxes | None
) -> PictureMasks:
    """Automatic masks, or those of boxes if there are any.

    Raises:
      ConfigError: options are those of the other kind.
    """
    if boxes is None:
        if isinstance(options, BoxOptions):
            raise ConfigError("options are those of boxes: give boxes, too")
        return _AutomaticMasks(options or AutomaticOptions())
    if isinstance(options, AutomaticOptions):
        raise ConfigError("with boxes, options must be BoxOptions: no grid is searched")
    return _BoxMasks(options or BoxOptions(), boxes)


@dataclasses.dataclass(frozen=True)
class _AutomaticMasks:
    """Everything in a picture."""

    options: AutomaticOptions
    missing: tuple[str, ...] = ()

    @property
    def categories(self) -> Mapping[Name, Mapping[str, Any]]:
        return {}

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.options)

    def records(
        self, predictor: Predictor, pictures: Iterator[Picture]
    ) -> Iterator[list[dict[str, Any]]]:
        pixels = (pixels for _, pixels in pictures)
        for found in generate_masks_of_many(predictor, pixels, self.options):
            # Thresholds of 0 let masks pass that are empty.
            yield [record for record in found if record["area"]]


@dataclasses.dataclass(frozen=True)
class _BoxMasks:
    """A mask for each box of a picture, also where it is empty."""

    options: BoxOptions
    boxes: PictureBoxes

    @property
    def missing(self) -> Sequence[str]:
        return self.boxes.missing

    @property
    def categories(self) -> Mapping[Name, Mapping[str, Any]]:
        return self.boxes.categories

    def settings(self) -> dict[str, Any]:
        return {
            "boxes": self.boxes.digest,
            "min_score": self.boxes.min_score,
            "refine": self.options.refine,
        }

    def records(
        self, predictor: Predictor, pictures: Iterator[Picture]
    ) -> Iterator[list[dict[str, Any]]]:
        opened = deque[Sequence[Detection]]()

        def boxed() -> Iterator[BoxedImage]:
            for path, pixels in pictures:
                found = self.boxes.by_picture.get(path, ())
                opened.append(found)
                corners = [detection.box_xyxy for detection in found]
                yield BoxedImage(pixels, np.array(corners, np.float64).reshape(-1, 4))

        for masks in masks_of_boxes(predictor, boxed(), self.options):
            detections = opened.popleft()
            yield [_box_record(*pair) for pair in zip(detections, masks, strict=True)]


def _box_record(detection: Detection, mask: BoxMask) -> dict[str, Any]:
    """A record like those of automatic masks, with the box and what the detector says of it."""
    x0, y0, x1, y1 = mask.mask_box_xyxy
    classes = {"label": detection.label, "category_id": detection.category_id}
    return {
        "segmentation": {
            "size": list(mask.mask_rle["size"]),
            "counts": mask.mask_rle["counts"].decode("ascii"),
        },
        "area": int(coco_mask.area(mask.mask_rle)),
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "predicted_iou": mask.predicted_iou,
        "stability_score": mask.stability_score,
        "prompt_bbox": detection.box_xywh,
        "score": detection.score,
        **{name: value for name, value in classes.items() if value is not None},
    }
