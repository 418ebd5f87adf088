"""Masks that were found, in the whole image's pixels: compared, cleaned, put together, written."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from sam_jax import rle
from sam_jax.arrays import Bool, Float, Int
from sam_jax.inference.regions import Box

OutputMode = Literal["binary_mask", "uncompressed_rle", "coco_rle"]

# A mask whose box ends this near to a region's edge, in pixels, is cut by it; the released code's.
EDGE_TOLERANCE = 20.0


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """A mask that passed the filters on single masks.

    Attributes:
      mask_rle: COCO's compressed run lengths.
      box_xyxy: indices of its outermost pixels.
      point: the prompt, ``(x, y)``.
      predicted_iou: the model's estimate.
      stability_score: how little the mask depends on the logit's threshold.
      region: edges of the part of the image that it was found in.
    """

    mask_rle: dict[str, Any]
    box_xyxy: tuple[float, float, float, float]
    point: tuple[float, float]
    predicted_iou: float
    stability_score: float
    region: Box


def mask_box(mask: Bool[np.ndarray, "h w"]) -> tuple[float, float, float, float]:
    """Indices of the outermost pixels, ``(x0, y0, x1, y1)``; zeros for an empty mask."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    if not width:
        return 0.0, 0.0, 0.0, 0.0
    return float(x), float(y), float(x + width - 1), float(y + height - 1)


def cut_sides(box_xyxy: Sequence[float], region: Box, size: tuple[int, int]) -> list[int]:
    """Sides of the box (0 to 3) at which a mask ends with its region, but inside the image."""
    image_box = (0, 0, size[1], size[0])
    return [
        side
        for side, (edge, region_edge, image_edge) in enumerate(
            zip(box_xyxy, region, image_box, strict=True)
        )
        if abs(edge - region_edge) <= EDGE_TOLERANCE and abs(edge - image_edge) > EDGE_TOLERANCE
    ]


def box_nms(
    boxes_xyxy: Float[np.ndarray, "k 4"], scores: Float[np.ndarray, "k"], threshold: float
) -> list[int]:
    """Non-maximum suppression: indices of the boxes that stay, best first.

    None has a higher IoU than the threshold with a better one. Exact and greedy; of equal scores
    the earlier box is the better one.
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


def nms(candidates: Sequence[Candidate], scores: Sequence[float], threshold: float) -> list[int]:
    """``box_nms`` of candidates."""
    boxes = np.array([candidate.box_xyxy for candidate in candidates], np.float64).reshape(-1, 4)
    return box_nms(boxes, np.asarray(scores, np.float64), threshold)


def nms_by_region(candidates: Sequence[Candidate], threshold: float) -> list[Candidate]:
    """Non-maximum suppression that keeps the candidate found in the smallest region."""
    kept = nms(candidates, [1 / _area(c.region) for c in candidates], threshold)
    return [candidates[index] for index in kept]


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


def clean(candidates: Sequence[Candidate], min_area: int, threshold: float) -> list[Candidate]:
    """Candidates without small holes and islands; of those that became alike, unchanged ones stay.

    Args:
      candidates: masks of one image.
      min_area: of what stays, pixels.
      threshold: of the box IoU above which masks are alike.
    """
    cleaned, scores = [], []
    for candidate in candidates:
        height, width = candidate.mask_rle["size"]
        # With this margin a background region that leaves the part has ``min_area`` pixels in it.
        margin = min_area + 1
        x0, y0, x1, y1 = (int(edge) for edge in candidate.box_xyxy)
        corner = max(x0 - margin, 0), max(y0 - margin, 0)
        part_box = (*corner, min(x1 + 1 + margin, width), min(y1 + 1 + margin, height))
        mask = rle.decode_part(rle.run_lengths(candidate.mask_rle), (height, width), part_box)
        mask, filled = remove_small_regions(np.ascontiguousarray(mask), min_area, "holes")
        mask, removed = remove_small_regions(mask, min_area, "islands")
        if filled or removed:
            candidate = dataclasses.replace(
                candidate,
                mask_rle=rle.encode_part(mask, (height, width), corner),
                box_xyxy=_moved(mask_box(mask), corner),
            )
        cleaned.append(candidate)
        scores.append(0.0 if filled or removed else 1.0)
    return [cleaned[index] for index in nms(cleaned, scores, threshold)]


def join(fragments: Sequence[Candidate], size: tuple[int, int], min_iou: float) -> list[Candidate]:
    """Objects that go on over the borders of tiles, put together from what each tile saw of them.

    Two masks of different tiles are of one object if, in the part of the image that both tiles
    see, each is the other's best match and their IoU there is high enough. What ends at a tile's
    border and goes on in none of those that were joined is left out.

    Args:
      fragments: masks that the borders of their tiles cut.
      size: height and width of the image.
      min_iou: of two masks in the part of the image that both tiles see.
    """
    group = list(range(len(fragments)))

    def root(index: int) -> int:
        while group[index] != index:
            index = group[index]
        return index

    for one, other in _mutual_matches(fragments, size, min_iou):
        group[root(one)] = root(other)
    members: dict[int, list[Candidate]] = {}
    for index, fragment in enumerate(fragments):
        members.setdefault(root(index), []).append(fragment)
    return [
        _union(parts)
        for parts in members.values()
        if len(parts) > 1 and not any(_goes_on(part, parts, size) for part in parts)
    ]


def record_of(candidate: Candidate, output_mode: OutputMode) -> dict[str, Any]:
    """A record of the released generator's form."""
    encoded = candidate.mask_rle
    segmentation: Any = {"size": list(encoded["size"])}
    if output_mode == "coco_rle":
        segmentation["counts"] = encoded["counts"].decode("ascii")
    else:
        runs = rle.run_lengths(encoded)
        if output_mode == "binary_mask":
            segmentation = rle.decode(runs, tuple(encoded["size"]))
        else:
            segmentation["counts"] = runs.tolist()
    return {
        "segmentation": segmentation,
        "area": int(coco_mask.area(encoded)),
        "bbox": _xywh(candidate.box_xyxy),
        "predicted_iou": candidate.predicted_iou,
        "point_coords": [list(candidate.point)],
        "stability_score": candidate.stability_score,
        "crop_box": _xywh(candidate.region),
    }


def label_map(
    records: Sequence[Mapping[str, Any]], size: tuple[int, int]
) -> Int[np.ndarray, "h w"]:
    """Masks without overlaps: at each pixel 1 + the number of the smallest mask there, 0 for none.

    Args:
      records: of one image, with segmentations of any form.
      size: its height and width.
    """
    labels = np.zeros(size, np.int32)
    for number in sorted(range(len(records)), key=lambda i: -records[i]["area"]):
        mask = records[number]["segmentation"]
        if isinstance(mask, Mapping):
            mask = rle.decode(rle.run_lengths(mask), size)
        labels[mask] = 1 + number
    return labels


def _mutual_matches(
    fragments: Sequence[Candidate], size: tuple[int, int], min_iou: float
) -> list[tuple[int, int]]:
    """Pairs of fragments of different tiles, each of which fits the other best in its tile."""
    of_tile: dict[Box, list[int]] = {}
    for index, fragment in enumerate(fragments):
        of_tile.setdefault(fragment.region, []).append(index)
    pairs = []
    for tile, neighbour in itertools.combinations(of_tile, 2):
        shared = (*np.maximum(tile, neighbour)[:2], *np.minimum(tile, neighbour)[2:])
        x0, y0, x1, y1 = (int(edge) for edge in shared)
        if x0 >= x1 or y0 >= y1:
            continue
        window = _window((x0, y0, x1, y1), size)
        inside = [
            [
                coco_mask.merge([fragments[index].mask_rle, window], intersect=True)
                for index in of_tile[part]
            ]
            for part in (tile, neighbour)
        ]
        ious = np.asarray(coco_mask.iou(*inside, [0] * len(inside[1]))).reshape(
            len(inside[0]), len(inside[1])
        )
        for row, column in np.argwhere(ious >= min_iou):
            if ious[row].argmax() == column and ious[:, column].argmax() == row:
                pairs.append((of_tile[tile][row], of_tile[neighbour][column]))
    return pairs


def _goes_on(part: Candidate, parts: Sequence[Candidate], size: tuple[int, int]) -> bool:
    """True if a part is cut where no tile of the other parts sees its continuation."""
    for side in cut_sides(part.box_xyxy, part.region, size):
        border, outward = part.region[side], -1 if side < 2 else 1
        strip = list(part.region)
        strip[(side + 2) % 4] = int(border - outward * (EDGE_TOLERANCE + 1))
        at_border = coco_mask.merge([part.mask_rle, _window(strip, size)], intersect=True)
        beyond = [
            _window(other.region, size)
            for other in parts
            if outward * (other.region[side] - border) > EDGE_TOLERANCE
        ]
        if not beyond:
            return True
        seen = coco_mask.merge([at_border, coco_mask.merge(beyond)], intersect=True)
        if coco_mask.area(seen) < coco_mask.area(at_border):
            return True
    return False


def _window(box: Sequence[float], size: tuple[int, int]) -> dict[str, Any]:
    """The mask of a rectangle, given by its edges."""
    x0, y0, x1, y1 = (int(edge) for edge in box)
    return rle.encode_part(np.ones((y1 - y0, x1 - x0), bool), size, (x0, y0))


def _union(parts: Sequence[Candidate]) -> Candidate:
    """Union of masks, with the means of their scores weighted by area."""
    areas = np.array([float(coco_mask.area(part.mask_rle)) for part in parts])
    largest = parts[int(areas.argmax())]
    boxes, regions = (
        np.array([getattr(p, name) for p in parts]) for name in ("box_xyxy", "region")
    )
    return Candidate(
        mask_rle=coco_mask.merge([part.mask_rle for part in parts]),
        box_xyxy=_hull(boxes),
        point=largest.point,
        predicted_iou=float(np.average([p.predicted_iou for p in parts], weights=areas)),
        stability_score=float(np.average([p.stability_score for p in parts], weights=areas)),
        region=_hull(regions),
    )


def _hull(boxes: np.ndarray) -> Any:
    return (*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist())


def _moved(box_xyxy: Sequence[float], corner: tuple[int, int]) -> Any:
    x0, y0, x1, y1 = box_xyxy
    return x0 + corner[0], y0 + corner[1], x1 + corner[0], y1 + corner[1]


def _area(box_xyxy: Sequence[float]) -> float:
    _, _, width, height = _xywh(box_xyxy)
    return width * height


def _xywh(box_xyxy: Sequence[float]) -> list[float]:
    x0, y0, x1, y1 = box_xyxy
    return [x0, y0, x1 - x0, y1 - y0]
