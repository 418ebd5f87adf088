import pickle

import cv2
import numpy as np
import pytest

from sam_jax.data.samples import decode_image, decode_masks
from sam_jax.data.sources.synthetic import SyntheticSource


def drawn(source: SyntheticSource, index: int) -> tuple[np.ndarray, np.ndarray]:
    sample = source[index]
    return decode_image(sample), decode_masks(sample, range(len(sample.masks_rle)))


def test_an_image_depends_on_seed_and_index_alone() -> None:
    source = SyntheticSource(num_images=50, image_size=(48, 64), seed=7)
    copy = pickle.loads(pickle.dumps(source))
    for index in (0, 31, 49):
        copy[49 - index]
        np.testing.assert_array_equal(copy[index].image, source[index].image)
        assert copy[index].masks_rle == source[index].masks_rle
    other_seed = SyntheticSource(num_images=50, image_size=(48, 64), seed=8)
    images = [decode_image(s) for s in (source[0], source[1], other_seed[0])]
    assert len({image.tobytes() for image in images}) == 3


@pytest.mark.parametrize("image_size", [(16, 16), (48, 80), (130, 64), (16, 300)])
def test_every_image_has_objects_that_do_not_overlap(image_size: tuple[int, int]) -> None:
    source = SyntheticSource(num_images=200, image_size=image_size)
    counts = []
    for index in range(40):
        image, masks = drawn(source, index)
        assert image.shape == (*image_size, 3)
        assert masks.shape[1:] == image_size
        assert masks.sum(axis=0).max() == 1
        assert masks.sum(axis=(1, 2)).min() >= 0.003 * min(image_size) ** 2
        counts.append(len(masks))
    assert min(counts) >= 1
    assert max(counts) <= 8
    assert len(set(counts)) > 3


def test_objects_look_unlike_what_is_around_them() -> None:
    source = SyntheticSource(num_images=60, image_size=(96, 128))
    kernel = np.ones((9, 9), np.uint8)
    distances = []
    for index in range(60):
        image, masks = drawn(source, index)
        lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)
        for mask in masks:
            around = cv2.dilate(mask.astype(np.uint8), kernel).astype(bool) & ~mask
            distances.append(np.linalg.norm(lab[mask].mean(axis=0) - lab[around].mean(axis=0)))
    # In Lab, 2.3 is just noticeable.
    assert np.quantile(distances, 0.05) > 10
    assert np.median(distances) > 40


def test_surfaces_are_not_flat() -> None:
    source = SyntheticSource(num_images=40, image_size=(96, 128))
    spreads = []
    for index in range(40):
        image, masks = drawn(source, index)
        spreads += [image[mask].std(axis=0).mean() for mask in masks]
    assert np.median(spreads) > 10


def test_names_and_bounds() -> None:
    source = SyntheticSource(num_images=3, image_size=(32, 48), name="toys")
    assert len(source) == 3
    assert (source[2].dataset, source[2].name) == ("toys", "toys::2")
    for index in (3, -1):
        with pytest.raises(IndexError):
            source[index]


def test_the_number_of_objects_can_be_set() -> None:
    source = SyntheticSource(num_images=20, image_size=(64, 64), num_objects=(1, 1))
    assert [len(source[i].masks_rle) for i in range(20)] == [1] * 20


def test_impossible_options_are_refused() -> None:
    for wrong in ({"num_images": 0}, {"image_size": (8, 64)}, {"num_objects": (3, 2)}):
        with pytest.raises(ValueError):
            SyntheticSource(**wrong)
