"""Pictures: the same pixels, or the same refusal, wherever they are read; docs/pictures.md."""

import io
import logging
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from sam_jax import images
from sam_jax.data.samples import CorruptSampleError, Sample, decode_image, open_reduced
from sam_jax.images import ImageError, as_rgb, read_image
from sam_jax.inference import folder

RNG = np.random.default_rng(0)
HW = (70, 90)
RGB = cv2.GaussianBlur(RNG.integers(0, 256, (*HW, 3), np.uint8), (9, 9), 0)
GREY = RGB[..., 1]
ALPHA = RNG.integers(0, 256, (*HW, 1), np.uint8)
DEEP = RGB.astype(np.uint16) * 16 + 5  # 12 bits of 16

# What turns stored pixels upright, by the definition of EXIF's orientations.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def saved(image: Image.Image, kind: str, orientation: int = 1, **options: Any) -> bytes:
    if orientation != 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def deep_file(suffix: str, array: np.ndarray) -> bytes:
    """A file of what Pillow does not write, by OpenCV."""
    channels = [2, 1, 0, 3][: array.shape[2]]
    lossless = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000] if suffix == ".jp2" else []
    done, content = cv2.imencode(suffix, array[..., channels], lossless)
    assert done
    return content.tobytes()


def tiff(array: np.ndarray, *, sample_format: int, photometric: int = 1) -> bytes:
    """A grey TIFF of any type."""
    bits, (h, w) = array.dtype.itemsize * 8, array.shape
    tags = [(256, w), (257, h), (258, bits), (259, 1), (262, photometric), (273, 134)]
    tags += [(277, 1), (278, h), (279, array.nbytes), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + array.tobytes()


def of_mode(mode: str) -> Image.Image:
    base = Image.fromarray(RGB)
    if mode.startswith("I;16"):
        order = ">u2" if mode.endswith("B") else "<u2"
        return Image.frombytes(mode, HW[::-1], DEEP[..., 0].astype(order).tobytes())
    if mode in ("I", "F"):
        return Image.fromarray(DEEP[..., 0].astype(np.int32 if mode == "I" else np.float32))
    if mode == "LAB":
        return Image.frombytes("LAB", HW[::-1], RGB.tobytes())
    if mode in ("LA", "RGBA"):
        color = GREY[..., None] if mode == "LA" else RGB
        return Image.fromarray(np.concatenate([color, ALPHA], axis=-1))
    by = {"PA": "P", "La": "LA", "RGBa": "RGBA"}
    return (of_mode(by[mode]) if mode in by else base).convert(mode)


def stretched(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64) - values.min()
    rgb = np.rint(values / values.max() * 255).astype(np.uint8)
    return rgb if rgb.ndim == 3 else np.stack([rgb] * 3, axis=-1)


def outcome(read: Callable[[], Any]) -> Any:
    """The pixels, or why there are none."""
    try:
        return read()
    except (CorruptSampleError, images.UnreadableImageError) as error:
        return error.detail


def routes(content: bytes, path: Path) -> Iterator[Any]:
    """Outcomes for a file in training, evaluation, embed, predict and masks."""
    sample = Sample(content, (), "made", str(path))
    path.write_bytes(content)
    yield outcome(lambda: np.asarray(open_reduced(sample, HW).image))
    yield outcome(lambda: decode_image(sample))
    yield outcome(lambda: read_image(path))
    ((_, found),) = folder._read_ahead([path], None)
    yield found.detail if isinstance(found, images.UnreadableImageError) else found
    try:
        with Image.open(path) as image:
            yield outcome(lambda: as_rgb(image))
    except OSError:  # Pillow itself refuses it
        yield outcome(lambda: read_image(path))


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I", "F")
MODES += ("I;16", "I;16B")
TURNED_KINDS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
KINDS = images._formats()  # Pillow reads AVIF since 11.3.


def rows() -> Iterator[Any]:
    for kind in KINDS:
        for mode in MODES:
            try:
                content = saved(of_mode(mode), kind)
                Image.open(io.BytesIO(content)).load()
            except (OSError, ValueError, KeyError):
                continue  # The format has no such mode, or Pillow writes it wrongly.
            yield pytest.param(content, None, id=f"{kind}-{mode}")
    grey, deep = DEEP[..., 0], stretched(DEEP)
    alpha = np.concatenate([DEEP, ALPHA.astype(np.uint16) * 257], axis=-1)
    palette = of_mode("P")
    for name, content, expected in (
        ("16-bit RGB PNG", deep_file(".png", DEEP), deep),
        ("16-bit RGB TIFF", deep_file(".tiff", DEEP), deep),
        ("16-bit RGB JPEG 2000", deep_file(".jp2", DEEP), deep),
        ("16-bit RGBA PNG", deep_file(".png", alpha), deep),
        ("16-bit grey PNG", saved(of_mode("I;16"), "PNG"), stretched(grey)),
        ("16-bit PPM", deep_file(".ppm", DEEP), "16 bits a channel in a form that is not read"),
        ("float TIFF", tiff(grey.astype(np.float32) / 4095, sample_format=3), stretched(grey)),
        ("float RGB TIFF", deep_file(".tiff", RGB.astype(np.float32)), "a TIFF of a kind"),
        ("double TIFF", tiff(grey.astype(np.float64), sample_format=3), "a TIFF of a kind"),
        ("signed 16-bit TIFF", tiff(grey.astype(np.int16) - 900, sample_format=2), stretched(grey)),
        ("signed 8-bit TIFF", tiff(GREY.view(np.int8), sample_format=2), "signed 8-bit"),
        (
            "32-bit TIFF",
            tiff(grey.astype(np.uint32) * 2**20, sample_format=1),
            stretched(grey),
        ),
        (
            "white at 0",
            tiff(4095 - grey, sample_format=1, photometric=0),
            stretched(grey),
        ),
        ("NaN", tiff(np.where(GREY > 99, np.nan, 1).astype(np.float32), sample_format=3), "finite"),
        ("infinite", tiff(np.where(GREY > 99, np.inf, 1).astype(np.float32), sample_format=3), "f"),
        ("one value", saved(Image.fromarray(np.full(HW, 7, np.uint16)), "PNG"), np.zeros_like(RGB)),
        ("palette, one transparent", saved(palette, "PNG", transparency=3), palette),
        ("palette, transparencies", saved(palette, "PNG", transparency=bytes(256)), palette),
        ("RGB, one transparent", saved(Image.fromarray(RGB), "PNG", transparency=(1, 2, 3)), RGB),
        ("premultiplied TIFF", saved(of_mode("RGBA"), "TIFF", tiffinfo={338: 1}), None),
        ("Adobe CMYK JPEG", saved(of_mode("CMYK"), "JPEG", quality=100), RGB),
        ("truncated JPEG", saved(of_mode("RGB"), "JPEG")[:1200], "truncated"),
        ("truncated 16-bit PNG", deep_file(".png", DEEP)[:3000], "truncated"),
        ("empty", b"", "it is empty"),
        ("HTML", b"<!DOCTYPE html><html>404</html>", "it is an HTML page"),
        ("LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("HEIC", b"\0\0\0\x18ftypheic\0\0\0\0", "it is a HEIC picture"),
        ("PSD", b"8BPS\0\1" + bytes(40), "no decoder knows"),
    ):
        if isinstance(expected, Image.Image):
            expected = np.asarray(expected.convert("RGB"))
        yield pytest.param(content, expected, id=name)


@pytest.mark.parametrize(("content", "expected"), list(rows()))
def test_all_routes_have_the_same_pixels_or_one_refusal(
    content: bytes, expected: Any, tmp_path: Path
) -> None:
    # The ending says nothing: the content decides.
    first, *others = routes(content, tmp_path / "x.png")
    for other in others:
        if isinstance(first, str):
            assert other == first
        else:
            np.testing.assert_array_equal(other, first)
    if isinstance(expected, str):
        assert isinstance(first, str), "expected a refusal"
        assert expected in first
    else:
        assert (first.shape, first.dtype) == ((*HW, 3), np.uint8)
        if expected is not None:
            assert np.abs(first.astype(int) - expected).max() <= (
                6 if content[:2] == b"\xff\xd8" else 0
            )


@pytest.mark.parametrize("mode", [*MODES, "La", "RGBa", "HSV", "I;16L"])
def test_pillow_images_are_converted_by_their_mode(mode: str) -> None:
    image = of_mode(mode)
    found = as_rgb(image)
    if mode.startswith(("I", "F")):
        expected, tolerance = stretched(DEEP[..., 0]), 0
    elif mode in ("1", "L", "LA", "La"):
        grey = of_mode("LA" if "A" in mode.upper() else mode).convert("L")
        expected, tolerance = np.stack([np.asarray(grey)] * 3, axis=-1), 0
    else:
        # Of what goes through other colour spaces, or a palette, a little is lost.
        expected, tolerance = RGB, {"YCbCr": 3, "HSV": 6}.get(mode, 0)
        if mode in ("P", "PA", "LAB"):
            tolerance = 255
    if mode in ("La", "RGBa"):
        opaque = ALPHA[..., 0] > 127
        found, expected, tolerance = found[opaque], expected[opaque], 2
    assert np.abs(found.astype(int) - expected).max() <= tolerance
    if mode in ("P", "PA"):
        assert np.abs(found.astype(int) - RGB).mean() < 30


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (RGB, RGB),
        (RGB.tolist(), "type int64"),
        (GREY, np.stack([GREY] * 3, axis=-1)),
        (GREY[..., None], np.stack([GREY] * 3, axis=-1)),
        (GREY > 100, np.stack([(GREY > 100) * 255] * 3, axis=-1)),
        (np.concatenate([RGB, ALPHA], axis=-1), RGB),
        (DEEP, stretched(DEEP)),
        (np.concatenate([DEEP, ALPHA.astype(np.uint16)], axis=-1), stretched(DEEP)),
        (DEEP.astype(">u2"), stretched(DEEP)),
        (DEEP[..., 0], stretched(DEEP[..., 0])),
        (DEEP[..., :1].astype(np.int32) - 70_000, stretched(DEEP[..., 0])),
        (DEEP[..., 0].astype(np.uint32) << 16, stretched(DEEP[..., 0])),
        (GREY / 255, stretched(GREY)),
        (RGB / 255.0, r"type float64, expected uint8.*255 \* image"),
        (RGB.astype(np.int32), r"type int32, expected uint8.*astype\('uint8'\)"),
        (GREY.astype(np.int8), "type int8, expected uint8"),
        (np.where(GREY > 99, np.nan, 0.5), "finite"),
        (RGB.astype(complex), "type complex128, expected uint8"),
        (RGB[:0], r"is empty: its shape is \(0, 90, 3\)"),
        (RGB[None], r"shape \(1, 70, 90, 3\).*one by one"),
        (RGB[..., :2], r"shape \(70, 90, 2\).*image\[..., 0\]"),
        (np.moveaxis(RGB, -1, 0), r"shape \(3, 70, 90\).*np.moveaxis"),
        (GREY[None], r"shape \(1, 70, 90\).*np.moveaxis"),
        (GREY[0], r"shape \(90,\)"),
        (np.zeros((1, 70_000), np.uint8), "too large: 70000 x 1"),
        ("a.jpg", "path.*read_image"),
        (b"\xff\xd8", "path or a file's content"),
        (None, r"shape \(\)"),
        ([[1, 2], [3]], "no array"),
    ],
)
def test_arrays_are_taken_or_refused_with_advice(array: Any, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(ImageError, match=f"^my picture .*{expected}"):
            as_rgb(array, "my picture")
        return
    found = as_rgb(array, "my picture")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no\.png does not exist"):
        read_image(tmp_path / "no.png")
    with pytest.raises(ImageError, match="cannot be read: Is a directory"):
        read_image(tmp_path)


@pytest.mark.parametrize("kind", [k for k in KINDS if k in TURNED_KINDS])
@pytest.mark.parametrize("orientation", TURNS)
def test_stored_pictures_are_turned_in_every_format(
    kind: str, orientation: int, tmp_path: Path
) -> None:
    image = Image.fromarray(RGB)
    stored = np.asarray(images.decode(saved(image, kind), "x").image)
    content = saved(image, kind, orientation)
    upright = TURNS[orientation](stored)
    header = images.read_header(content, "x")
    assert header[:2] == (HW, orientation)
    assert header.upright_hw == upright.shape[:2]
    for found in routes(content, tmp_path / "x"):
        np.testing.assert_array_equal(found, upright)
    as_stored = images.decode(content, "x", orientation="stored").image
    np.testing.assert_array_equal(np.asarray(as_stored), stored)
    expected_by_key: list[tuple[images.Orientation, np.ndarray]] = [
        ("upright", upright),
        ("stored", stored),
    ]
    for key, expected in expected_by_key:
        found = images.decode_in_own_mode(content, "x", key)
        np.testing.assert_array_equal(np.asarray(found), expected)
    # The upright copy needs no turning, and has the same pixels, or nearly.
    copy = images.upright_copy(content, "x")
    assert images.read_header(copy, "x")[:2] == (upright.shape[:2], 1)
    found = np.asarray(images.decode(copy, "x").image)
    with Image.open(io.BytesIO(copy)) as opened:
        assert opened.format == kind
    difference = np.abs(found.astype(int) - upright)
    assert difference.max() <= {"JPEG": 12, "AVIF": 4}.get(kind, 0)
    assert difference.mean() < 1.5


def png_with(chunk: bytes, data: bytes, *, at_the_end: bool = False) -> bytes:
    content = saved(Image.fromarray(RGB), "PNG")
    at = len(content) - 12 if at_the_end else 33
    checked = chunk + data
    part = struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))
    return content[:at] + part + content[at:]


def test_wherever_files_say_how_they_are_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    image = Image.fromarray(RGB)
    for content in (
        png_with(b"eXIf", exif.tobytes()[6:]),
        png_with(b"eXIf", exif.tobytes()[6:], at_the_end=True),
        png_with(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        saved(image, "TIFF", 6, compression="tiff_lzw"),
        saved(image, "TIFF", 6, compression="tiff_adobe_deflate"),
        saved(image, "MPO", 6, quality=100, subsampling=0, save_all=True, append_images=[image]),
    ):
        for found in routes(content, tmp_path / "x"):
            assert np.abs(found.astype(int) - TURNS[6](RGB)).max() <= 4
    # As Pillow hands it on, and once it is turned.
    image = Image.open(io.BytesIO(saved(image, "PNG", 6)))
    np.testing.assert_array_equal(as_rgb(image.convert("RGB")), TURNS[6](RGB))
    np.testing.assert_array_equal(as_rgb(ImageOps.exif_transpose(image)), TURNS[6](RGB))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_costs_no_picture(tmp_path: Path) -> None:
    for damaged in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        content = saved(Image.fromarray(RGB), "JPEG", exif=damaged)
        for found in routes(content, tmp_path / "x"):
            assert found.shape == (*HW, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_turn_nothing(orientation: int) -> None:
    content = saved(Image.fromarray(RGB), "PNG", orientation)
    np.testing.assert_array_equal(np.asarray(images.decode(content, "x").image), RGB)


def test_deep_pictures_are_turned_too(tmp_path: Path) -> None:
    content = saved(of_mode("I;16"), "PNG", 6)
    expected = TURNS[6](stretched(DEEP[..., 0]))
    for found in routes(content, tmp_path / "x"):
        np.testing.assert_array_equal(found, expected)
    # Pillow would write its high bits only.
    copy = images.upright_copy(content, "x")
    np.testing.assert_array_equal(np.asarray(images.decode(copy, "x").image), expected)


def test_profiles_and_modes_of_upright_copies_stay() -> None:
    for kind, mode in (("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "P"), ("PNG", "1"), ("TIFF", "LA")):
        copy = images.upright_copy(saved(of_mode(mode), kind, 6, icc_profile=b"profile"), "x")
        with Image.open(io.BytesIO(copy)) as image:
            assert (image.mode, image.info["icc_profile"]) == (mode, b"profile")


@pytest.mark.parametrize("kind", [k for k in KINDS if k in ("GIF", "WEBP", "PNG", "TIFF", "AVIF")])
def test_the_first_of_several_frames_is_taken_and_said(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Image.fromarray(RGB)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    content = saved(
        first, kind, save_all=True, append_images=[Image.new("RGB", first.size)], **lossless
    )
    assert images.read_header(content, "x").has_frames
    (tmp_path / "x").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = read_image(tmp_path / "x")
    assert "holds several frames or pages: the first is taken" in caplog.text
    assert np.abs(found.astype(int) - RGB).mean() < 20


def test_one_limit_for_large_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = saved(Image.fromarray(RGB), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own, of a process
    for found in routes(content, tmp_path / "x"):
        np.testing.assert_array_equal(found, RGB)
    monkeypatch.setattr(images, "MAX_PIXELS", 6000)
    for found in routes(content, tmp_path / "x"):
        assert "too large: 90 x 70 pixels" in found


def test_images_that_pillow_has_opened_can_be_used_afterwards(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(deep_file(".png", DEEP))
    with Image.open(tmp_path / "x") as image:
        np.testing.assert_array_equal(as_rgb(image), stretched(DEEP))
        assert np.asarray(image).max() == DEEP.max() >> 8
        assert isinstance(image, ImageFile.ImageFile)


@pytest.mark.parametrize("hw", [(64, 96), (61, 91), (72, 100)])
@pytest.mark.parametrize("orientation", TURNS)
def test_reduced_pictures_are_turned(hw: tuple[int, int], orientation: int) -> None:
    image = Image.fromarray(cv2.resize(RGB, hw[::-1], interpolation=cv2.INTER_CUBIC))
    content = saved(image, "JPEG", orientation, quality=95)
    whole = np.asarray(images.decode(content, "x").image)
    least = whole.shape[0] // 4, whole.shape[1] // 4
    reduced, reduction = images.decode(content, "x", at_least_hw=least)
    assert reduced.height >= least[0]
    assert reduced.width >= least[1]
    # Where sides do not divide, pixels that are cut short would come first.
    assert reduction == (4 if orientation == 1 or not (hw[0] % 4 or hw[1] % 4) else 1)
    h, w = whole.shape[0] // reduction, whole.shape[1] // reduction
    blocks = whole[: h * reduction, : w * reduction].reshape(h, reduction, w, reduction, 3)
    assert np.abs(np.asarray(reduced)[:h, :w] - blocks.mean(axis=(1, 3))).mean() < 3


def test_the_table_names_every_ending() -> None:
    table = (Path(__file__).parents[2] / "docs" / "pictures.md").read_text(encoding="utf-8")
    for suffix in images.PICTURE_SUFFIXES:
        assert f"{suffix} " in table.replace("`", " ")
