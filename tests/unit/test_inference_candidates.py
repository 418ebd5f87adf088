"""Filters and joins of candidate masks, each against a plain or a known answer."""

import numpy as np
import pytest

from sam_jax import rle
from sam_jax.inference.candidates import (
    Candidate,
    box_nms,
    clean,
    cut_sides,
    join,
    label_map,
    mask_box,
    record_of,
    remove_small_regions,
)
from sam_jax.inference.regions import Box, tile_boxes

RNG = np.random.default_rng(0)


def plain_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    def iou(a: np.ndarray, b: np.ndarray) -> float:
        sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        overlap = np.prod(np.maximum(sides, 0))
        return overlap / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - overlap)

    kept: list[int] = []
    for index in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[index], boxes[other]) <= threshold for other in kept):
            kept.append(index)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.7, 0.95])
def test_nms_is_the_greedy_one_at_any_threshold(threshold: float) -> None:
    for _ in range(10):
        corners = RNG.integers(0, 20, (40, 2))
        boxes = np.concatenate([corners, corners + RNG.integers(1, 20, (40, 2))], axis=1)
        # Few values, so that there are ties, which the earlier box wins.
        scores = RNG.integers(0, 8, 40).astype(float)
        assert box_nms(boxes.astype(float), scores, threshold) == plain_nms(
            boxes, scores, threshold
        )


def test_nms_of_nothing_and_of_boxes_without_area() -> None:
    assert box_nms(np.zeros((0, 4)), np.zeros(0), 0.5) == []
    assert sorted(box_nms(np.zeros((2, 4)), np.zeros(2), 0.5)) == [0, 1]


def test_small_holes_are_filled_and_small_islands_removed() -> None:
    mask = np.zeros((12, 12), bool)
    mask[1:9, 1:9] = True
    mask[3, 3] = mask[5:8, 5:8] = False
    mask[11, 11] = True
    filled, changed = remove_small_regions(mask, 5, "holes")
    assert changed
    assert filled[3, 3]
    assert not filled[6, 6]
    cleaned, changed = remove_small_regions(filled, 5, "islands")
    assert changed
    assert not cleaned[11, 11]
    assert cleaned[1, 1]
    same, changed = remove_small_regions(cleaned, 5, "islands")
    assert not changed
    np.testing.assert_array_equal(same, cleaned)


def test_the_largest_of_small_islands_stays() -> None:
    mask = np.zeros((9, 9), bool)
    mask[0, 0] = mask[4, 4:6] = True
    cleaned, changed = remove_small_regions(mask, 50, "islands")
    assert changed
    assert np.argwhere(cleaned).tolist() == [[4, 4], [4, 5]]


def candidate(mask: np.ndarray, region: Box | None = None, iou: float = 0.9) -> Candidate:
    height, width = mask.shape
    return Candidate(
        rle.encode_part(mask, mask.shape),
        mask_box(mask),
        (1.0, 2.0),
        iou,
        0.95,
        region or (0, 0, width, height),
    )


def decoded(found: Candidate) -> np.ndarray:
    return rle.decode(rle.run_lengths(found.mask_rle), tuple(found.mask_rle["size"]))


@pytest.mark.parametrize("min_area", [1, 4, 30])
def test_cleaning_a_part_is_cleaning_the_whole(min_area: int) -> None:
    """Masks at the image's edges, too, where background is cut off by the mask."""
    for _ in range(20):
        mask = np.zeros((40, 50), bool)
        y, x = RNG.integers(0, 30, 2)
        mask[y : y + RNG.integers(2, 40), x : x + RNG.integers(2, 40)] = True
        mask &= RNG.random(mask.shape) < 0.7
        expected, _ = remove_small_regions(mask, min_area, "holes")
        expected, _ = remove_small_regions(expected, min_area, "islands")
        (cleaned,) = clean([candidate(mask)], min_area, 1.0)
        np.testing.assert_array_equal(decoded(cleaned), expected)
        assert cleaned.box_xyxy == mask_box(expected)


def test_of_masks_that_became_alike_the_unchanged_one_stays() -> None:
    whole = np.zeros((30, 30), bool)
    whole[5:20, 5:20] = True
    holey = whole.copy()
    holey[9, 9] = False
    kept = clean([candidate(holey, iou=0.99), candidate(whole, iou=0.9)], 10, 0.7)
    assert [found.predicted_iou for found in kept] == [0.9]


SIZE = (120, 400)


def fragments_of(objects: list[np.ndarray]) -> list[Candidate]:
    """Parts of objects that each tile sees, of those that it cuts."""
    found = []
    for tile in tile_boxes(SIZE, 120, 40):
        x0, y0, x1, y1 = tile
        window = np.zeros(SIZE, bool)
        window[y0:y1, x0:x1] = True
        for mask in objects:
            part = mask & window
            if part.any() and cut_sides(mask_box(part), tile, SIZE):
                found.append(candidate(part, tile))
    return found


def test_what_tiles_cut_is_joined() -> None:
    """A bar over all tiles, a disc over two, and a bar within the first disc's rows."""
    bar, disc = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    bar[20:40, 30:370] = True
    ys, xs = np.mgrid[:120, :400]
    disc[(ys - 80) ** 2 + (xs - 110) ** 2 < 34**2] = True
    fragments = fragments_of([bar, disc])
    assert len(fragments) >= 6
    joined = join(fragments, SIZE, 0.7)
    assert len(joined) == 2
    largest, smallest = sorted(joined, key=lambda found: -decoded(found).sum())
    np.testing.assert_array_equal(decoded(largest), bar)
    np.testing.assert_array_equal(decoded(smallest), disc)
    assert largest.box_xyxy == mask_box(bar)
    assert largest.predicted_iou == pytest.approx(0.9)


def test_a_corner_that_no_tile_saw_is_missed() -> None:
    """Three of four tiles around a disc: their hull covers all of it, they do not."""
    size = (300, 300)
    ys, xs = np.mgrid[:300, :300]
    disc = (ys - 150) ** 2 + (xs - 150) ** 2 < 120**2
    tiles = tile_boxes(size, 200, 100)
    assert len(tiles) == 4
    fragments = []
    for tile in tiles:
        window = np.zeros(size, bool)
        window[tile[1] : tile[3], tile[0] : tile[2]] = True
        fragments.append(candidate(disc & window, tile))
    (whole,) = join(fragments, size, 0.7)
    np.testing.assert_array_equal(decoded(whole), disc)
    assert join(fragments[:3], size, 0.7) == []


def test_what_stays_cut_is_left_out() -> None:
    bar = np.zeros(SIZE, bool)
    bar[20:40, 30:370] = True
    fragments = fragments_of([bar])
    # Without the last tile's share, its neighbour's end is a cut and no end.
    without_last = [f for f in fragments if f.region != max(f.region for f in fragments)]
    assert join(without_last, SIZE, 0.7) == []
    assert join([], SIZE, 0.7) == []


def test_fragments_that_disagree_are_not_joined() -> None:
    left, right = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    left[20:40, 30:120] = True
    right[60:100, 80:160] = True
    tiles = tile_boxes(SIZE, 120, 40)
    assert join([candidate(left, tiles[0]), candidate(right, tiles[1])], SIZE, 0.7) == []


def test_label_map_shows_the_smallest_mask() -> None:
    large, small, none = (np.zeros((6, 8), bool) for _ in range(3))
    large[1:5, 1:7] = True
    small[2:4, 2:4] = True
    for mode in ("binary_mask", "coco_rle", "uncompressed_rle"):
        records = [record_of(candidate(mask), mode) for mask in (small, none, large)]
        labels = label_map(records, (6, 8))
        assert labels[2, 2] == 1
        assert labels[1, 1] == 3
        assert labels[0, 0] == 0
        assert np.bincount(labels.reshape(-1)).tolist() == [24, 4, 0, 20]
