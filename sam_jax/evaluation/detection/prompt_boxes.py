"""The boxes that instances are prompted with: a detector's, the truth's own, or noisy ones."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from sam_jax.arrays import Float
from sam_jax.data.sources.json_form import Id
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError
from sam_jax.evaluation.clicks import keyed_number
from sam_jax.evaluation.detection.average_precision import MAX_DETECTIONS, Rules, counted
from sam_jax.evaluation.detection.truth import InstanceTruth, TruthImage, TruthMask
from sam_jax.inference.detections import Detection, Detections, Name, check_boxes, read_detections

OWN: Literal["truth"] = "truth"
JITTERED: Literal["jittered"] = "jittered"


@dataclasses.dataclass(frozen=True)
class PromptBox:
    """A box that a mask is asked for.

    Attributes:
      box_xyxy: its edges in pixels of the image.
      category_id: the detector's, unchanged.
      score: likewise; 1 for boxes of the truth.
      truth: place of the mask that the box was made of; None of a detector's.
    """

    box_xyxy: tuple[float, float, float, float]
    category_id: int
    score: float
    truth: int | None = None


@runtime_checkable
class PromptBoxes(Protocol):
    """Boxes by image."""

    @property
    def name(self) -> str:
        """A short name of their content."""
        ...

    @property
    def left_out(self) -> Tally:
        """Boxes that are not used, and why."""
        ...

    def of(self, image: TruthImage) -> list[PromptBox]:
        """The boxes in an image."""
        ...


@dataclasses.dataclass(frozen=True)
class TrueBoxes:
    """The boxes of the truth, crowds left out, with a score of 1.

    Attributes:
      noise_rate: standard deviation of each coordinate's noise over the box's side; 0 for none.
      noise_max_px: largest noise, pixels of the image.
      seed: of the noise.

    Source: the noise is that of Kirillov et al. 2023, appendix A; for the prompt of training.
    """

    noise_rate: float = 0.0
    noise_max_px: float = 20.0
    seed: int = 0
    left_out: Tally = dataclasses.field(default_factory=Tally)

    @property
    def name(self) -> str:
        """A short name of their content."""
        return JITTERED if self.noise_rate else OWN

    def of(self, image: TruthImage) -> list[PromptBox]:
        """The boxes in an image."""
        height, width = image.pixels.shape[:2]
        return [
            PromptBox(self._noisy(mask, image, (height, width)), mask.category_id, 1.0, truth=place)
            for place, mask in enumerate(image.masks)
            if not mask.is_crowd
        ]

    def _noisy(
        self, mask: TruthMask, image: TruthImage, size: tuple[int, int]
    ) -> tuple[float, float, float, float]:
        x, y, width, height = mask.box_xywh
        corners = np.array([x, y, x + width, y + height])
        if self.noise_rate:
            # The same for a mask whatever else is evaluated.
            rng = np.random.default_rng(keyed_number(f"{self.seed}/{image.image_id}/{mask.number}"))
            side = np.array([width, height, width, height])
            noise = self.noise_rate * side * rng.standard_normal(4)
            corners += np.clip(noise, -self.noise_max_px, self.noise_max_px)
            corners = np.concatenate(
                [np.minimum(corners[:2], corners[2:]), np.maximum(corners[:2], corners[2:])]
            )
        limit = np.array([size[1], size[0]] * 2, float)
        x0, y0, x1, y1 = np.clip(corners, 0.0, limit).tolist()
        return x0, y0, x1, y1


class DetectedBoxes:
    """The boxes of a detector's file that the rules of scoring count.

    Args:
      path: see ``read_detections``.
      truth: whose images the boxes are of.
      rules: which boxes count.
      min_score: boxes of a lower score are left out; None takes all.

    Raises:
      ConfigError: see ``read_detections`` and ``check_boxes``; or no box is of any of the images,
        or of any of their categories.
    """

    def __init__(
        self, path: Path, truth: InstanceTruth, rules: Rules, min_score: float | None = None
    ):
        self.digest = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
        every = read_detections(path)
        detections = every if min_score is None else every.above(min_score)
        self.left_out = Tally()
        self._rules = rules
        if num_below := len(every) - len(detections):
            self.left_out.add(f"boxes with a score below {min_score:g}", number=num_below)
        images = _ids(detections, truth)
        for name, boxes in detections.by_image.items():
            if name not in images and boxes:
                example = f"{detections.names} {name!r}"
                self.left_out.add("boxes of images that are not in the truth", example, len(boxes))
        if detections.by_image and not images:
            name = next(iter(detections.by_image))
            raise ConfigError(
                f"{path}: none of its images is in {truth.path}: its first one has the "
                f"{detections.names} {name!r}, the truth's first the id "
                f"{truth.images[0].image_id!r} and file_name {truth.images[0].file_name!r}"
            )
        by_id = {image.image_id: index for index, image in enumerate(truth.images)}
        sizes = {
            name: size
            for name, image_id in images.items()
            if image_id in by_id and (size := truth.size(by_id[image_id])) is not None
        }
        if leaving := check_boxes(detections, sizes):
            example = f"{leaving[0][1].place} of {leaving[0][0]!r}"
            self.left_out.add("boxes that end outside of their image (cut)", example, len(leaving))
        self._categories = {c.category_id for c in truth.categories}
        self._by_label = {c.name: c.category_id for c in truth.categories}
        self._boxes: dict[Id, list[PromptBox]] = {}
        used = {image.image_id for image in truth.images}
        for name, image_id in images.items():
            if image_id in used:
                found = [self._known(d) for d in detections.by_image[name]]
                self._boxes[image_id] = self._counted([box for box in found if box is not None])
        if not any(self._boxes.values()) and self.left_out:
            raise ConfigError(f"{path} has no box to prompt with; left out: {self.left_out}")

    @property
    def name(self) -> str:
        """A short name of their content."""
        return "detections"

    def of(self, image: TruthImage) -> list[PromptBox]:
        """The boxes in an image, in the order of the file."""
        return self._boxes.get(image.image_id, [])

    def _known(self, detection: Detection) -> PromptBox | None:
        """A box with the truth's number of its category; None if the truth has no such category."""
        category_id = detection.category_id
        if category_id is None:
            category_id = self._by_label.get(detection.label or "")
        if category_id not in self._categories:
            label = detection.label if detection.category_id is None else detection.category_id
            reason = "boxes of categories that are not in the truth"
            self.left_out.add(reason, f"{detection.place}: {label!r}")
            return None
        return PromptBox(detection.box_xyxy, category_id, detection.score)

    def _counted(self, boxes: Sequence[PromptBox]) -> list[PromptBox]:
        scores = np.array([box.score for box in boxes], np.float64)
        categories = np.array([box.category_id for box in boxes], np.int64)
        kept = counted(self._rules, scores, categories)
        if num_left := len(boxes) - len(kept):
            of = "image" if self._rules == "lvis" else "image and category"
            reason = f"boxes beyond the {MAX_DETECTIONS[self._rules]} that count in an {of}"
            self.left_out.add(reason, number=num_left)
        return [boxes[index] for index in kept]


def corners_of(boxes: Sequence[PromptBox]) -> Float[np.ndarray, "k 4"]:
    """The edges of boxes."""
    return np.array([box.box_xyxy for box in boxes], np.float64).reshape(-1, 4)


def _ids(detections: Detections, truth: InstanceTruth) -> Mapping[Name, Id]:
    """The truth's number of each image of the file that it has.

    Raises:
      ConfigError: a name may mean several images, or several mean the same one.
    """
    if detections.names == "image_id":
        known = {image.image_id for image in truth.all_images}
        return {name: name for name in detections.by_image if name in known}
    by_name: dict[str, list[Id]] = {}
    for image in truth.all_images:
        name = image.file_name
        for spelling in {name, name.rpartition("/")[2]}:
            by_name.setdefault(spelling, []).append(image.image_id)
    ids: dict[Name, Id] = {}
    owners: dict[Id, Name] = {}
    for name in detections.by_image:
        text = str(name)
        matches = by_name.get(text) or by_name.get(text.rpartition("/")[2], [])
        if len(matches) > 1:
            raise ConfigError(
                f"{detections.path}: file_name {name!r} may be the image {matches[0]!r} or "
                f"{matches[1]!r} of {truth.path}: write it as it stands there"
            )
        if matches:
            if (other := owners.setdefault(matches[0], name)) != name:
                raise ConfigError(
                    f"{detections.path}: {other!r} and {name!r} are both the image {matches[0]!r}"
                )
            ids[name] = matches[0]
    return ids
