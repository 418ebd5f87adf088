import io
import pickle
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from sam_jax.data.samples import CorruptSampleError, Sample, decode_image, decode_masks
from tests.unit.data_fixtures import box_mask, compress, encode_image, gradient_image, make_sample

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


def test_exif_orientation_is_ignored_but_named_when_sizes_disagree() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = encoded(Image.fromarray(IMAGE), exif=exif)
    np.testing.assert_array_equal(decode_image(rotated), IMAGE)
    upright_mask = compress(box_mask((7, 5), 0, 2, 0, 2))
    sample = Sample(rotated.image, (upright_mask,), "made", "a.png")
    with pytest.raises(CorruptSampleError, match="EXIF orientation 6") as caught:
        decode_masks(sample, [0])
    assert caught.value.reason == "size mismatch"


def test_a_truncated_jpeg_is_not_padded_with_grey() -> None:
    whole = encode_image(gradient_image((90, 120)), "JPEG")
    for kept in (0.3, 0.6, 0.95):
        with pytest.raises(CorruptSampleError) as caught:
            decode_image(sample_of(whole[: int(kept * len(whole))]))
        assert caught.value.reason == "truncated image"
        assert caught.value.name == "a.jpg"


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
@hypothesis.given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "TIFF", "BMP", "WEBP"]))
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
