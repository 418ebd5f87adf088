"""Object proposals: how many of the marked objects are among the automatic masks.

Source: Kirillov et al. 2023, sections 7.3 and D.3.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam_jax import rle
from sam_jax.arrays import UInt8
from sam_jax.data.corruption import NoObjectsError
from sam_jax.errors import ConfigError
from sam_jax.evaluation.clicks import keyed_number
from sam_jax.evaluation.detection.average_recall import (
    average_recalls,
    found_objects,
    groups_of,
    ranked,
)
from sam_jax.evaluation.detection.figures_report import SKIPPED, FiguresReport, skipped_tally
from sam_jax.evaluation.detection.image_stream import records_of_stream
from sam_jax.evaluation.detection.truth import InstanceTruth, TruthImage
from sam_jax.evaluation.draw import drawn_examples
from sam_jax.evaluation.evaluation import Measures, Record
from sam_jax.evaluation.targets import NotFiniteError
from sam_jax.image_channels import rgb_view
from sam_jax.inference.automatic import AutomaticOptions, generate_masks_of_many
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.visualize import GREEN, ORANGE, RED, grid, overlay_masks

RANKINGS = ("mean", "predicted_iou", "random")
# Options that change how fast records are made, or what is drawn of them, but not what they say.
_WITHOUT_INFLUENCE = ("points_per_batch", "images_per_call", "num_examples")
# The threshold at which pictures say that an object is found: the lowest one, bit 0.
_SHOWN_BIT = 1


@dataclasses.dataclass(frozen=True)
class ProposalsConfig:
    """Data and options of proposals; the defaults are the paper's.

    The paper's ablation of a single output has ``multimask_output`` off, 128 points per side, a
    threshold of 0.95 and random ranking.

    Attributes:
      truth: a COCO or LVIS file; classes are not asked for.
      images: the folder of its pictures; None means ``images`` beside it.
      points_per_side: points along each side of the grid.
      box_nms_thresh: of two masks whose boxes have a higher IoU, the one with the lower predicted
        IoU goes.
      max_proposals: most masks of an image that count.
      ranking: which do: of the highest "mean" of predicted IoU and stability, of the highest
        "predicted_iou", or "random" ones.
      multimask_output: three masks of each point, or the single one.
      max_images: most images, drawn by ``seed``; None takes all.
      seed: of the draw and of the random ranking.
      points_per_batch: points that are prompted at once.
      images_per_call: images that each device searches together.
      num_examples: images in the picture of examples; 0 makes none.
    """

    truth: str
    images: str | None = None
    points_per_side: int = 64
    box_nms_thresh: float = 0.9
    max_proposals: int = 1000
    ranking: str = "mean"
    multimask_output: bool = True
    max_images: int | None = None
    seed: int = 0
    points_per_batch: int = 64
    images_per_call: int = 1
    num_examples: int = 4

    def __post_init__(self) -> None:
        if self.ranking not in RANKINGS:
            raise ConfigError(f"ranking is {self.ranking!r}; expected one of {RANKINGS}")
        if self.max_proposals < 1:
            raise ConfigError(f"max_proposals must be at least 1, got {self.max_proposals}")
        if self.max_images is not None and self.max_images < 1:
            raise ConfigError("max_images must be at least 1, or None")

    def automatic_options(self) -> AutomaticOptions:
        """Options of the generator, which filters nothing but boxes that are alike."""
        return AutomaticOptions(
            points_per_side=self.points_per_side,
            points_per_batch=self.points_per_batch,
            pred_iou_thresh=0.0,
            stability_score_thresh=0.0,
            box_nms_thresh=self.box_nms_thresh,
            regions_per_batch=self.images_per_call,
        )


class ObjectProposals:
    """Automatic masks and the objects that they find: an ``Evaluation``.

    A record holds the image, the number of masks before and after the limit, what
    ``found_objects`` gives, and of each object the best proposal. Of an image that cannot be used
    it holds why.

    Args:
      config: data and options.
      in_channels: of the images that the model takes; None for 8-bit RGB.

    Raises:
      FileNotFoundError: a file is not where the config says.
      ConfigError: a file is refused.
    """

    def __init__(self, config: ProposalsConfig, in_channels: int | None = None):
        self._config = config
        self._options = config.automatic_options()
        self._truth = InstanceTruth(
            config.truth, config.images, config.max_images, config.seed, in_channels
        )
        self._frequencies = {c.category_id: c.frequency for c in self._truth.categories}

    @property
    def settings(self) -> dict[str, Any]:
        """The options that records depend on, and a digest of the file."""
        settings = dataclasses.asdict(self._config)
        for name in _WITHOUT_INFLUENCE:
            del settings[name]
        return settings | {"truth_digest": self._truth.digest}

    def __len__(self) -> int:
        """The number of images."""
        return len(self._truth)

    def buckets(self, num_devices: int) -> Buckets:
        """One size; points have calls of their own."""
        return Buckets(images=(self._config.images_per_call,))

    def records(self, predictor: Predictor, indices: Iterable[int]) -> Iterator[Record]:
        """The record of each of these images; see ``Evaluation``.

        Raises:
          NotFiniteError: the model answers with numbers that are none.
        """

        def answer(images: Iterator[TruthImage]) -> Iterator[list[dict[str, Any]]]:
            return generate_masks_of_many(
                predictor,
                (image.pixels for image in images),
                self._options,
                output_mode="coco_rle",
                multimask_output=self._config.multimask_output,
            )

        return records_of_stream(
            indices, self._truth.read, answer, self._record, self._truth.skipped_record
        )

    def _record(self, image: TruthImage, found: Sequence[Mapping[str, Any]]) -> Record:
        if not found:
            raise NotFiniteError(
                f"{image.name}: not one mask, where every point gives some: the model answers with "
                "numbers that are not finite; evaluate an earlier checkpoint"
            )
        config = self._config
        seed = keyed_number(f"{config.seed}/{image.image_id}")
        proposals = ranked(config.ranking, found, seed)[: config.max_proposals]
        masks = [proposal["segmentation"] for proposal in proposals]
        crowd = np.array([mask.is_crowd for mask in image.masks], bool)
        ious = np.zeros((len(masks), len(image.masks)))
        if image.masks:
            true = [mask.mask_rle for mask in image.masks]
            ious = coco_mask.iou(masks, true, crowd.astype(int).tolist())
        areas = np.array([mask.area for mask in image.masks], np.float64)
        frequencies = [self._frequencies[mask.category_id] for mask in image.masks]
        best = ious.argmax(axis=0)[~crowd].tolist() if image.masks else []
        record: Record = {
            "image_id": image.image_id,
            "image": image.name,
            "size": list(image.pixels.shape[:2]),
            "num_masks": len(found),
            "num_proposals": len(proposals),
            "num_objects": int((~crowd).sum()),
            "found": found_objects(ious, groups_of(areas, frequencies), crowd),
            "best_ious": np.round(ious.max(axis=0)[~crowd], 4).tolist() if image.masks else [],
            "best_counts": [masks[place]["counts"] for place in best],
        }
        if image.unusable:
            record["unusable"] = list(image.unusable)
        return record

    def report(self, records: Sequence[Record], seconds: float) -> FiguresReport:
        """Average recalls, with examples; see ``Evaluation``."""
        config = self._config
        tally = skipped_tally(records, self._truth.left_out)
        used = [record for record in records if SKIPPED not in record]
        counts = {"images": len(used)}
        for what, field in (
            ("objects", "num_objects"),
            ("proposals", "num_proposals"),
            ("masks before the limit", "num_masks"),
        ):
            counts[what] = sum(record[field] for record in used)
        if not counts["objects"]:
            raise NoObjectsError(f"{config.truth} has no object to be found; left out: {tally}")
        outputs = "three masks" if config.multimask_output else "one mask"
        side = config.points_per_side
        return FiguresReport(
            title=f"Mask AR@{config.max_proposals} (%): {outputs} of {side} x {side} points, "
            f"NMS {config.box_nms_thresh:g}, by {config.ranking}",
            figures=measures(records, self.settings)(np.ones(len(records))),
            counts=counts,
            left_out=tally,
            settings=dataclasses.asdict(config),
            seconds=seconds,
            pictures=self._pictures(records),
        )

    def _pictures(self, records: Sequence[Record]) -> dict[str, UInt8[np.ndarray, "_ _ 3"]]:
        """Objects, and the best proposal of each, of images that are drawn by their names."""
        panels, captions = [], []
        for index in drawn_examples(records, "num_objects", self._config.num_examples):
            record, image = records[index], self._truth.read(index)
            is_found = [bool(bits & _SHOWN_BIT) for bits in record["found"]["all"]]
            height, width = record["size"]
            size = (height, width)
            true = [rle.run_lengths(mask.mask_rle) for mask in image.masks if not mask.is_crowd]
            best = [
                rle.run_lengths({"size": record["size"], "counts": counts})
                for counts in record["best_counts"]
            ]
            for runs, colors in (
                (true, [GREEN if found else RED for found in is_found]),
                (best, [GREEN if found else ORANGE for found in is_found]),
            ):
                masks = np.stack([rle.decode(run, size) for run in runs])
                panels.append(overlay_masks(rgb_view(image.pixels), masks, colors))
            captions += [
                f"{sum(is_found)} of {len(is_found)} found at IoU 0.5",
                f"the best of {record['num_proposals']} proposals",
            ]
        return {"examples": grid(panels, captions, columns=2)} if panels else {}


def measures(records: Sequence[Record], settings: Mapping[str, Any]) -> Measures:
    """Average recalls; see ``average_recalls``.

    Args:
      records: of ``ObjectProposals``.
      settings: of it.
    """
    del settings
    return average_recalls([record.get("found", {}) for record in records])
