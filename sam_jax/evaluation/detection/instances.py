"""Instance segmentation from boxes: each box's mask, scored as a detector's would be.

Source: Kirillov et al. 2023, sections 7.4 and D.4.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from pycocotools import mask as coco_mask

from sam_jax import rle
from sam_jax.arrays import Float, UInt8
from sam_jax.data.corruption import NoObjectsError
from sam_jax.errors import ConfigError
from sam_jax.evaluation.detection.average_precision import (
    Rules,
    average_precisions,
    category_matches,
    gather_matches,
)
from sam_jax.evaluation.detection.figures_report import SKIPPED, FiguresReport, skipped_tally
from sam_jax.evaluation.detection.image_stream import records_of_stream
from sam_jax.evaluation.detection.prompt_boxes import (
    JITTERED,
    OWN,
    DetectedBoxes,
    PromptBox,
    PromptBoxes,
    TrueBoxes,
    corners_of,
)
from sam_jax.evaluation.detection.truth import InstanceTruth, TruthImage
from sam_jax.evaluation.draw import drawn_examples
from sam_jax.evaluation.evaluation import Measures, Record
from sam_jax.evaluation.targets import NotFiniteError
from sam_jax.image_channels import rgb_view
from sam_jax.inference.box_masks import BoxedImage, BoxMask, BoxOptions, masks_of_boxes
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.visualize import draw_boxes, grid, overlay_masks, palette
from sam_jax.weights.files import written_whole

# Options that change how fast records are made, or what is done with them, but not what they say.
_WITHOUT_INFLUENCE = ("images_per_call", "boxes_per_call", "num_examples", "results")
# Masks of an image that its picture shows, those of the highest scores.
_MASKS_SHOWN = 24


@dataclasses.dataclass(frozen=True)
class InstancesConfig:
    """Data and rules of instance segmentation from boxes.

    Attributes:
      truth: a COCO or LVIS file.
      images: the folder of its pictures; None means ``images`` beside it.
      boxes: a detector's file (see ``inference.detections.read_detections``), "truth" for the
        truth's own boxes, or "jittered" for these with noise. Boxes of the truth have a score of 1.
      rules: "coco", or "lvis" for files with LVIS's lists of categories.
      refine: whether each mask is fed back with its box once.
      min_score: boxes of a detector with a lower score are left out; None takes all.
      jitter_rate: standard deviation of the noise of "jittered" over the box's side.
      jitter_max_px: its largest value, pixels of the image.
      max_images: most images, drawn by ``seed``; None takes all.
      seed: of the draw and of the noise.
      images_per_call: images that each device embeds together, and rows that it decodes together.
      boxes_per_call: boxes in a row, all of one image; an image with more takes several rows.
      num_examples: images in the picture of examples; 0 makes none.
      results: file for the masks in COCO's results form; None writes none.
    """

    truth: str
    images: str | None = None
    boxes: str = OWN
    rules: str = "coco"
    refine: bool = True
    min_score: float | None = None
    jitter_rate: float = 0.1
    jitter_max_px: float = 20.0
    max_images: int | None = None
    seed: int = 0
    images_per_call: int = 1
    boxes_per_call: int = 16
    num_examples: int = 4
    results: str | None = None

    def __post_init__(self) -> None:
        if self.rules not in get_args(Rules):
            raise ConfigError(f"rules is {self.rules!r}; expected one of {get_args(Rules)}")
        if self.jitter_rate <= 0 or self.jitter_max_px <= 0:
            raise ConfigError("jitter_rate and jitter_max_px must be above 0")
        if self.max_images is not None and self.max_images < 1:
            raise ConfigError("max_images must be at least 1, or None")
        if self.min_score is not None and self.boxes in (OWN, JITTERED):
            raise ConfigError(f"min_score is for a detector's boxes, not for {self.boxes!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Asked:
    """An image and the boxes that it is asked for."""

    image: TruthImage
    boxes: Sequence[PromptBox]


class InstancesFromBoxes:
    """Masks of boxes and how they match the truth: an ``Evaluation``.

    A record holds the image, of each box the category, score and mask, and of each category what
    ``category_matches`` gives; of boxes of the truth also the IoUs with the masks they are of. Of
    an image that cannot be used it holds why.

    Args:
      config: data and rules.
      in_channels: of the images that the model takes; None for 8-bit RGB.

    Raises:
      FileNotFoundError: a file is not where the config says.
      ConfigError: a file is refused; or the rules do not fit it.
    """

    def __init__(self, config: InstancesConfig, in_channels: int | None = None):
        self._config = config
        self._rules: Rules = "lvis" if config.rules == "lvis" else "coco"
        self._truth = InstanceTruth(
            config.truth, config.images, config.max_images, config.seed, in_channels
        )
        if self._truth.is_federated != (self._rules == "lvis"):
            has = "has" if self._truth.is_federated else "has not"
            raise ConfigError(
                f"rules is {config.rules!r}, but {config.truth} {has} LVIS's neg_category_ids: by "
                "COCO's rules what nobody marked would be wrong, by LVIS's it needs these lists"
            )
        self._boxes, self._digest = _boxes(config, self._truth, self._rules)
        self._options = BoxOptions(config.refine, config.images_per_call, config.boxes_per_call)

    @property
    def settings(self) -> dict[str, Any]:
        """The options that scores depend on, digests of the files, and LVIS's frequencies."""
        settings = dataclasses.asdict(self._config)
        for name in _WITHOUT_INFLUENCE:
            del settings[name]
        frequencies: dict[str, list[int]] = {}
        for category in self._truth.categories:
            if category.frequency is not None:
                frequencies.setdefault(category.frequency, []).append(category.category_id)
        digests = {"truth_digest": self._truth.digest, "boxes_digest": self._digest}
        return settings | digests | {"frequencies": frequencies}

    def __len__(self) -> int:
        """The number of images."""
        return len(self._truth)

    def buckets(self, num_devices: int) -> Buckets:
        """One size of each kind; see ``BoxOptions``."""
        return self._options.buckets()

    def records(self, predictor: Predictor, indices: Iterable[int]) -> Iterator[Record]:
        """The record of each of these images; see ``Evaluation``.

        Raises:
          NotFiniteError: the model answers with numbers that are none.
        """

        def answer(asked: Iterator[_Asked]) -> Iterator[list[BoxMask]]:
            images = (BoxedImage(a.image.pixels, corners_of(a.boxes)) for a in asked)
            return masks_of_boxes(predictor, images, self._options)

        return records_of_stream(
            indices, self._ask, answer, self._record, self._truth.skipped_record
        )

    def _ask(self, index: int) -> _Asked:
        image = self._truth.read(index)
        return _Asked(image, self._boxes.of(image))

    def _record(self, asked: _Asked, masks: Sequence[BoxMask]) -> Record:
        image, boxes = asked.image, asked.boxes
        if not all(math.isfinite(mask.predicted_iou) for mask in masks):
            raise NotFiniteError(
                f"{image.name}: the model answers with numbers that are not finite; its training "
                "diverged, or the file of its weights is damaged: evaluate an earlier checkpoint"
            )
        height, width = image.pixels.shape[:2]
        record: Record = {
            "image_id": image.image_id,
            "image": image.name,
            "size": [height, width],
            "category_ids": [box.category_id for box in boxes],
            "scores": [box.score for box in boxes],
            "counts": [mask.mask_rle["counts"].decode("ascii") for mask in masks],
            "num_objects": sum(not mask.is_crowd for mask in image.masks),
            "matches": _matches(asked, masks, self._rules),
        }
        of_truth = [(box.truth, mask) for box, mask in zip(boxes, masks, strict=True)]
        own = [
            float(coco_mask.iou([mask.mask_rle], [image.masks[place].mask_rle], [0])[0, 0])
            for place, mask in of_truth
            if place is not None
        ]
        if own:
            record["own_ious"] = own
        if image.unusable:
            record["unusable"] = list(image.unusable)
        return record

    def report(self, records: Sequence[Record], seconds: float) -> FiguresReport:
        """Average precisions, with examples; writes the results if the config says where.

        Raises:
          NoObjectsError: no image can be used, or there is no object in any.
        """
        config = self._config
        tally = skipped_tally(records, self._truth.left_out)
        tally.update(self._boxes.left_out)
        used = [record for record in records if SKIPPED not in record]
        counts = {
            "images": len(used),
            "boxes": sum(len(record["counts"]) for record in used),
            "objects": sum(record["num_objects"] for record in used),
        }
        if not counts["objects"]:
            raise NoObjectsError(f"{config.truth} has no object to be found; left out: {tally}")
        if config.results is not None and jax.process_index() == 0:
            write_results(records, Path(config.results))
        figures = measures(records, self.settings)(np.ones(len(records)))
        refined = "box and mask" if config.refine else "box"
        boxes = config.boxes if config.boxes in (OWN, JITTERED) else "detector"
        return FiguresReport(
            title=f"Mask AP (%), {config.rules.upper()}'s rules, prompt: {refined}, boxes: {boxes}",
            figures=figures,
            counts=counts,
            left_out=tally,
            settings=dataclasses.asdict(config),
            seconds=seconds,
            pictures=self._pictures(records),
        )

    def _pictures(self, records: Sequence[Record]) -> dict[str, UInt8[np.ndarray, "_ _ 3"]]:
        """Boxes and masks beside the truth, of images that are drawn by their names."""
        panels, captions = [], []
        for index in drawn_examples(records, "counts", self._config.num_examples):
            record, asked = records[index], self._ask(index)
            shown = np.argsort(-np.array(record["scores"]), kind="stable")[:_MASKS_SHOWN].tolist()
            runs = [{"size": record["size"], "counts": record["counts"][place]} for place in shown]
            boxes = corners_of([asked.boxes[place] for place in shown])
            true = [mask.mask_rle for mask in asked.image.masks]
            pixels = rgb_view(asked.image.pixels)
            colors = palette(len(shown))
            overlay = overlay_masks(pixels, _decoded(runs, record["size"]), colors)
            panels.append(draw_boxes(overlay, boxes - [0, 0, 1, 1], colors, line_px=1.5))
            panels.append(overlay_masks(pixels, _decoded(true, record["size"])))
            captions += [f"{len(shown)} of {len(record['counts'])} boxes", f"truth: {len(true)}"]
        return {"examples": grid(panels, captions, columns=2)} if panels else {}


def measures(records: Sequence[Record], settings: Mapping[str, Any]) -> Measures:
    """Average precisions and, of boxes of the truth, the mean IoU; see ``average_precisions``.

    Args:
      records: of ``InstancesFromBoxes``.
      settings: of it.
    """
    frequencies = {
        category: letter for letter, of in settings["frequencies"].items() for category in of
    }
    matches = gather_matches([record.get("matches", ()) for record in records])
    own_sums = np.array([sum(record.get("own_ious", ())) for record in records], np.float64)
    own_counts = np.array([len(record.get("own_ious", ())) for record in records], np.float64)

    def weighted(weights: Float[np.ndarray, "n"]) -> dict[str, float]:
        figures = average_precisions(matches, weights, frequencies)
        if own_counts.any():
            count = own_counts @ weights
            figures["mIoU"] = float(own_sums @ weights / count) if count else math.nan
        return figures

    return weighted


def results_of(record: Record) -> Iterator[dict[str, Any]]:
    """The masks of a record in COCO's results form.

    Without boxes: lvis would take the area of a box for that of its mask.
    """
    masks = (record.get(name, ()) for name in ("category_ids", "scores", "counts"))
    for category_id, score, counts in zip(*masks, strict=True):
        yield {
            "image_id": record["image_id"],
            "category_id": category_id,
            "segmentation": {"size": record["size"], "counts": counts},
            "score": score,
        }


def write_results(records: Iterable[Record], path: Path) -> None:
    """Writes the masks of all records in COCO's results form, whole or not at all."""
    with written_whole(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        separator = "["
        for record in records:
            for result in results_of(record):
                file.write(f"{separator}\n{json.dumps(result, allow_nan=False)}")
                separator = ","
        file.write("\n]\n" if separator == "," else "[]\n")


def _boxes(
    config: InstancesConfig, truth: InstanceTruth, rules: Rules
) -> tuple[PromptBoxes, str | None]:
    """The boxes, and a digest of the file they are from."""
    if config.boxes == OWN:
        return TrueBoxes(), None
    if config.boxes == JITTERED:
        return TrueBoxes(config.jitter_rate, config.jitter_max_px, config.seed), None
    detected = DetectedBoxes(Path(config.boxes), truth, rules, config.min_score)
    return detected, detected.digest


def _matches(asked: _Asked, masks: Sequence[BoxMask], rules: Rules) -> list[Any]:
    """The matches of every category that counts in an image."""
    image = asked.image
    categories = np.array([box.category_id for box in asked.boxes], np.int64)
    scores = np.array([box.score for box in asked.boxes], np.float64)
    areas = np.array([coco_mask.area(mask.mask_rle) for mask in masks], np.float64)
    true_categories = np.array([mask.category_id for mask in image.masks], np.int64)
    found = []
    for category in np.union1d(categories, true_categories).tolist():
        ours = np.flatnonzero(categories == category).tolist()
        theirs = [
            image.masks[place] for place in np.flatnonzero(true_categories == category).tolist()
        ]
        # LVIS asks for categories only where somebody looked for them.
        if rules == "lvis" and not theirs and category not in image.negative:
            continue
        # LVIS has no crowds.
        crowd = np.array([mask.is_crowd and rules == "coco" for mask in theirs], bool)
        ious = np.zeros((len(ours), len(theirs)))
        if ours and theirs:
            ious = coco_mask.iou(
                [masks[place].mask_rle for place in ours],
                [mask.mask_rle for mask in theirs],
                crowd.astype(int).tolist(),
            )
        found.append(
            category_matches(
                category,
                scores[ours],
                areas[ours],
                ious,
                np.array([mask.area for mask in theirs], np.float64),
                crowd,
                is_exhaustive=rules == "coco" or category not in image.not_exhaustive,
            )
        )
    return found


def _decoded(runs: Sequence[Mapping[str, Any]], size: Sequence[int]) -> np.ndarray:
    height, width = size
    masks = [rle.decode(rle.run_lengths(run), (height, width)) for run in runs]
    return np.stack(masks) if masks else np.zeros((0, height, width), bool)
