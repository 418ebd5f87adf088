import itertools
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sam_jax.data.config import DataConfig
from sam_jax.data.crops import CropTransform, central_box, central_crop, resized_crop
from sam_jax.data.pipeline import TooManyCorruptSamplesError, train_iterator
from sam_jax.data.samples import Sample
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import encode_image, gradient_image, write_coco


def sample(hw: tuple[int, int], kind: str = "PNG") -> Sample:
    return Sample(encode_image(gradient_image(hw), kind), (), "made", "made.png")


def coordinates(hw: tuple[int, int]) -> np.ndarray:
    """An image in which red is the row and green the column, of at most 256."""
    y, x = np.mgrid[: hw[0], : hw[1]]
    return np.stack([y, x, np.zeros_like(y)], axis=-1).astype(np.uint8)


def test_crops_have_the_areas_and_forms_that_were_asked_for() -> None:
    """Corners are read off the colours of crops that are smaller than the image."""
    image = coordinates((200, 240))
    transform = CropTransform((64, 64), crop_area_rates=(0.2, 0.5), hflip_rate=0.0)
    areas, aspects, places = [], [], []
    for seed in range(60):
        example, dropped = transform.packed(
            Sample(image, (), "made", "made"), np.random.default_rng(seed)
        )
        assert example.image.shape == (64, 64, 3)
        assert dropped == ()
        shown = example.image.astype(float)
        height = (shown[-1, 32, 0] - shown[0, 32, 0]) * 64 / 63
        width = (shown[32, -1, 1] - shown[32, 0, 1]) * 64 / 63
        areas.append(height * width / (200 * 240))
        aspects.append(width / height)
        places.append((shown[0, 0, 0], shown[0, 0, 1]))
    assert 0.17 < min(areas) < 0.25 < 0.45 < max(areas) < 0.53
    assert 0.70 < min(aspects) < 0.85 < 1.2 < max(aspects) < 1.40
    assert len(set(places)) > 40


def test_flips_and_seeds() -> None:
    image = Sample(coordinates((40, 40)), (), "made", "made")
    plain, flipped = (
        CropTransform((16, 16), (1.0, 1.0), (1.0, 1.0), hflip_rate=rate)
        .packed(image, np.random.default_rng(3))[0]
        .image
        for rate in (0.0, 1.0)
    )
    np.testing.assert_array_equal(plain[:, ::-1], flipped)
    assert plain[0, -1, 1] > plain[0, 0, 1]
    some = CropTransform((16, 16))
    one, again, other = (
        some.packed(image, np.random.default_rng(seed))[0].image for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)


@pytest.mark.parametrize("hw", [(1, 1), (1, 500), (500, 1), (3, 700), (17, 16)])
def test_images_of_any_form_fill_the_input(hw: tuple[int, int]) -> None:
    transform = CropTransform((16, 24))
    for seed in range(5):
        example, _ = transform.packed(sample(hw), np.random.default_rng(seed))
        batch = transform.zeros(2)
        example.unpack_into(batch, 1)
        np.testing.assert_array_equal(batch["image"][1], example.image)
        assert not batch["image"][0].any()


def test_reduced_decoding_shows_the_same_part() -> None:
    """At an eighth of its size, a JPEG's crop is what the whole would give, but for fine detail."""
    y, x = np.mgrid[:1001, :1203]
    smooth = np.stack([y / 4, x / 5, (x + y) / 9], axis=-1).astype(np.uint8)
    large = Sample(encode_image(smooth, "JPEG"), (), "made", "made.jpg")
    for seed in range(4):
        whole, reduced = (
            CropTransform((32, 32), reduced_decoding=reduces)
            .packed(large, np.random.default_rng(seed))[0]
            .image.astype(int)
            for reduces in (False, True)
        )
        assert np.abs(whole - reduced).max() <= 3


def test_the_middle_of_an_image() -> None:
    assert central_box((100, 300), 1.0) == (0, 100, 100, 100)
    assert central_box((300, 100), 2.0) == (125, 0, 50, 100)
    crop = central_crop(coordinates((90, 200)), (30, 30))
    assert crop[15, 0, 1] == pytest.approx(56, abs=2)
    assert crop[15, -1, 1] == pytest.approx(143, abs=2)
    np.testing.assert_array_equal(
        central_crop(coordinates((20, 20)), (20, 20)), coordinates((20, 20))
    )


def test_a_crop_is_resized_with_antialiasing() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    crop = resized_crop(Image.fromarray(stripes), central_box((64, 64), 1.0), (8, 8))
    assert np.all(np.abs(crop.astype(int) - 127) < 12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_area_rates": (0.0, 1.0)},
        {"crop_area_rates": (0.5, 0.2)},
        {"crop_area_rates": (0.5, 1.2)},
        {"crop_aspect_rates": (0.0, 1.0)},
        {"image_size": (0, 4)},
    ],
)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CropTransform(**{"image_size": (8, 8), **wrong})


def config(source: dict[str, Any], **changes: Any) -> DataConfig:
    values = {
        "sources": (source,),
        "image_size": (8, 12),
        "batch_size": 4,
        "crop_area_rates": (0.5, 1.0),
        "num_threads": 0,
    }
    return DataConfig(**{**values, **changes})


def test_any_source_with_masks_gives_images_too(tmp_path: Any) -> None:
    path = write_coco(tmp_path, 3)
    data = config({"kind": "coco", "path": str(path), "images": str(tmp_path / "images")})
    iterator = train_iterator(data)
    batch = next(iterator)
    assert len(batch.pop("sample_names")) == 4
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "image": ((4, 8, 12, 3), np.uint8)
    }
    iterator.close()


def test_a_damaged_picture_is_counted_and_too_many_stop_the_run(tmp_path: Any) -> None:
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(encode_image(gradient_image((20, 30))))
    (tmp_path / "0.png").write_bytes(encode_image(gradient_image((20, 30)))[:60])
    source = {"kind": "images", "path": str(tmp_path)}
    iterator = train_iterator(config(source, max_corrupt_rate=0.5))
    for _ in range(6):
        next(iterator)
    assert sum(iterator.corrupt_counts.values()) >= 3
    assert iterator.without_object_counts == {}
    state, following = iterator.get_state(), next(iterator)["image"]
    iterator.set_state(state)
    np.testing.assert_array_equal(next(iterator)["image"], following)
    iterator.close()
    strict = train_iterator(config(source, max_corrupt_rate=0.01, corrupt_grace=8))
    with pytest.raises(TooManyCorruptSamplesError, match=r"0\.png"):
        list(itertools.islice(strict, 9))
    strict.close()


def test_an_unknown_crop_is_refused_by_the_config(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="crop_area_rates must be"):
        DataConfig.from_dict(
            {
                "sources": ({"kind": "images", "path": str(tmp_path)},),
                "image_size": (8, 8),
                "batch_size": 1,
                "crop_area_rates": (2.0, 3.0),
            }
        )
