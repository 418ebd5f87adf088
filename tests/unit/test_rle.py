import json
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sam_jax import rle
from tests.unit.data_fixtures import box_mask, compress

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=23))

# Columns, walked downwards: 0 1 1 | 0 0 1 | 1 0 0 | 0 0 0
SMALL = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]], bool)
SMALL_RUNS = [1, 2, 2, 2, 5]


def test_runs_of_a_small_mask_by_hand() -> None:
    assert rle.run_lengths(compress(SMALL)).tolist() == SMALL_RUNS
    uncompressed = {"size": [3, 4], "counts": SMALL_RUNS}
    assert rle.run_lengths(uncompressed).tolist() == SMALL_RUNS
    runs = np.array(SMALL_RUNS)
    np.testing.assert_array_equal(rle.decode(runs, (3, 4)), SMALL)
    assert rle.area_px(runs) == 4


def test_a_known_compressed_string() -> None:
    # 6 and 3 are one character each, 100 = 3 * 32 + 4 takes two: 4 + 32 (more), 3; the fourth
    # run is stored as the difference to the second, 5 - 3 = 2.
    counts = bytes([6 + 48, 3 + 48, 4 + 32 + 48, 3 + 48, 2 + 48])
    assert rle.run_lengths({"size": [6, 19], "counts": counts}).tolist() == [6, 3, 100, 5]


@hypothesis.given(masks)
def test_decoding_reverses_pycocotools(mask: np.ndarray) -> None:
    runs = rle.run_lengths(compress(mask))
    np.testing.assert_array_equal(rle.decode(runs, mask.shape), mask)
    assert rle.area_px(runs) == mask.sum()


def test_long_runs_and_negative_differences() -> None:
    mask = np.zeros((3000, 4001), bool)
    mask[5, 7] = mask[2999, 4000] = True
    mask[:, 100:2000] = True
    runs = rle.run_lengths(compress(mask))
    np.testing.assert_array_equal(rle.decode(runs, mask.shape), mask)


BAD = {
    "no mapping": [3, 4],
    "no counts": {"size": [3, 4]},
    "no size": {"counts": [12]},
    "three sides": {"size": [3, 4, 1], "counts": [12]},
    "fractional side": {"size": [3.0, 4], "counts": [12]},
    "boolean side": {"size": [True, 12], "counts": [12]},
    "zero side": {"size": [0, 4], "counts": []},
    "huge side": {"size": [1 << 40, 4], "counts": [12]},
    "counts is a number": {"size": [3, 4], "counts": 12},
    "empty counts": {"size": [3, 4], "counts": ""},
    "empty list": {"size": [3, 4], "counts": []},
    "too short": {"size": [3, 4], "counts": [5, 6]},
    "too long": {"size": [3, 4], "counts": [5, 8]},
    "negative run": {"size": [3, 4], "counts": [15, -3]},
    "sum wraps around": {"size": [3, 4], "counts": [2**63 - 1, 2**63 - 1, 14]},
    "beyond 64 bits": {"size": [3, 4], "counts": [2**70]},
    "fractional run": {"size": [3, 4], "counts": [6.5, 5.5]},
    "nested list": {"size": [3, 4], "counts": [[5, 7]]},
    "ragged list": {"size": [3, 4], "counts": [[5], 7]},
    "strings": {"size": [3, 4], "counts": ["5", "7"]},
    "outside ASCII": {"size": [3, 4], "counts": "12é"},
    "outside the alphabet": {"size": [3, 4], "counts": b"\x0012"},
    "ends within a number": {"size": [3, 4], "counts": b"R"},
    "endless number": {"size": [3, 4], "counts": b"o" * 40 + b"0"},
    "another image's": {"size": [3, 5], "counts": compress(SMALL)["counts"]},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_rles_are_refused(bad: Any) -> None:
    with pytest.raises(rle.BadRleError):
        rle.run_lengths(bad)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


@hypothesis.given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)).map(list) | json_values,
    counts=st.binary(max_size=30)
    | st.text(alphabet=[chr(c) for c in range(48, 112)], max_size=30)
    | st.lists(st.integers(-5, 90), max_size=9)
    | json_values,
)
def test_arbitrary_values_are_refused_or_consistent(size: Any, counts: Any) -> None:
    try:
        runs = rle.run_lengths({"size": size, "counts": counts})
    except rle.BadRleError:
        return
    assert (runs >= 0).all()
    assert runs.sum() == size[0] * size[1]
    assert rle.decode(runs, tuple(size)).shape == tuple(size)


@hypothesis.given(
    hnp.arrays(
        np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 4)
    )
)
def test_labels_become_one_mask_each(labels: np.ndarray) -> None:
    found = [rle.decode(rle.run_lengths(r), labels.shape) for r in rle.from_labels(labels)]
    expected = [labels == value for value in np.unique(labels) if value]
    np.testing.assert_array_equal(np.array(found), np.array(expected))


def overlap_matrix(side: int, scaled: int, start: int, count: int) -> np.ndarray:
    """Overlap of source pixel j with target pixel i, in parts of which a target pixel has `side`.

    Target pixels are `side` long and source pixels `scaled`, so all of it is in whole numbers.
    """
    cells, pixels = np.arange(start, start + count)[:, None] * side, np.arange(side) * scaled
    return np.maximum(np.minimum(cells + side, pixels + scaled) - np.maximum(cells, pixels), 0)


def test_half_covered_pixels_belong_to_the_mask() -> None:
    mask = np.array(
        [
            [1, 1, 1, 0, 0, 0],
            [0, 0, 0, 0, 0, 1],
            [1, 0, 1, 1, 0, 0],
            [0, 0, 1, 0, 0, 0],
        ],
        bool,
    )
    # Two by two blocks hold 2 1 1 / 1 3 0 mask pixels of 4.
    runs = rle.run_lengths(compress(mask))
    half = rle.resample(runs, (4, 6), (2, 3))
    np.testing.assert_array_equal(half, [[1, 0, 0], [0, 1, 0]])


def test_enlarging_repeats_pixels() -> None:
    runs = np.array(SMALL_RUNS)
    twice = rle.resample(runs, (3, 4), (6, 12))
    np.testing.assert_array_equal(twice, SMALL.repeat(2, axis=0).repeat(3, axis=1))


@hypothesis.given(
    mask=masks,
    target=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    corners=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=2, max_size=2),
)
def test_resampling_is_by_exact_coverage(
    mask: np.ndarray, target: tuple[int, int], corners: list[tuple[int, int]]
) -> None:
    """Enlarged and reduced, whole and any window of it, down to pixels that are half covered."""
    hw = mask.shape
    low, high = np.minimum(np.sort(corners, axis=0), np.array(target) - 1).tolist()
    window = tuple(high[i] + 1 - low[i] for i in range(2))
    rows, columns = (overlap_matrix(hw[i], target[i], low[i], window[i]) for i in range(2))
    expected = 2 * (rows @ mask @ columns.T) >= hw[0] * hw[1]
    runs, grid = rle.run_lengths(compress(mask)), rle.Grid(hw, target, tuple(low), window)
    np.testing.assert_array_equal(grid.resample(runs), expected)
    part, (y, x) = grid.resample_part(runs)
    padding = [(y, window[0] - y - part.shape[0]), (x, window[1] - x - part.shape[1])]
    np.testing.assert_array_equal(np.pad(part, padding), expected)


def test_runs_over_many_columns_and_of_no_length() -> None:
    """The first run crosses three columns; the second continues it after nothing."""
    runs = rle.run_lengths({"size": [4, 5], "counts": [2, 9, 0, 3, 6]})
    mask = rle.decode(runs, (4, 5))
    np.testing.assert_array_equal(rle.resample(runs, (4, 5), (4, 5)), mask)


def test_only_what_a_mask_can_touch_is_worked_on() -> None:
    box = box_mask((600, 900), 100, 110, 300, 340)
    part, corner = rle.Grid((600, 900), (300, 450)).resample_part(rle.run_lengths(compress(box)))
    assert (part.shape, corner) == ((5, 20), (50, 150))
    assert part.all()


def test_more_parts_than_32_bits_count() -> None:
    """A pixel of this grid has 60,000 * 60,000 parts; it is 30,000 rows high, 6 columns wide."""
    h = w = 60_000
    runs = np.array([5 * h, 7 * h + h // 2, (w - 13) * h + h // 2])
    got = rle.resample(runs, (h, w), (2, 10_000))
    expected = np.zeros((2, 10_000), bool)
    expected[:, 1] = True  # all of columns 6 to 11; columns 5 and 12 alone are too little
    np.testing.assert_array_equal(got, expected)


def test_nothing_comes_of_an_empty_mask_or_a_window_beside_it() -> None:
    empty = rle.run_lengths({"size": [8, 6], "counts": [48]})
    assert not rle.resample(empty, (8, 6), (4, 3)).any()
    corner = rle.run_lengths(compress(box_mask((8, 6), 0, 2, 0, 2)))
    beside = rle.resample(corner, (8, 6), (4, 3), (2, 1), (2, 2))
    assert beside.shape == (2, 2)
    assert not beside.any()


def test_real_sa1b_annotations(shared_data: Path) -> None:
    content = json.loads((shared_data / "sa1b" / "sa_226381_partial.json").read_text())
    for annotation in content["annotations"]:
        segmentation = annotation["segmentation"]
        runs = rle.run_lengths(segmentation)
        mask = rle.decode(runs, tuple(segmentation["size"]))
        assert rle.area_px(runs) == mask.sum() == annotation["area"]
        y, x = np.nonzero(mask)
        # The release's boxes are one pixel short.
        assert annotation["bbox"] == [x.min(), y.min(), np.ptp(x), np.ptp(y)]


@hypothesis.given(masks, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_a_part_is_encoded_as_the_whole(
    part: np.ndarray, left: int, top: int, right: int, bottom: int
) -> None:
    """Also where the part is as high as the image, and runs go on from column to column."""
    whole = np.pad(part, ((top, bottom), (left, right)))
    encoded = rle.encode_part(part, whole.shape, (left, top))
    assert {**encoded, "counts": encoded["counts"].decode()} == compress(whole)
    box = (left, top, left + part.shape[1], top + part.shape[0])
    runs = rle.run_lengths(encoded)
    np.testing.assert_array_equal(rle.decode_part(runs, whole.shape, box), part)


@hypothesis.given(st.lists(masks, max_size=5))
def test_many_are_read_as_one_by_one(drawn: list[np.ndarray]) -> None:
    rles = [compress(mask) for mask in drawn]
    for given in (rles, [{**r, "counts": r["counts"].encode()} for r in rles]):
        for found, one in zip(rle.run_lengths_of_all(given), rles, strict=True):
            np.testing.assert_array_equal(found, rle.run_lengths(one))


@hypothesis.given(st.lists(st.binary(max_size=9), min_size=1, max_size=3))
def test_any_strings_are_refused_together_as_alone(texts: list[bytes]) -> None:
    rles = [{"size": [3, 4], "counts": text} for text in texts]
    try:
        expected = [rle.run_lengths(one).tolist() for one in rles]
    except rle.BadRleError:
        with pytest.raises(rle.BadRleError):
            rle.run_lengths_of_all(rles)
    else:
        assert [found.tolist() for found in rle.run_lengths_of_all(rles)] == expected


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_one_among_many_is_found(bad: Any, place: int) -> None:
    rles: list[Any] = [compress(np.eye(4, dtype=bool)), compress(np.ones((4, 4), bool))]
    with pytest.raises(rle.BadRleError):
        rle.run_lengths_of_all([*rles[:place], bad, *rles[place:]])


def test_lists_of_runs_are_read_among_many() -> None:
    mask = np.eye(3, dtype=bool)
    (listed,) = rle.from_labels(mask.astype(int))
    for found in rle.run_lengths_of_all([listed, compress(mask)]):
        np.testing.assert_array_equal(rle.decode(found, (3, 3)), mask)
