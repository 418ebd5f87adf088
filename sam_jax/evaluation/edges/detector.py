"""The model as an edge detector: masks of a grid of points, of which the edges are kept."""

import functools
import math
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from typing import NamedTuple

import numpy as np

from sam_jax.arrays import Float, UInt8
from sam_jax.errors import UserError
from sam_jax.evaluation.edges.edge_maps import EdgeMapOptions, MaskEdges, combined, mask_edges
from sam_jax.inference.candidates import box_nms, mask_box
from sam_jax.inference.images import ImageEmbeddings
from sam_jax.inference.predictor import Predictor
from sam_jax.inference.regions import point_grid
from sam_jax.inference.restore import restore_logits
from sam_jax.models.mask_decoder import NUM_MULTIMASK


class Detection(NamedTuple):
    """The edges of an image.

    Attributes:
      edges: their strengths, from 0 to 1.
      num_masks: masks that they come from.
    """

    edges: Float[np.ndarray, "h w"]
    num_masks: int


def detect_edges(
    predictor: Predictor,
    images: Mapping[str, UInt8[np.ndarray, "_ _ 3"]],
    options: EdgeMapOptions,
    pool: Executor,
) -> list[Detection]:
    """Edge maps of images that are embedded and prompted together.

    Every mask of every point counts, whatever its predicted IoU and stability, unless its box is
    almost that of a better one.

    Args:
      predictor: of the model.
      images: RGB, by the names that messages have for them.
      options: the grid, and what edges are.
      pool: where masks are worked on while the device decodes the next ones.

    Raises:
      UserError: the model answers with logits that are no numbers.

    Source: Kirillov et al. 2023, sections 7.2 and D.2.
    """
    embeddings = predictor.embed(list(images.values()))
    restorations = [_Restoration.of(embeddings, number) for number in range(len(images))]
    grids = [
        point_grid(options.points_per_side) * restoration.original_hw[::-1]
        for restoration in restorations
    ]
    logits: list[list[np.ndarray]] = [[] for _ in images]
    scores: list[list[float]] = [[] for _ in images]
    boxes: list[list[Future[tuple[float, ...]]]] = [[] for _ in images]
    for batch in predictor.predict_points(
        embeddings,
        grids,
        points_per_batch=min(options.points_per_batch, options.points_per_side**2),
        iou_threshold=-math.inf,
    ):
        for row, image in enumerate(batch.images.tolist()):
            logits[image].append(batch.low_res_logits[row])
            scores[image].append(float(batch.iou_predictions[row]))
            boxes[image].append(pool.submit(restorations[image].box, batch.low_res_logits[row]))
    detections = []
    for number, name in enumerate(images):
        restoration, of_image = restorations[number], logits[number]
        # Of a score that is no number it is not true that it is above the threshold.
        if len(of_image) != NUM_MULTIMASK * options.points_per_side**2:
            raise _not_finite(name)
        box_xyxy = np.array([future.result() for future in boxes[number]])
        if np.isnan(box_xyxy).any():
            raise _not_finite(name)
        kept = box_nms(box_xyxy, np.array(scores[number]), options.box_nms_thresh)
        edges_of = functools.partial(restoration.edges, options=options)
        of_masks = pool.map(edges_of, (of_image[index] for index in kept))
        edges = combined(of_masks, restoration.original_hw, options)
        detections.append(Detection(edges, len(kept)))
    return detections


def _not_finite(name: str) -> UserError:
    return UserError(
        f"{name}: the model answers with numbers that are not finite; its training diverged, or "
        "the file of its weights is damaged: evaluate an earlier checkpoint"
    )


class _Restoration(NamedTuple):
    """Sizes between which logits of an image are enlarged."""

    model_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    original_hw: tuple[int, int]

    @classmethod
    def of(cls, embeddings: ImageEmbeddings, number: int) -> "_Restoration":
        """Those of one of several images."""
        resized, original = (
            tuple(sizes[number].tolist())
            for sizes in (embeddings.resized_hw, embeddings.original_hw)
        )
        return cls(embeddings.model_hw, resized, original)

    def box(self, low_res_logits: np.ndarray) -> tuple[float, ...]:
        """Corners of the mask; not numbers if the logits are none."""
        if not np.isfinite(low_res_logits).all():
            return (math.nan,) * 4
        return mask_box(restore_logits(low_res_logits, *self) > 0)

    def edges(self, low_res_logits: np.ndarray, options: EdgeMapOptions) -> MaskEdges:
        """The mask's edges."""
        return mask_edges(restore_logits(low_res_logits, *self), options)
