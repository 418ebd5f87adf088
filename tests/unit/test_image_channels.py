"""Files and arrays of several channels: values as they are stored, and what is refused."""

import io
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from sam_jax import image_channels, images
from sam_jax.data.crops import CropTransform
from sam_jax.data.samples import CorruptSampleError, Sample, decode_image, image_hw
from sam_jax.data.transforms import TrainTransform
from sam_jax.errors import ConfigError
from sam_jax.images import UnreadableImageError
from tests.unit.data_fixtures import box_mask, encode_image, gradient_image, make_sample

HW = (20, 31)


def values(*shape: int, dtype: Any = np.uint16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(0, 1000, shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


BANDS = {"photometric": "minisblack", "planarconfig": "contig"}


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float16, np.float64])
@pytest.mark.parametrize("write", [npy, tiff])
def test_arrays_have_their_channels_on_the_shorter_end(dtype: Any, write: Any) -> None:
    array = values(*HW, 5, dtype=dtype)
    for stored in (array, np.moveaxis(array, -1, 0), np.asfortranarray(array)):
        content = write(np.ascontiguousarray(stored) if write is tiff else stored)
        found = image_channels.stored_channels(content, "x")
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, array)
        floats = image_channels.decode(content, "x", 5)
        assert floats.dtype == np.float32
        np.testing.assert_array_equal(floats, array.astype(np.float32))
        header = image_channels.read_header(content, "x")
        assert (header.stored_hw, header.orientation, header.has_frames) == (HW, 1, False)
    grey = write(array[..., 0])
    decoded = image_channels.decode(grey, "x", 1)
    np.testing.assert_array_equal(decoded, array[..., :1].astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((*HW, 13), BANDS),
        ((13, *HW), {"photometric": "minisblack"}),
        ((13, *HW), {"photometric": "minisblack", "planarconfig": "separate"}),
        ((*HW, 4), {"photometric": "rgb", "compression": "zlib"}),
        ((2, *HW), {"imagej": True}),
    ],
)
def test_tiffs_of_samples_and_of_pages(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    array = values(*shape)
    found = image_channels.stored_channels(tiff(array, **options), "x")
    np.testing.assert_array_equal(found, np.moveaxis(array, 0, -1) if shape[0] < 20 else array)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_files_come_upright(orientation: int) -> None:
    """A TIFF and a deep PNG as Pillow turns a picture of the same orientation."""
    array = values(*HW, 3, dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", exif=exif)
    expected = np.asarray(images.decode(file.getvalue(), "x").image)
    np.testing.assert_array_equal(
        image_channels.decode(file.getvalue(), "x", 3), expected.astype(np.float32)
    )
    turned = tiff(array, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    np.testing.assert_array_equal(image_channels.stored_channels(turned, "x"), expected)
    assert image_channels.read_header(turned, "x").upright_hw == expected.shape[:2]
    np.testing.assert_array_equal(image_channels.stored_channels(turned, "x", "stored"), array)
    np.testing.assert_array_equal(images.turned_array(array, orientation), expected)


def test_ordinary_pictures_in_their_own_mode() -> None:
    for shape, dtype in (((), np.uint8), ((), np.uint16), ((2,), np.uint8), ((4,), np.uint8)):
        array = values(*HW, *shape, dtype=dtype)
        found = image_channels.stored_channels(encode_image(array), "x")
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.squeeze(), array)
    for channels in (3, 4):
        deep = values(*HW, channels)
        written, content = cv2.imencode(".png", deep[..., [2, 1, 0, *range(3, channels)]])
        assert written
        np.testing.assert_array_equal(image_channels.stored_channels(content.tobytes(), "x"), deep)


class Trap:
    """An object whose unpickling would be noticed."""

    def __reduce__(self) -> Any:
        return (sys.exit, ("unpickled",))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (npy(values(*HW, 3)), "has 3 channels .uint16.* expected 4.*set model.in_channels to 3"),
        (npy(values(*HW)), "has 1 channel .uint16"),
        (npy(np.ones((*HW, 4), bool)), "type bool, expected real numbers"),
        (npy(np.ones((*HW, 4), complex)), "type complex128"),
        (npy(np.array([[Trap()]], object)), "type object"),
        (npy(values(2, *HW, 4)), r"has shape \[2, 20, 31, 4\]: expected \[h, w, c\]"),
        (npy(values(*HW, 4))[:-1], "is cut short"),
        (npy(values(*HW, 4))[:30], "is damaged or no image"),
        (npy(np.ones((0, 5, 4))), "is empty"),
        (npy(np.full((*HW, 4), np.nan)), "has 620 pixels that are not finite"),
        (npy(np.full((*HW, 4), 1e300)), "beyond float32"),
        (tiff(values(13, *HW), photometric="minisblack")[:9000], "is damaged or no image"),
        (b"II*\0nothing", "is a TIFF that holds no image|is damaged or no image"),
        (b"", "it is empty"),
        (encode_image(values(*HW, 3, dtype=np.uint8)), "has 3 channels .uint8"),
    ],
)
def test_what_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(UnreadableImageError, match=rf"(?s)^a\.file .*({said})"):
        image_channels.decode(content, "a.file", 4)


def test_a_palette_has_no_values() -> None:
    file = io.BytesIO()
    Image.fromarray(values(*HW, dtype=np.uint8)).convert("P").save(file, "PNG")
    with pytest.raises(UnreadableImageError, match="mode P, which are no values of channels"):
        image_channels.decode(file.getvalue(), "x", 1)


def test_an_array_that_claims_to_be_large_takes_no_memory() -> None:
    file = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (60_000, 17_000, 4)}
    np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(UnreadableImageError, match="is cut short"):
        image_channels.read_header(file.getvalue(), "x")


def test_without_tifffile_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    content = tiff(values(5, *HW))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ConfigError, match=r"pip install 'sam-jax\[tiff\]'"):
        image_channels.decode(content, "x.tif", 5)


@pytest.mark.parametrize("content", [npy(values(*HW, 4)), tiff(values(*HW, 13), **BANDS)])
def test_a_model_of_rgb_names_the_option(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"model\.in_channels"):
        image_channels.read_pixels(tmp_path / "x", None)
    sample = make_sample([box_mask(HW, 2, 9, 3, 9)], image=content)
    with pytest.raises(CorruptSampleError, match=r"model\.in_channels"):
        TrainTransform((32, 32))(sample, np.random.default_rng(0))


def test_arrays_in_memory() -> None:
    array = values(*HW, 4, dtype=np.int32)
    found = image_channels.as_pixels(array, 4)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, array.astype(np.float32))
    assert image_channels.as_pixels(array[..., 0], 1).shape == (*HW, 1)
    for wrong, said in (
        (np.moveaxis(array, -1, 0), r"expected \[h, w, 4\].*moveaxis"),
        (array[..., :3], r"has shape \(20, 31, 3\)"),
        (array[..., 0], r"has shape \(20, 31\)"),
        (array > 0, "type bool"),
        (np.full((2, 2, 4), np.inf), "not finite"),
        (Image.new("RGB", (4, 4)), "picture of Pillow's"),
        ([[1, 2], [3]], "is no array"),
    ):
        with pytest.raises(UnreadableImageError, match=f"(?s)^image 7 .*{said}"):
            image_channels.as_pixels(wrong, 4, "image 7")


def test_the_view_of_other_channels_is_stretched() -> None:
    rgb = gradient_image(HW)
    assert image_channels.rgb_view(rgb) is rgb
    ramp = np.broadcast_to(np.linspace(-5, 95, 101, dtype=np.float32)[:, None], (101, 8))
    for channels in (1, 2, 3, 6):
        scales = np.arange(1, channels + 1, dtype=np.float32)
        image = ramp[..., None] * scales
        found = image_channels.rgb_view(image)
        # From the 1st to the 99th percentile, whatever the channel's scale is.
        grey = np.clip(np.rint((np.arange(101) - 1) / 98 * 255), 0, 255)
        assert (found.dtype, found.shape) == (np.uint8, (101, 8, 3))
        np.testing.assert_allclose(found, np.tile(grey[:, None, None], (1, 8, 3)), atol=1)
    flat = image_channels.rgb_view(np.full((4, 4, 5), 7.0, np.float32))
    assert not flat.any()


# What is resized of float channels is what is resized of bytes, but for the rounding of these.
def in_channels_of(sample: Sample) -> Sample:
    image = sample.image
    assert isinstance(image, bytes)
    return Sample(image, sample.masks_rle, "made", "made.png", in_channels=3)


@pytest.mark.parametrize("scale_jitter", [None, (0.5, 2.0)])
@pytest.mark.parametrize("size", [(24, 32), (64, 96)])
def test_transforms_do_to_channels_what_they_do_to_rgb(
    size: tuple[int, int], scale_jitter: tuple[float, float] | None
) -> None:
    mask = box_mask((45, 61), 3, 40, 5, 55)
    smooth = cv2.GaussianBlur(gradient_image((45, 61)), (9, 9), 3)
    rgb = make_sample([mask], image=encode_image(smooth))
    plain = TrainTransform(size, hflip_rate=0.5, scale_jitter=scale_jitter)
    channels = TrainTransform(size, hflip_rate=0.5, scale_jitter=scale_jitter, in_channels=3)
    for seed in range(6):
        expected = plain(rgb, np.random.default_rng(seed))
        found = channels(in_channels_of(rgb), np.random.default_rng(seed))
        assert found["image"].dtype == np.float32
        # Pillow rounds bytes after each of two passes.
        distance = np.abs(found.pop("image") - expected.pop("image").astype(np.float32))
        assert distance.max() <= 1.01
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
    crop = CropTransform(size), CropTransform(size, in_channels=3)
    for seed in range(6):
        expected_crop, found_crop = (
            transform.packed(sample, np.random.default_rng(seed))[0].image
            for transform, sample in zip(crop, (rgb, in_channels_of(rgb)), strict=True)
        )
        # Beyond black and white, bytes are cut off.
        inside = np.clip(found_crop, 0, 255) - expected_crop.astype(np.float32)
        assert np.abs(inside).max() <= 1.01


def test_samples_know_their_size_without_pixels() -> None:
    image = values(*HW, 6, dtype=np.float32)
    sample = Sample(npy(np.moveaxis(image, -1, 0)), (), "made", "made.npy", in_channels=6)
    assert image_hw(sample) == HW
    np.testing.assert_array_equal(decode_image(sample), image)
    with pytest.raises(CorruptSampleError, match=r"unreadable image.*has 6 channels"):
        decode_image(Sample(sample.image, (), "made", "made.npy", in_channels=5))
