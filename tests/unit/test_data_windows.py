"""Images that are decoded only where they are new: the same pixels, names that tell them apart."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sam_jax.data import windows
from sam_jax.data.config import DataConfig, SourceConfig
from sam_jax.data.pipeline import train_iterator
from sam_jax.data.samples import CorruptSampleError, Sample
from sam_jax.data.transforms import LAZY_IMAGES, TrainTransform
from sam_jax.data.windows import LazyImage, Placement, Window
from tests.unit.data_fixtures import box_mask, encode_image, gradient_image, make_sample, write_coco
from tests.unit.test_images import saved

HW = (20, 30)
WHOLE = Placement.whole((16, 24), flip=False)


class Everything:
    def __contains__(self, digest: object) -> bool:
        return True


def window_of(sample: Sample | None = None, **changes: Any) -> Window:
    sample = sample or make_sample([box_mask(HW, 2, 12, 3, 23)])
    return dataclasses.replace(Window(sample, WHOLE, reduced_decoding=True), **changes)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Files and arrays, turned and flipped."""
    path = write_coco(tmp_path_factory.mktemp("data") / "coco", 5)
    sources = (
        SourceConfig("coco", str(path)),
        SourceConfig("synthetic", num_images=3, image_size=(24, 32)),
    )
    return DataConfig(sources, (16, 24), 4, max_masks=2, hflip_rate=0.5, num_threads=1)


def batches(config: DataConfig, count: int, **options: Any) -> Iterator[dict[str, np.ndarray]]:
    iterator = train_iterator(config, **options)
    for _ in range(count):
        yield next(iterator)
    iterator.close()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("known", [(), Everything()], ids=["new", "known"])
def test_lazy_batches_are_those_that_are_decoded(
    known: Any, num_workers: int, config: DataConfig
) -> None:
    lazy_config = dataclasses.replace(config, num_workers=num_workers)
    lazily = batches(lazy_config, 4, known_images=known)
    for lazy, decoded in zip(lazily, batches(config, 4), strict=True):
        images: list[LazyImage] = list(lazy.pop(LAZY_IMAGES))
        for image, expected, (h, w) in zip(
            images, decoded.pop("image"), decoded["image_hw"], strict=True
        ):
            assert isinstance(image.source, Window) == bool(known)
            np.testing.assert_array_equal(image.pixels(), expected[:h, :w])
        for name, values in lazy.items():
            np.testing.assert_array_equal(values, decoded.pop(name))
        assert not decoded


def test_nothing_that_is_known_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    transform, sample = TrainTransform((16, 24)), make_sample([box_mask(HW, 2, 12, 3, 23)])
    (first, _), (again, _) = (
        transform.packed(sample, np.random.default_rng(0), known=()) for _ in range(2)
    )
    assert isinstance(first.image, LazyImage)
    assert isinstance(again.image, LazyImage)
    assert first.image.digest == again.image.digest

    def fail(*_: Any) -> None:
        raise AssertionError("an image is decoded")

    with monkeypatch.context() as patch:
        patch.setattr(windows, "open_reduced", fail)
        known, _ = transform.packed(sample, np.random.default_rng(0), known={first.image.digest})
    assert isinstance(known.image, LazyImage)
    assert known.image.digest == first.image.digest
    assert known.image_hw == first.image_hw == (16, 24)
    np.testing.assert_array_equal(known.image.pixels(), first.image.source)


def test_an_image_that_is_damaged_is_found_out_at_once() -> None:
    sample = make_sample([box_mask(HW, 2, 12, 3, 23)])
    assert isinstance(sample.image, bytes)
    damaged = dataclasses.replace(sample, image=sample.image[:-30])
    with pytest.raises(CorruptSampleError, match="truncated"):
        TrainTransform((16, 24)).packed(damaged, np.random.default_rng(0), known=())


def test_digests_tell_windows_apart() -> None:
    sample = make_sample([box_mask(HW, 2, 12, 3, 23)])
    image = gradient_image(HW)
    darker = image.copy()
    darker[0, 0, 0] ^= 1
    different = [
        window_of(),
        window_of(placement=Placement.whole((16, 24), flip=True)),
        window_of(placement=Placement.whole((14, 21), flip=False)),
        window_of(reduced_decoding=False),
        window_of(dataclasses.replace(sample, image=encode_image(darker))),
        window_of(dataclasses.replace(sample, image=image)),
        window_of(dataclasses.replace(sample, image=darker)),
        window_of(dataclasses.replace(sample, image=image.reshape(15, 40, 3))),
        window_of(dataclasses.replace(sample, image=image.astype(np.float32))),
        window_of(dataclasses.replace(sample, in_channels=3)),
    ]
    assert len({window.digest for window in different}) == len(different)
    renamed = dataclasses.replace(sample, name="other.png", dataset="other", masks_rle=())
    assert window_of(renamed).digest == window_of().digest


def test_an_image_is_turned_the_way_its_masks_were() -> None:
    """Masks of the stored size say that EXIF is not followed; without them it would be."""
    content = saved(Image.fromarray(gradient_image(HW)), "PNG", 6)
    stored = make_sample([box_mask(HW, 2, 12, 3, 23)], image=content, orientation="upright")
    upright = make_sample([box_mask(HW[::-1], 2, 12, 3, 13)], image=content, orientation="stored")
    placements = WHOLE, Placement.whole((24, 16), flip=False)
    of_stored, of_upright = (
        window_of(sample, placement=placement)
        for sample, placement in zip((stored, upright), placements, strict=True)
    )
    assert of_stored.digest != window_of(upright).digest
    for window in (of_stored, of_upright):
        bare = window.without_masks()
        assert not bare.sample.masks_rle
        assert bare.digest == window.digest
        np.testing.assert_array_equal(bare.pixels(), window.pixels())
