import io
import pickle
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from sam_jax.data.samples import (
    CorruptSampleError,
    Sample,
    decode_image,
    decode_masks,
    image_hw,
    open_reduced,
    picture_remarks,
)
from sam_jax.data.transforms import TrainTransform
from tests.unit.data_fixtures import box_mask, compress, encode_image, gradient_image, make_sample
from tests.unit.test_images import KINDS

IMAGE = gradient_image((5, 7))


def sample_of(image: Any) -> Sample:
    return Sample(image, (), "made", "a.jpg")


def encoded(image: Image.Image, **options: Any) -> Sample:
    file = io.BytesIO()
    image.save(file, **{"format": "PNG", **options})
    return sample_of(file.getvalue())


def test_rgb_comes_back_as_it_was() -> None:
    for source in (IMAGE, encode_image(IMAGE), encode_image(IMAGE, "BMP")):
        np.testing.assert_array_equal(decode_image(sample_of(source)), IMAGE)


def test_grey_and_binary_images_are_repeated_over_the_channels() -> None:
    grey = IMAGE[..., 0]
    expected = np.stack([grey] * 3, axis=-1)
    np.testing.assert_array_equal(decode_image(sample_of(encode_image(grey))), expected)
    binary = Image.fromarray(grey > 5)
    np.testing.assert_array_equal(decode_image(encoded(binary))[..., 2], (grey > 5) * 255)


def test_transparency_is_dropped() -> None:
    alpha = np.arange(35, dtype=np.uint8).reshape(5, 7, 1)
    rgba = np.concatenate([IMAGE, alpha], axis=-1)
    np.testing.assert_array_equal(decode_image(sample_of(encode_image(rgba))), IMAGE)


def test_palette_images_get_their_colours() -> None:
    palette = Image.fromarray(IMAGE).quantize(256)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(decode_image(encoded(palette)), expected)


def test_16_bit_grey_is_stretched_to_its_own_range() -> None:
    values = np.array([[1000, 1500, 2000], [1200, 1000, 2000]], np.uint16)
    expected = np.array([[0, 128, 255], [51, 0, 255]])  # 127.5 rounds to even
    for kind in ("PNG", "TIFF"):
        decoded = decode_image(sample_of(encode_image(values, kind)))
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, np.stack([expected] * 3, axis=-1))
    flat = np.full((2, 3), 7000, np.uint16)
    assert not decode_image(sample_of(encode_image(flat))).any()


def turned_sample(exif_orientation: int, image: np.ndarray = IMAGE, **fields: Any) -> Sample:
    """A picture that is stored turned, as PNG."""
    exif = Image.Exif()
    exif[0x0112] = exif_orientation
    stored = encoded(Image.fromarray(image), exif=exif)
    return Sample(stored.image, **{"masks_rle": (), "dataset": "made", "name": "a.png", **fields})


def test_masks_decide_which_way_up_a_picture_is() -> None:
    upright, stored = np.rot90(IMAGE, -1), IMAGE
    as_upright, as_stored = (
        compress(box_mask((7, 5), 0, 2, 0, 2)),
        compress(box_mask((5, 7), 0, 2, 0, 2)),
    )
    odd = compress(box_mask((6, 6), 0, 2, 0, 2))
    cases: list[tuple[list[Any], np.ndarray | None]] = [
        ([as_upright], upright),
        ([as_stored], stored),
        ([as_stored, as_upright, as_stored], stored),
        ([as_upright, as_upright, as_stored, {"counts": ""}, {"size": 3}], upright),
        ([], None),
        ([as_upright, as_stored], None),
        ([odd], None),
    ]
    for masks, expected in cases:
        for key, by_key in (("upright", upright), ("stored", stored)):
            sample = turned_sample(6, masks_rle=tuple(masks), orientation=key)
            wanted = by_key if expected is None else expected
            np.testing.assert_array_equal(decode_image(sample), wanted)
            assert image_hw(sample) == wanted.shape[:2]
            assert bool(picture_remarks(sample)) == (expected is None)
    # In no file that says nothing of it, there is nothing to decide.
    assert (
        picture_remarks(encoded(Image.fromarray(IMAGE))) == picture_remarks(sample_of(IMAGE)) == ()
    )


def test_sizes_that_fit_neither_way_up_are_explained() -> None:
    sample = turned_sample(6, masks_rle=(compress(box_mask((6, 6), 0, 2, 0, 2)),))
    with pytest.raises(
        CorruptSampleError, match=r"EXIF orientation 6: it is \[5, 7\] as stored"
    ) as e:
        decode_masks(sample, [0])
    assert e.value.reason == "size mismatch"
    # The reason also reaches whoever only sees that nothing was left of it.
    with pytest.raises(CorruptSampleError, match="EXIF orientation 6"):
        TrainTransform(image_size=(16, 16))(sample, np.random.default_rng(0))


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_reduced_examples_are_turned_like_whole_ones(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(smooth_image((64, 96)))
    sample = encoded(image, format=kind, exif=exif)
    hw = image_hw(sample)
    mask = box_mask(hw, 0, hw[0] // 2, 0, hw[1] // 4)
    sample = Sample(sample.image, (compress(mask),), "made", "a")
    whole, reduced = (
        TrainTransform(image_size=(24, 24), reduced_decoding=on)(sample, np.random.default_rng(0))
        for on in (False, True)
    )
    np.testing.assert_array_equal(whole["masks_packed"], reduced["masks_packed"])
    assert whole["original_hw"].tolist() == list(hw)
    difference = np.abs(whole["image"].astype(int) - reduced["image"])
    assert difference.mean() < 3
    size = (24, 16) if orientation < 5 else (16, 24)
    upright = np.asarray(Image.fromarray(decode_image(sample)).resize(size))
    h, w = upright.shape[:2]
    assert np.abs(whole["image"][:h, :w].astype(int) - upright).mean() < 3


def test_a_truncated_jpeg_is_not_padded_with_grey() -> None:
    whole = encode_image(gradient_image((90, 120)), "JPEG")
    for kept in (0.3, 0.6, 0.95):
        with pytest.raises(CorruptSampleError) as caught:
            decode_image(sample_of(whole[: int(kept * len(whole))]))
        assert caught.value.reason == "truncated image"
        assert caught.value.name == "a.jpg"


def smooth_image(hw: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[: hw[0], : hw[1]]
    waves = [np.sin(y / 9), np.cos(x / 11), np.sin((x + y) / 13)]
    return np.rint(127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


@pytest.mark.parametrize(
    ("hw", "at_least_hw", "reduction"),
    [
        ((64, 96), None, 1),
        ((64, 96), (65, 96), 1),
        ((64, 96), (33, 48), 1),  # half of it would be 32 high
        ((64, 96), (32, 48), 2),
        ((64, 96), (17, 20), 2),
        ((64, 96), (16, 24), 4),
        ((64, 96), (1, 1), 8),
        ((61, 91), (30, 45), 2),
    ],
)
def test_jpegs_are_reduced_as_far_as_the_size_allows(
    hw: tuple[int, int], at_least_hw: tuple[int, int] | None, reduction: int
) -> None:
    image = smooth_image(hw)
    sample = encoded(Image.fromarray(image), format="JPEG", quality=95)
    reduced = open_reduced(sample, at_least_hw)
    assert reduced.reduction == reduction
    assert reduced.image.mode == "RGB"
    assert reduced.image.size == (-(-hw[1] // reduction), -(-hw[0] // reduction))
    h, w = hw[0] // reduction, hw[1] // reduction
    blocks = image[: h * reduction, : w * reduction].reshape(h, reduction, w, reduction, 3)
    assert np.abs(np.asarray(reduced.image)[:h, :w] - blocks.mean(axis=(1, 3))).mean() < 3


def test_jpegs_that_are_not_rgb_are_reduced_too() -> None:
    image = Image.fromarray(smooth_image((64, 96)))
    for mode in ("L", "CMYK"):
        sample = encoded(image.convert(mode), format="JPEG", quality=95)
        reduced, reduction = open_reduced(sample, (32, 48))
        assert (reduced.size, reduced.mode, reduction) == ((48, 32), "RGB", 2)
        whole = Image.fromarray(decode_image(sample)).resize((48, 32), Image.Resampling.BOX)
        assert np.abs(np.asarray(reduced, float) - whole).mean() < 3


def test_what_is_no_jpeg_comes_at_its_own_size() -> None:
    image = smooth_image((64, 96))
    deep = image[..., 0].astype(np.uint16) * 200
    for content in (image, *(encode_image(image, kind) for kind in ("PNG", "WEBP", "BMP"))):
        reduced, reduction = open_reduced(sample_of(content), (8, 12))
        assert (reduced.size, reduction) == ((96, 64), 1)
    reduced, reduction = open_reduced(sample_of(encode_image(deep, "TIFF")), (8, 12))
    assert (reduced.size, reduced.mode, reduction) == ((96, 64), "RGB", 1)


def test_a_truncated_jpeg_is_corrupt_at_any_size() -> None:
    whole = encode_image(smooth_image((90, 120)), "JPEG")
    with pytest.raises(CorruptSampleError) as caught:
        open_reduced(sample_of(whole[: len(whole) // 2]), (10, 10))
    assert caught.value.reason == "truncated image"


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\xff\xd8", b"\x89PNG\r\n\x1a\n"])
def test_no_image_at_all(content: bytes) -> None:
    with pytest.raises(CorruptSampleError, match="image"):
        decode_image(sample_of(content))


def test_the_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(CorruptSampleError("a.jpg", "bad rle", "mask 3")))
    assert (error.name, error.reason, error.detail) == ("a.jpg", "bad rle", "mask 3")
    assert str(error) == "a.jpg: bad rle (mask 3)"


# Pillow's remarks on damaged metadata and sizes.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@hypothesis.given(data=st.data(), kind=st.sampled_from(KINDS))
def test_damaged_files_are_images_or_corrupt(data: st.DataObject, kind: str) -> None:
    content = bytearray(encode_image(gradient_image((13, 17)), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        image = decode_image(sample_of(bytes(content)))
    except CorruptSampleError:
        return
    assert image.dtype == np.uint8
    assert image.shape[2] == 3


def test_masks_are_decoded_in_the_order_asked_for() -> None:
    masks = [box_mask((6, 9), i, i + 2, 0, 3 + i) for i in range(4)]
    sample = make_sample(masks)
    np.testing.assert_array_equal(decode_masks(sample, [3, 1]), [masks[3], masks[1]])


def test_masks_of_another_size_are_refused() -> None:
    sample = make_sample([box_mask((6, 9), 0, 2, 0, 3)], image=encode_image(IMAGE))
    with pytest.raises(CorruptSampleError, match=r"mask 0 is \[6, 9\], the image \[5, 7\]"):
        decode_masks(sample, [0])


def test_bad_rles_name_the_mask() -> None:
    good = box_mask((6, 9), 0, 2, 0, 3)
    rles = (compress(good), {"size": [6, 9], "counts": "nonsense"})
    with pytest.raises(CorruptSampleError, match="mask 1") as caught:
        decode_masks(make_sample([good], masks_rle=rles), [0, 1])
    assert caught.value.reason == "bad rle"
