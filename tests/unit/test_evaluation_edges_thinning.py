"""Thinning beside its definition, pixel by pixel, and beside what scikit-image gave."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.extra import numpy as arrays

from sam_jax.evaluation.edges.thinning import thin

FROZEN = Path(__file__).parent / "thinned.npz"
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
bitmaps = arrays.arrays(bool, shapes)


def pixels_of(drawing):
    return np.array([[mark == "#" for mark in row] for row in drawing.split()])


def is_deleted(image, y, x, second):
    """The conditions of the paper, with neighbours P1 (east) to P8 against the clock."""
    around = [(0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)]
    p = dict(enumerate((image[y + dy, x + dx] for dy, dx in around), start=1)) | {
        9: image[y, x + 1]
    }
    crossings = sum(not p[i] and (p[i + 1] or p[i + 2]) for i in (1, 3, 5, 7))
    first_pairs = sum(p[i] or p[i + 1] for i in (1, 3, 5, 7))
    second_pairs = sum(p[i] or p[i + 1] for i in (2, 4, 6, 8))
    if not (crossings == 1 and 2 <= min(first_pairs, second_pairs) <= 3):
        return False
    if second:
        return not ((p[6] or p[7] or not p[4]) and p[5])
    return not ((p[2] or p[3] or not p[8]) and p[1])


def thinned_slowly(image):
    padded = np.pad(image, 1)
    while True:
        before = padded.copy()
        for second in (False, True):
            seen = padded.copy()
            for y, x in np.argwhere(seen):
                if is_deleted(seen, y, x, second):
                    padded[y, x] = False
        if (padded == before).all():
            return padded[1:-1, 1:-1]


@hypothesis.settings(max_examples=40)
@hypothesis.given(bitmaps)
def test_it_is_what_the_definition_says(image):
    np.testing.assert_array_equal(thin(image), thinned_slowly(image))


@hypothesis.given(bitmaps)
def test_lines_stay_and_nothing_falls_apart(image):
    lines = thin(image)
    assert not (lines & ~image).any()
    np.testing.assert_array_equal(thin(lines), lines)
    counts = [cv2.connectedComponents(x.view(np.uint8), connectivity=8)[0] for x in (image, lines)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_lines_to_the_border_are_as_thin_as_can_be(shape):
    assert thin(np.ones(shape, bool)).all()


def test_a_bar_becomes_a_line():
    lines = thin(np.pad(np.ones((3, 12), bool), 4))
    assert np.flatnonzero(lines.any(axis=1)).tolist() == [5]
    assert 10 <= lines.sum() <= 12


def test_it_does_not_end_when_only_the_first_half_finds_nothing():
    """The trap of a port: the second half still takes a pixel here."""
    image = pixels_of("#. ##")
    padded = np.pad(image, 1)
    places = np.argwhere(padded)
    assert not any(is_deleted(padded, y, x, False) for y, x in places)
    assert any(is_deleted(padded, y, x, True) for y, x in places)
    assert thin(image).sum() < image.sum()


def noise() -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for height, width in itertools.product((7, 40, 63), (9, 41)):
        yield cv2.GaussianBlur(rng.random((height, width)), (0, 0), 1.5) > 0.5


def test_scikit_image_does_the_same():
    """`SAM_JAX_UPDATE_GOLDEN=1` keeps what it does, where it is installed."""
    if os.environ.get("SAM_JAX_UPDATE_GOLDEN"):
        thinned = pytest.importorskip("skimage.morphology").thin
        pairs = [np.stack([image, thinned(image)]) for image in noise()]
        np.savez_compressed(FROZEN, *pairs)
    with np.load(FROZEN) as file:
        assert len(file.files) == 6
        for image, expected in file.values():
            assert image.sum() > expected.sum() > 0
            np.testing.assert_array_equal(thin(image), expected)
