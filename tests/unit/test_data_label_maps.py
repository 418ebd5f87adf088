"""One mask, stored in every form: the same labels, or a refusal that says why."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from sam_jax.data.label_maps import (
    ALPHA,
    NO_BACKGROUND,
    SOFT_EDGE,
    VOID,
    WHITE_BESIDE_LABELS,
    LabelMapError,
    read_label_map,
)
from tests.unit.test_images import deep_file, saved

HW = (96, 128)
DISKS = ((30, 30, 20), (90, 40, 25), (50, 75, 15))
RED, WHITE, BLACK, VOC_VOID = (255, 0, 0), (255, 255, 255), (0, 0, 0), (224, 224, 192)


def drawn(values: tuple[int, ...] = (255,), scale: int = 1) -> Image.Image:
    image = Image.new("L", (HW[1] * scale, HW[0] * scale))
    for (x, y, r), value in zip(DISKS, values, strict=False):
        box = [(side * scale) for side in (x - r, y - r, x + r, y + r)]
        ImageDraw.Draw(image).ellipse(box, fill=value)
    return image


DISK = np.asarray(drawn()) > 0
TWO = np.asarray(drawn((1, 2)))
OUTLINE = ndimage.binary_dilation(DISK, iterations=2) & ~ndimage.binary_erosion(DISK, iterations=2)
NOISE = np.random.default_rng(0).integers(0, 256, (*HW, 3), np.uint8)


def paletted(indices: np.ndarray, *colors: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([part for color in colors for part in color])
    return image


def voc() -> Image.Image:
    """An object of class 15 with its outline of 255, as in VOC's SegmentationClass."""
    colors = [BLACK] * 256
    colors[15], colors[255] = (192, 128, 128), VOC_VOID
    return paletted(np.where(OUTLINE, 255, DISK * 15), *colors)


def alpha(color: Any, mask: np.ndarray = DISK) -> Image.Image:
    pixels = np.zeros((*HW, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = color, mask * 255
    return Image.fromarray(pixels)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def read(folder: Path, image: Image.Image | np.ndarray, suffix: str = ".tif", **keys: Any) -> Any:
    path = folder / f"mask{suffix}"
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
    return read_label_map(path, **keys)


def objects(labels: np.ndarray) -> list[np.ndarray]:
    return [labels == label for label in np.unique(labels) if label]


@pytest.mark.parametrize(
    ("image", "suffix", "remarks"),
    [
        (DISK, ".png", ()),
        (drawn(), ".bmp", ()),
        (DISK * np.uint8(1), ".png", ()),
        (DISK * np.uint16(40_000), ".png", ()),
        (DISK * np.int32(2**31 - 1), ".tif", ()),
        (DISK * np.float32(1), ".tif", ()),
        (drawn().convert("RGB"), ".png", ()),
        (np.where(DISK[..., None], RED, BLACK).astype(np.uint8), ".png", ()),
        (drawn().convert("RGBA"), ".png", ()),
        (paletted(DISK, BLACK, WHITE), ".png", ()),
        (paletted(~DISK, WHITE, BLACK), ".png", ()),
        (paletted(DISK, BLACK, BLACK), ".png", ()),
        (voc(), ".png", (VOID,)),
        (voc().convert("RGB"), ".png", (VOID,)),
        (alpha(WHITE), ".png", (ALPHA,)),
        (alpha(BLACK), ".png", (ALPHA,)),
        (alpha(NOISE), ".png", (ALPHA,)),
        (alpha(WHITE).convert("LA"), ".png", (ALPHA,)),
        (alpha(np.where(DISK[..., None], WHITE, BLACK), np.zeros(HW)), ".png", ()),
        (drawn(scale=4).resize(HW[::-1], Image.Resampling.BOX), ".png", (SOFT_EDGE,)),
        (drawn(scale=3).resize(HW[::-1], Image.Resampling.LANCZOS), ".png", (SOFT_EDGE,)),
        (drawn(scale=4).resize(HW[::-1], Image.Resampling.BILINEAR), ".tif", (SOFT_EDGE,)),
        (drawn().filter(ImageFilter.GaussianBlur(2)), ".png", (SOFT_EDGE,)),
        (drawn().filter(ImageFilter.GaussianBlur(1)).convert("RGB"), ".png", (SOFT_EDGE,)),
        (as_jpeg(drawn(), 30), ".png", (SOFT_EDGE,)),
        (as_jpeg(drawn(), 95), ".png", (SOFT_EDGE,)),
    ],
)
def test_a_mask_is_one_object_in_every_form(
    tmp_path: Path, image: Any, suffix: str, remarks: tuple[str, ...]
) -> None:
    labels, found = read(tmp_path, image, suffix)
    assert found == remarks
    (mask,) = objects(labels)
    # A smoothed outline is known to half a pixel; VOC's outline of 5 pixels is left out.
    reach = {SOFT_EDGE: 1, VOID: 2}.get("".join(remarks), 0)
    at_least = ndimage.binary_erosion(DISK, iterations=reach) if reach else DISK
    at_most = ndimage.binary_dilation(DISK, iterations=1) if remarks == (SOFT_EDGE,) else DISK
    assert (mask >= at_least).all()
    assert (mask <= at_most).all()


def test_gaps_of_a_soft_mask_stay_gaps(tmp_path: Path) -> None:
    mask = np.full((600, 800), 255, np.uint8)
    mask[300:], mask[::100], mask[:, ::150] = 0, 0, 0
    soft = Image.fromarray(mask).resize((601, 451), Image.Resampling.BICUBIC)
    labels, remarks = read(tmp_path, soft)
    assert (len(objects(labels)), remarks) == (1, (SOFT_EDGE,))
    assert 0.2 < (labels > 0).mean() < 0.5


@pytest.mark.parametrize("trunk", [1, 5])
def test_thin_objects_beside_a_large_one_are_objects_whatever_their_labels_are(
    tmp_path: Path, trunk: int
) -> None:
    """Limbs of a tree, of which some stand between the labels of the trunk and of background."""
    drawn = np.zeros((120, 120), np.uint8)
    drawn[20:110, 50:70] = trunk
    limbs = [label for label in range(1, 6) if label != trunk]
    for top, label in zip((25, 45, 65, 85), limbs, strict=True):
        drawn[top : top + 2, 36:50] = label
    labels, remarks = read(tmp_path, drawn)
    np.testing.assert_array_equal(labels, drawn)
    assert remarks == ()


CELLS = (np.arange(HW[0])[:, None] // 8 * 16 + np.arange(HW[1]) // 8 + 1) * (
    (np.arange(HW[0])[:, None] % 8 > 1) & (np.arange(HW[1]) % 8 > 1)
)
SPECKS = CELLS * ((np.arange(HW[0])[:, None] % 8 < 4) & (np.arange(HW[1]) % 8 < 4))


@pytest.mark.parametrize("cells", [CELLS, SPECKS, CELLS * 300], ids=["cells", "specks", "deep"])
@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32, "RGB"])
def test_every_label_is_an_object(tmp_path: Path, cells: np.ndarray, kind: Any) -> None:
    if kind == "RGB":
        image = np.stack([cells % 256, cells // 256, cells * 0], axis=-1).astype(np.uint8)
    else:
        image = cells.astype(kind)
    labels, remarks = read(tmp_path, image)
    assert remarks == ()
    found = objects(labels)
    expected = {(cells == label).tobytes() for label in np.unique(cells) if label}
    assert {mask.tobytes() for mask in found} == expected
    assert len(found) == 192


@pytest.mark.parametrize(
    ("image", "suffix", "message"),
    [
        (TWO / np.float32(2), ".tif", "holds 0.5; round them"),
        (np.where(DISK, np.nan, 0).astype(np.float32), ".tif", "not finite"),
        (DISK * np.float32(2**25), ".tif", "not exact as floats"),
        (DISK * np.int32(-1), ".tif", "label -1 is negative.*ignore_labels"),
        (drawn().convert("CMYK"), ".tif", "mode is CMYK"),
        (paletted(~DISK, RED, WHITE), ".png", r"index 0 .* but \(255, 0, 0\).*background="),
        (paletted(TWO, WHITE, BLACK, BLACK), ".png", "background="),
        (alpha(np.where(TWO[..., None] > 1, RED, WHITE), TWO / 2), ".png", "without transparency"),
        (alpha(np.where(TWO[..., None] > 1, RED, BLACK), TWO > 0), ".png", "without transparency"),
        (NOISE, ".png", "12,2.. labels; is it a photograph"),
        (NOISE[..., 0], ".png", "photograph|JPEG"),
        (np.tile(np.arange(128, dtype=np.uint8) // 4, (96, 1)), ".png", "change by 1"),
        (
            drawn((80, 160, 255), 4).resize(HW[::-1], Image.Resampling.BILINEAR),
            ".png",
            "labels lie between others",
        ),
        (as_jpeg(drawn((80, 160, 240)), 75), ".png", "saved as JPEG"),
        (
            as_jpeg(Image.merge("RGB", [drawn(), drawn((0, 200)), drawn((0,))]), 75),
            ".png",
            "JPEG|photo",
        ),
    ],
)
def test_what_does_not_tell_objects_apart_is_refused(
    tmp_path: Path, image: Any, suffix: str, message: str
) -> None:
    with pytest.raises(LabelMapError, match=message):
        read(tmp_path, image, suffix)


def test_further_pages_are_refused(tmp_path: Path) -> None:
    page = drawn()
    for suffix in (".tif", ".png"):
        page.save(tmp_path / f"a{suffix}", save_all=True, append_images=[page.rotate(90), page])
        with pytest.raises(LabelMapError, match="it has several pages"):
            read_label_map(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("written_as", [".png", ".tif", ".jp2"])
def test_channels_of_16_bits_are_refused(tmp_path: Path, written_as: str, channels: int) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(deep_file(written_as, np.stack([TWO * np.uint16(300)] * channels, axis=-1)))
    with pytest.raises(LabelMapError, match="16 bits in each channel"):
        read_label_map(path)


def test_grey_of_16_bits_is_turned_in_full(tmp_path: Path) -> None:
    labels = np.asarray(drawn((1, 2))).astype(np.uint16) * 300
    (tmp_path / "a.tif").write_bytes(saved(Image.fromarray(labels), "TIFF", 6))
    for orientation, expected in (("upright", np.rot90(TWO, -1)), ("stored", TWO)):
        found = read_label_map(tmp_path / "a.tif", orientation=orientation).labels
        np.testing.assert_array_equal(found, expected)


def test_labels_without_background_are_remarked(tmp_path: Path) -> None:
    trimap = np.where(OUTLINE, 3, np.where(DISK, 1, 2)).astype(np.uint8)
    labels, remarks = read(tmp_path, trimap)
    assert (len(objects(labels)), remarks) == (3, (NO_BACKGROUND,))
    labels, remarks = read(tmp_path, trimap, background=2, ignore_labels=(3,))
    np.testing.assert_array_equal(objects(labels), [DISK & ~OUTLINE])
    assert remarks == ()


def test_white_beside_other_labels_is_remarked(tmp_path: Path) -> None:
    image = np.where(OUTLINE, 255, DISK * 15).astype(np.uint8)
    labels, remarks = read(tmp_path, image)
    assert (len(objects(labels)), remarks) == (2, (WHITE_BESIDE_LABELS,))
    labels, remarks = read(tmp_path, image, ignore_labels=(255,))
    np.testing.assert_array_equal(objects(labels), [DISK & ~OUTLINE])


@pytest.mark.parametrize(
    ("image", "background"),
    [
        (np.where(DISK, 0, 255).astype(np.uint8), 255),
        (Image.eval(drawn(), lambda v: 255 - v).filter(ImageFilter.GaussianBlur(1)), 255),
        (paletted(~DISK, RED, WHITE), 1),
        (np.where(DISK[..., None], RED, WHITE).astype(np.uint8), 0xFFFFFF),
        (DISK * np.int32(5) - 1, -1),
    ],
)
def test_the_background_may_be_another_label(tmp_path: Path, image: Any, background: int) -> None:
    suffix = ".tif" if isinstance(image, np.ndarray) else ".png"
    labels, _ = read(tmp_path, image, suffix, background=background)
    (mask,) = objects(labels)
    assert np.count_nonzero(mask != DISK) <= 8
