"""Images as users have them: taken as documented, or refused with a message that names them."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sam_jax.convert.files import WeightsError, write_safetensors
from sam_jax.inference.images import ImageEmbeddings, ImageError, as_rgb, model_input, open_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), np.uint8)


def test_what_is_taken() -> None:
    np.testing.assert_array_equal(as_rgb(RGB), RGB)
    grey = RGB[..., 0]
    for form in (grey, grey[..., None]):
        np.testing.assert_array_equal(as_rgb(form), np.stack([grey] * 3, axis=-1))
    rgba = np.concatenate([RGB, RNG.integers(0, 256, (5, 7, 1), np.uint8)], axis=-1)
    np.testing.assert_array_equal(as_rgb(rgba), RGB)
    np.testing.assert_array_equal(as_rgb(grey > 100), np.stack([(grey > 100) * 255] * 3, axis=-1))
    np.testing.assert_array_equal(as_rgb(Image.fromarray(RGB)), RGB)
    assert as_rgb(RGB[:1, :1]).shape == (1, 1, 3)
    # What comes out is the caller's to change, and not a view that repeats a channel.
    assert as_rgb(grey).flags.owndata


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (RGB.astype(np.uint16), r"type uint16, expected uint8.*image // 257"),
        (RGB / 255.0, r"type float64, expected uint8.*255 \* image"),
        (RGB.astype(np.int32), "type int32, expected uint8"),
        (RGB[:0], r"is empty: its shape is \(0, 7, 3\)"),
        (RGB[None], r"has shape \(1, 5, 7, 3\)"),
        (RGB[..., :2], r"has shape \(5, 7, 2\)"),
        (np.zeros((3, 5, 7), np.uint8), r"has shape \(3, 5, 7\)"),
    ],
)
def test_what_is_refused(image: np.ndarray, words: str) -> None:
    with pytest.raises(ImageError, match=f"^my picture .*{words}"):
        as_rgb(image, "my picture")


def test_files(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "x.png")
    np.testing.assert_array_equal(open_image(tmp_path / "x.png"), RGB)
    Image.fromarray(RGB).convert("P").save(tmp_path / "palette.png")
    assert open_image(tmp_path / "palette.png").shape == (5, 7, 3)
    Image.fromarray(RGB[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    with pytest.raises(ImageError, match=r"deep\.png has type"):
        open_image(tmp_path / "deep.png")
    with pytest.raises(ImageError, match=r"no\.png does not exist"):
        open_image(tmp_path / "no.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:60])
    with pytest.raises(ImageError, match=r"cut\.png is damaged or no picture"):
        open_image(tmp_path / "cut.png")


def test_a_camera_that_was_held_sideways(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    Image.fromarray(RGB).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(open_image(tmp_path / "x.png"), np.rot90(RGB, -1))


def test_model_input_is_padded_at_the_bottom_and_right() -> None:
    padded, hw = model_input(RGB, (10, 20))
    assert hw == (10, 14)
    assert not padded[:, 14:].any()
    assert padded[:, :14].any()


def embeddings() -> ImageEmbeddings:
    return ImageEmbeddings(
        jnp.arange(24, dtype=jnp.float32).reshape(2, 2, 2, 3),
        np.array([[5, 7], [9, 3]]),
        np.array([[4, 6], [8, 2]]),
        (8, 8),
    )


def test_embeddings_are_kept(tmp_path: Path) -> None:
    written = embeddings()
    written.save(tmp_path / "e.safetensors")
    read = ImageEmbeddings.load(tmp_path / "e.safetensors")
    for field in ("features", "original_hw", "resized_hw"):
        np.testing.assert_array_equal(getattr(read, field), getattr(written, field))
    assert read.model_hw == (8, 8)
    assert len(read[1:]) == 1
    np.testing.assert_array_equal(read[1:].features, written.features[1:])
    np.testing.assert_array_equal(read[[1, 0]].original_hw, written.original_hw[::-1])


def test_a_file_of_something_else_is_no_embeddings(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"features": np.zeros(3)})
    with pytest.raises(WeightsError, match="holds no image embeddings"):
        ImageEmbeddings.load(tmp_path / "x.safetensors")
