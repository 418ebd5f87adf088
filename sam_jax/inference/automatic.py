"""Everything in an image: a grid of points is prompted, and the good masks are kept."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from sam_jax.arrays import Bool, Float
from sam_jax.data import rle
from sam_jax.errors import ConfigError
from sam_jax.inference.images import ImageEmbeddings, ImageError, as_rgb
from sam_jax.inference.predictor import Predictor
from sam_jax.inference.prompts import Prompt
from sam_jax.inference.restore import restore_logits

OutputMode = Literal["binary_mask", "uncompressed_rle", "coco_rle"]

# Masks whose box ends this near to a crop's edge, in pixels, are cut by it; the released code's.
EDGE_TOLERANCE = 20.0


@dataclasses.dataclass(frozen=True)
class AutomaticOptions:
    """How masks are searched for and chosen; the defaults are the released generator's.

    Attributes:
      points_per_side: points along each side of the grid on the whole image.
      points_per_batch: points that are prompted at once; with it memory grows, not with the image.
      pred_iou_thresh: masks need a higher predicted IoU; 0 takes all.
      stability_score_thresh: masks need this stability at least; 0 takes all.
      stability_score_offset: how far the logit's threshold moves for the stability.
      box_nms_thresh: of two masks of a crop whose boxes have a higher IoU, the one with the lower
        predicted IoU goes.
      crop_n_layers: layers of crops besides the whole image; layer i has ``4 ** i`` of them.
      crop_nms_thresh: the same among all crops, where the mask of the smaller crop stays.
      crop_overlap_ratio: overlap of the crops of the first layer, over the image's shorter side.
      crop_n_points_downscale_factor: layer i has this to the power of i times fewer points per
        side.
      min_mask_region_area: smaller holes are filled and smaller islands removed, pixels; 0 leaves
        all.
      max_area_rate: masks that cover more of the image go. The paper drops those of 95 % and more,
        the released code none.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0
    max_area_rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("points_per_side", "points_per_batch", "crop_n_points_downscale_factor"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.crop_n_layers < 0 or self.min_mask_region_area < 0:
            raise ConfigError("crop_n_layers and min_mask_region_area must not be negative")
        if not 0 < self.max_area_rate <= 1 or not 0 <= self.crop_overlap_ratio < 1:
            raise ConfigError("max_area_rate must be in (0, 1], crop_overlap_ratio in [0, 1)")
        if self.points_per_side < self.crop_n_points_downscale_factor**self.crop_n_layers:
            raise ConfigError(
                f"layer {self.crop_n_layers} of crops has no points left: points_per_side "
                f"{self.points_per_side} / {self.crop_n_points_downscale_factor} ** "
                f"{self.crop_n_layers}"
            )


# What SA-1B's masks were made with, as far as the paper (appendix B) and the released annotations
# tell; the model that made them had three layers in its decoder, and was never released.
SA1B_OPTIONS = AutomaticOptions(
    crop_n_layers=2,
    crop_n_points_downscale_factor=2,
    min_mask_region_area=100,
    max_area_rate=0.95,
)


@dataclasses.dataclass(frozen=True, eq=False)
class _Candidate:
    """A mask that passed, in the whole image's pixels.

    ``box_xyxy`` are indices of its outermost pixels, ``crop_xyxy`` the edges of its crop.
    """

    mask_rle: dict[str, Any]
    box_xyxy: tuple[float, float, float, float]
    point: tuple[float, float]
    predicted_iou: float
    stability_score: float
    crop_xyxy: tuple[int, int, int, int]


def generate_masks(
    predictor: Predictor,
    image: Any,
    options: AutomaticOptions | None = None,
    *,
    output_mode: OutputMode = "binary_mask",
    embeddings: ImageEmbeddings | None = None,
) -> list[dict[str, Any]]:
    """All masks of an image, as records of the released generator's form.

    A record has ``segmentation`` (by ``output_mode``), ``area`` in pixels, ``bbox`` and
    ``crop_box`` as ``[x, y, w, h]``, ``predicted_iou``, ``stability_score`` and ``point_coords``,
    the prompt.

    Only candidates of sufficient predicted IoU are ever enlarged, and survivors are kept as run
    lengths: memory does not grow with the number of points.

    Args:
      predictor: of the model.
      image: see ``images.as_rgb``.
      options: how to search.
      output_mode: a boolean array, run lengths as a list, or COCO's compressed string.
      embeddings: of the whole image, if they are at hand; only without crops.

    Raises:
      ImageError: if the image cannot be used, or embeddings are of another one.

    Source: Kirillov et al. 2023, appendix B; segment-anything, ``automatic_mask_generator.py``.
    """
    options = options or AutomaticOptions()
    pixels = as_rgb(image)
    size = _size(pixels)
    crops, layers = crop_boxes(size, options.crop_n_layers, options.crop_overlap_ratio)
    if embeddings is not None and (
        len(crops) > 1 or len(embeddings) != 1 or embeddings.original_hw[0].tolist() != [*size]
    ):
        raise ImageError(
            f"embeddings must be those of this image alone, {size}, and without crops; got "
            f"{len(embeddings)} of {embeddings.original_hw.tolist()} and {len(crops)} crops"
        )
    found: list[_Candidate] = []
    with ThreadPoolExecutor() as pool:
        for crop, layer in zip(crops, layers, strict=True):
            x0, y0, x1, y1 = crop
            embedded = embeddings or predictor.embed([pixels[y0:y1, x0:x1]])
            scale = options.crop_n_points_downscale_factor**layer
            grid = point_grid(options.points_per_side // scale) * [x1 - x0, y1 - y0]
            passed = _search(predictor, embedded, grid, crop, size, options, pool)
            scores = [candidate.predicted_iou for candidate in passed]
            found += _suppressed(passed, scores, options.box_nms_thresh)
    if len(crops) > 1:
        found = _suppressed(found, [1 / _area(c.crop_xyxy) for c in found], options.crop_nms_thresh)
    if options.min_mask_region_area > 0:
        found = _cleaned(found, options)
    limit = options.max_area_rate * size[0] * size[1]
    return [
        _record(candidate, output_mode)
        for candidate in found
        if options.max_area_rate == 1.0 or int(coco_mask.area(candidate.mask_rle)) < limit
    ]


def point_grid(points_per_side: int) -> Float[np.ndarray, "n 2"]:
    """Points ``(x, y)`` in (0, 1), evenly spaced, row by row."""
    offset = 1 / (2 * points_per_side)
    side = np.linspace(offset, 1 - offset, points_per_side)
    return np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)


def crop_boxes(
    size: tuple[int, int], num_layers: int, overlap_ratio: float
) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """Edges ``(x0, y0, x1, y1)`` of the whole image and of all crops, and the layer of each."""
    height, width = size
    boxes, layers = [(0, 0, width, height)], [0]
    for layer in range(1, num_layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / count))
        crop_h, crop_w = (math.ceil((overlap * (count - 1) + side) / count) for side in size)
        for column, row in itertools.product(range(count), range(count)):
            x0, y0 = column * (crop_w - overlap), row * (crop_h - overlap)
            boxes.append((x0, y0, min(x0 + crop_w, width), min(y0 + crop_h, height)))
            layers.append(layer)
    return boxes, layers


def box_nms(
    boxes_xyxy: Float[np.ndarray, "k 4"], scores: Float[np.ndarray, "k"], threshold: float
) -> list[int]:
    """Which boxes stay, best first: none has a higher IoU than the threshold with a better one.

    Exact and greedy; of equal scores the earlier box is the better one.
    """
    order = np.argsort(-scores, kind="stable")
    x0, y0, x1, y1 = boxes_xyxy.T
    areas = (x1 - x0) * (y1 - y0)
    kept = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(int(best))
        width = np.minimum(x1[best], x1[rest]) - np.maximum(x0[best], x0[rest])
        height = np.minimum(y1[best], y1[rest]) - np.maximum(y0[best], y0[rest])
        overlap = np.maximum(width, 0) * np.maximum(height, 0)
        # Written without a division: boxes of one pixel's width have no area here.
        order = rest[overlap <= threshold * (areas[best] + areas[rest] - overlap)]
    return kept


def remove_small_regions(
    mask: Bool[np.ndarray, "h w"], min_area: int, kind: Literal["holes", "islands"]
) -> tuple[Bool[np.ndarray, "h w"], bool]:
    """The mask without small holes or islands, and whether there were any.

    Regions touch over corners, too. If all islands are small, the largest one stays.
    """
    is_hole = kind == "holes"
    count, regions, stats, _ = cv2.connectedComponentsWithStats(
        (mask ^ is_hole).astype(np.uint8), connectivity=8
    )
    areas = stats[1:, cv2.CC_STAT_AREA]
    small = 1 + np.flatnonzero(areas < min_area)
    if not small.size:
        return mask, False
    is_object = np.zeros(count, bool)
    if is_hole:
        is_object[[0, *small]] = True
    else:
        is_object[1:] = True
        is_object[small] = False
        if not is_object.any():
            is_object[1 + areas.argmax()] = True
    return is_object[regions], True


def _search(
    predictor: Predictor,
    embedded: ImageEmbeddings,
    grid: np.ndarray,
    crop: tuple[int, int, int, int],
    size: tuple[int, int],
    options: AutomaticOptions,
    pool: ThreadPoolExecutor,
) -> list[_Candidate]:
    """The masks of one crop that pass by themselves, in the order of their points."""
    passed: list[_Candidate] = []
    for start in range(0, len(grid), options.points_per_batch):
        points = grid[start : start + options.points_per_batch]
        (found,) = predictor.predict(embedded, [[Prompt(points=[point]) for point in points]])
        wanted = np.ones(found.iou_predictions.shape, bool)
        if options.pred_iou_thresh > 0:
            wanted = found.iou_predictions > options.pred_iou_thresh

        def examine(place: np.ndarray, found: Any = found, points: Any = points) -> Any:
            prompt, candidate = place
            logits = restore_logits(
                found.low_res_logits[prompt, candidate],
                found.model_hw,
                found.resized_hw,
                found.original_hw,
            )
            return _examined(
                logits,
                points[prompt],
                float(found.iou_predictions[prompt, candidate]),
                crop,
                size,
                options,
            )

        passed += [c for c in pool.map(examine, np.argwhere(wanted)) if c is not None]
    return passed


def _examined(
    logits: np.ndarray,
    point: np.ndarray,
    predicted_iou: float,
    crop: tuple[int, int, int, int],
    size: tuple[int, int],
    options: AutomaticOptions,
) -> _Candidate | None:
    """A candidate in the whole image's pixels, unless it is unstable or cut by its crop."""
    offset = options.stability_score_offset
    # As the released code divides: a mask that is empty at both thresholds has no stability.
    union = np.count_nonzero(logits > -offset)
    stability = np.count_nonzero(logits > offset) / union if union else math.nan
    if options.stability_score_thresh > 0 and not stability >= options.stability_score_thresh:
        return None
    x0, y0 = crop[:2]
    mask = logits > 0
    box = _box(mask)
    in_image = (box[0] + x0, box[1] + y0, box[2] + x0, box[3] + y0)
    image_box = (0, 0, size[1], size[0])
    for edge, crop_edge, image_edge in zip(in_image, crop, image_box, strict=True):
        near_crop = abs(edge - crop_edge) <= EDGE_TOLERANCE
        if near_crop and abs(edge - image_edge) > EDGE_TOLERANCE:
            return None
    whole = np.zeros(size, bool)
    whole[crop[1] : crop[3], crop[0] : crop[2]] = mask
    return _Candidate(
        mask_rle=_encode(whole),
        box_xyxy=in_image,
        point=(float(point[0]) + x0, float(point[1]) + y0),
        predicted_iou=predicted_iou,
        stability_score=stability,
        crop_xyxy=crop,
    )


def _encode(mask: np.ndarray) -> dict[str, Any]:
    return coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))


def _decode(mask_rle: dict[str, Any]) -> np.ndarray:
    height, width = mask_rle["size"]
    return rle.decode(rle.run_lengths(mask_rle), (height, width))


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Indices of the outermost pixels; zeros for an empty mask."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    if not width:
        return 0.0, 0.0, 0.0, 0.0
    return float(x), float(y), float(x + width - 1), float(y + height - 1)


def _suppressed(
    candidates: Sequence[_Candidate], scores: Sequence[float], threshold: float
) -> list[_Candidate]:
    boxes = np.array([candidate.box_xyxy for candidate in candidates], np.float64).reshape(-1, 4)
    kept = box_nms(boxes, np.asarray(scores, np.float64), threshold)
    return [candidates[index] for index in kept]


def _cleaned(candidates: Sequence[_Candidate], options: AutomaticOptions) -> list[_Candidate]:
    """Without small holes and islands; of masks that became alike, unchanged ones stay."""
    cleaned, scores = [], []
    for candidate in candidates:
        mask = _decode(candidate.mask_rle)
        mask, filled = remove_small_regions(mask, options.min_mask_region_area, "holes")
        mask, removed = remove_small_regions(mask, options.min_mask_region_area, "islands")
        if filled or removed:
            candidate = dataclasses.replace(candidate, mask_rle=_encode(mask), box_xyxy=_box(mask))
        cleaned.append(candidate)
        scores.append(0.0 if filled or removed else 1.0)
    return _suppressed(cleaned, scores, max(options.box_nms_thresh, options.crop_nms_thresh))


def _record(candidate: _Candidate, output_mode: OutputMode) -> dict[str, Any]:
    encoded = candidate.mask_rle
    segmentation: Any
    if output_mode == "binary_mask":
        segmentation = _decode(encoded)
    elif output_mode == "coco_rle":
        segmentation = {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}
    else:
        segmentation = {"size": list(encoded["size"]), "counts": _run_lengths(_decode(encoded))}
    return {
        "segmentation": segmentation,
        "area": int(coco_mask.area(encoded)),
        "bbox": _xywh(candidate.box_xyxy),
        "predicted_iou": candidate.predicted_iou,
        "point_coords": [list(candidate.point)],
        "stability_score": candidate.stability_score,
        "crop_box": _xywh(candidate.crop_xyxy),
    }


def _run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of runs, column by column, background first."""
    flat = mask.T.reshape(-1)
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return [0, *lengths] if flat[0] else lengths


def _area(box_xyxy: Sequence[float]) -> float:
    _, _, width, height = _xywh(box_xyxy)
    return width * height


def _xywh(box_xyxy: Sequence[float]) -> list[float]:
    x0, y0, x1, y1 = box_xyxy
    return [x0, y0, x1 - x0, y1 - y0]


def _size(pixels: np.ndarray) -> tuple[int, int]:
    height, width = pixels.shape[:2]
    return height, width
