from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage

from sam_jax.data.label_encodings import GROUP, NOT_EVALUATED, components, numbered
from sam_jax.data.samples import CorruptSampleError, Sample, decode_masks
from sam_jax.data.sources.label_map_files import NO_MASK_FILE, NOT_INCLUDED, LabelMapsSource
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import box_mask, encode_image, gradient_image

HW = (12, 20)
LEFT = box_mask(HW, 1, 11, 1, 6)
RIGHT = box_mask(HW, 1, 11, 12, 19)
TOP = box_mask(HW, 0, 1, 0, 20)


def add_image(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(encode_image(gradient_image(HW)))


def add(folder: Path, name: str, pixels: np.ndarray) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path)
    return path


def all_masks(sample: Sample) -> np.ndarray:
    return decode_masks(sample, range(len(sample.masks_rle)))


def test_suffixes_pair_files_of_one_folder(tmp_path: Path) -> None:
    """As in the Plant Phenotyping Datasets, with more files beside them."""
    for name in ("Ara/plant1", "Ara/plant10", "Tobacco/plant1"):
        add_image(tmp_path, f"{name}_rgb.png")
        add(tmp_path, f"{name}_label.png", (LEFT * 1 + RIGHT * 2).astype(np.uint8))
        add(tmp_path, f"{name}_fg.png", LEFT.astype(np.uint8))
    source = LabelMapsSource(tmp_path, image_suffix="_rgb.png", mask_suffixes=["_label.png"])
    names = [source.file_name(i) for i in range(len(source))]
    assert names == ["Ara/plant10_rgb.png", "Ara/plant1_rgb.png", "Tobacco/plant1_rgb.png"]
    assert [source.num_masks(i) for i in range(3)] == [2, 2, 2]
    np.testing.assert_array_equal(all_masks(source[1]), [LEFT, RIGHT])
    assert not source.left_out


def ade(objects: np.ndarray, classes: int = 1_234) -> np.ndarray:
    """The colours of ADE20K's files."""
    is_object = objects > 0
    red, green = is_object * (classes // 256 * 10), is_object * (classes % 256)
    return np.stack([red, green, objects], axis=-1).astype(np.uint8)


def test_ade20k_has_objects_in_blue_and_parts_in_files_of_their_own(tmp_path: Path) -> None:
    add_image(tmp_path, "a/ADE_val_1.jpg")
    add(tmp_path, "a/ADE_val_1_seg.png", ade(LEFT * 3 + RIGHT * 200))
    add(tmp_path, "a/ADE_val_1_parts_1.png", ade(TOP * 7))
    add(tmp_path, "a/ADE_val_1_parts_2.png", ade(LEFT * 1))
    source = LabelMapsSource(
        tmp_path,
        image_suffix=".jpg",
        mask_suffixes=("_seg.png", "_parts_*.png"),
        encoding="ade20k",
    )
    assert source.num_masks(0) == 4
    np.testing.assert_array_equal(all_masks(source[0]), [LEFT, RIGHT, TOP, LEFT])
    # The blue channel tells two objects of one class apart, and one object has one class.
    add(tmp_path, "a/ADE_val_1_parts_2.png", gradient_image(HW))
    sample = source[0]
    assert "its red is no multiple of 10" in sample.unusable_masks[0]
    assert len(sample.masks_rle) == 3
    add(tmp_path, "a/ADE_val_1_seg.png", LEFT.astype(np.uint8))
    assert "its mode is L; expected ADE20K's" in source[0].unusable_masks[0]


def test_cityscapes_groups_and_void_are_no_objects(tmp_path: Path) -> None:
    # Two cars, a group of people, road, sky, the car with the camera, and a trailer.
    values = np.full(HW, 7, np.uint16)
    values[0], values[1, :5], values[1, 5:9], values[1, 9:12] = 23, 26_000, 26_001, 24
    values[-1], values[5, 3:6], values[6, 3:6] = 1, 30, 30_000
    add_image(tmp_path / "leftImg8bit" / "val", "ulm/ulm_0_leftImg8bit.png")
    add(tmp_path / "gtFine" / "val", "ulm/ulm_0_gtFine_instanceIds.png", values)
    add(tmp_path / "gtFine" / "val", "ulm/ulm_0_gtFine_labelIds.png", values.astype(np.uint8))
    source = LabelMapsSource(
        tmp_path / "leftImg8bit" / "val",
        tmp_path / "gtFine" / "val",
        image_suffix="_leftImg8bit.png",
        mask_suffixes=("_gtFine_instanceIds.png",),
        encoding="cityscapes",
    )
    sample = source[0]
    expected = [values == value for value in (7, 23, 26_000, 26_001)]
    np.testing.assert_array_equal(all_masks(sample), expected)
    assert [reason for reason, _ in sample.remarks] == [NOT_EVALUATED, GROUP]
    assert source.num_masks(0) == 4
    label_ids = LabelMapsSource(
        tmp_path / "leftImg8bit" / "val",
        tmp_path / "gtFine" / "val",
        image_suffix="_leftImg8bit.png",
        mask_suffixes=("_gtFine_labelIds.png",),
        encoding="cityscapes",
    )
    assert "its mode is L; expected Cityscapes' 16-bit grey" in label_ids[0].unusable_masks[0]
    with pytest.raises(CorruptSampleError, match="no valid mask"):
        label_ids.num_masks(0)


@pytest.mark.parametrize("kind", [np.int16, np.uint8, np.int64, np.uint64, np.float32, bool])
def test_arrays_are_label_maps(tmp_path: Path, kind: Any) -> None:
    labels = LEFT.astype(kind) if kind is bool else (LEFT * 1 + RIGHT * 2).astype(kind)
    add_image(tmp_path, "a.jpg")
    add(tmp_path, "a.npy", labels)
    source = LabelMapsSource(tmp_path, image_suffix=".jpg", mask_suffixes=(".npy",))
    expected = [LEFT] if kind is bool else [LEFT, RIGHT]
    np.testing.assert_array_equal(all_masks(source[0]), expected)


def test_unlabelled_pixels_may_be_negative(tmp_path: Path) -> None:
    """As Hypersim has them."""
    add_image(tmp_path, "a.jpg")
    add(tmp_path, "a.npy", np.where(LEFT, 70_000, np.where(RIGHT, 0, -1)))
    source = LabelMapsSource(tmp_path, image_suffix=".jpg", mask_suffixes=(".npy",), background=-1)
    np.testing.assert_array_equal(all_masks(source[0]), [RIGHT, LEFT])


def test_damaged_arrays_are_refused_and_run_nothing(tmp_path: Path) -> None:
    add_image(tmp_path, "a.jpg")
    path = add(tmp_path, "a.npy", LEFT.astype(np.int32))
    source = LabelMapsSource(tmp_path, image_suffix=".jpg", mask_suffixes=(".npy",))
    whole = path.read_bytes()
    np.save(path, np.array([LEFT, None], object), allow_pickle=True)
    pickled = path.read_bytes()
    # A header that promises terabytes.
    boundless = whole.replace(b"(12, 20)", b"(999999, 9999999)")[: len(whole)]
    for damaged in (b"", b"\x93NUMPY", whole[:40], whole[:-1], pickled, boundless):
        path.write_bytes(damaged)
        sample = source[0]
        assert not sample.masks_rle
        assert "no array that can be read" in sample.unusable_masks[0]
    for wrong in (np.zeros((3, 4, 5)), np.zeros(HW, complex), np.zeros((0, 4)), np.float32(3)):
        np.save(path, wrong)
        assert "expected a number for each pixel" in source[0].unusable_masks[0]
    np.save(path, np.full(HW, 2**64 - 1, np.uint64))
    assert "which is no label" in source[0].unusable_masks[0]


def test_pieces_may_be_objects_of_their_own(tmp_path: Path) -> None:
    add_image(tmp_path / "images", "a.jpg")
    add(tmp_path / "masks", "a.png", ((LEFT | RIGHT) * 255).astype(np.uint8))
    together = LabelMapsSource(tmp_path / "images", tmp_path / "masks")
    np.testing.assert_array_equal(all_masks(together[0]), [LEFT | RIGHT])
    apart = LabelMapsSource(tmp_path / "images", tmp_path / "masks", components=True)
    np.testing.assert_array_equal(all_masks(apart[0]), [LEFT, RIGHT])
    assert (together.num_masks(0), apart.num_masks(0)) == (1, 2)


def test_leftovers_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, masks = tmp_path / "image", tmp_path / "label"
    for name in ("ego4d_1", "thu_1", "epic_1", "ego4d_2"):
        add_image(images, f"{name}.jpg")
    for name in ("ego4d_1", "thu_1", "epic_1"):
        add(masks, f"{name}.png", LEFT.astype(np.uint8))
    source = LabelMapsSource(images, masks, include=("ego4d_*", "thu_*"))
    assert [source.file_name(i) for i in range(len(source))] == ["ego4d_1.jpg", "thu_1.jpg"]
    assert source.left_out.counts == {NO_MASK_FILE: 1, NOT_INCLUDED: 1}
    assert str(images / "epic_1.jpg") in caplog.text


def test_damage_is_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        add_image(tmp_path, f"{name}.jpg")
        add(tmp_path, f"{name}_1.png", LEFT.astype(np.uint8))
        (tmp_path / f"{name}_2.png").write_bytes(b"no image")
    source = LabelMapsSource(tmp_path, image_suffix=".jpg", mask_suffixes=("_*.png",))
    assert "a_2.png" in source[0].unusable_masks[0]
    np.testing.assert_array_equal(all_masks(source[0]), [LEFT])
    assert source.num_masks(0) == 1
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(CorruptSampleError, match="missing image"):
        source[1]


def test_wrong_options_are_explained(tmp_path: Path) -> None:
    add_image(tmp_path, "a.jpg")
    with pytest.raises(ConfigError, match=r"x\.jpg, one of x_seg\.png would be\. Left out: 1 ima"):
        LabelMapsSource(tmp_path, image_suffix=".jpg", mask_suffixes=("_seg.png",))
    with pytest.raises(FileNotFoundError, match="no folder"):
        LabelMapsSource(tmp_path, tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="says itself what is background"):
        LabelMapsSource(tmp_path, encoding="ade20k", background=0)


SMALL_MAPS = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 3)
)


@hypothesis.given(labels=SMALL_MAPS)
def test_pieces_are_scipys(labels: np.ndarray) -> None:
    expected, total = [], 0
    for label in (1, 2, 3):
        pieces, count = ndimage.label(labels == label, structure=np.ones((3, 3)))
        expected += [pieces == piece for piece in range(1, count + 1)]
        total += count
    found = components(labels)
    assert found.max() == total
    assert {(found == n).tobytes() for n in range(1, total + 1)} == {
        mask.tobytes() for mask in expected
    }


@hypothesis.given(labels=SMALL_MAPS)
def test_numbers_have_no_gaps_and_keep_the_order(labels: np.ndarray) -> None:
    found = numbered(labels)
    assert (found == 0).tolist() == (labels == 0).tolist()
    there = np.unique(labels[labels > 0]).tolist()
    for number, label in enumerate(there, start=1):
        np.testing.assert_array_equal(found == number, labels == label)
    assert found.max() == len(there)
