import logging
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_jax.data.label_maps import WHITE_BESIDE_LABELS
from sam_jax.data.samples import CorruptSampleError, Sample, decode_image, decode_masks
from sam_jax.data.sources.mask_folder import MaskFolderSource
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import box_mask, encode_image, gradient_image

HW = (12, 20)
LEFT, RIGHT, TOP = (
    box_mask(HW, 4, 12, 0, 8),
    box_mask(HW, 4, 12, 9, 20),
    box_mask(HW, 0, 3, 0, 20),
)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    return images, masks


def add(folder: Path, name: str, array: np.ndarray) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_image(array, "JPEG" if path.suffix == ".jpg" else "PNG"))


def add_image(folder: Path, name: str) -> None:
    add(folder, name, gradient_image(HW))


def all_masks(sample: Sample) -> np.ndarray:
    return decode_masks(sample, range(len(sample.masks_rle)))


def test_label_maps_of_every_kind(folders: tuple[Path, Path]) -> None:
    images, masks = folders
    labels = LEFT * 3 + RIGHT * 200 + TOP * 7
    colors = np.zeros((*HW, 3), np.uint8)
    colors[TOP], colors[LEFT], colors[RIGHT] = (0, 0, 9), (0, 9, 0), (9, 0, 0)
    add(masks, "grey.png", labels.astype(np.uint8))
    add(masks, "deep.png", (labels * 300).astype(np.uint16))
    add(masks, "color.png", colors)
    palette = Image.fromarray(labels.astype(np.uint8), "P")
    palette.putpalette(bytes(768))  # all black: only the indices tell the objects apart
    palette.save(masks / "palette.png")
    names = ["color", "deep", "grey", "palette"]
    for name in names:
        add_image(images, f"{name}.jpg")
    source = MaskFolderSource(*folders)
    assert [Path(source[i].name).stem for i in range(len(source))] == names
    for index, name in enumerate(names):
        # In order of label; TOP is blue, the least colour.
        expected = [TOP, LEFT, RIGHT] if name == "color" else [LEFT, TOP, RIGHT]
        np.testing.assert_array_equal(all_masks(source[index]), expected)
    assert decode_image(source[0]).shape == (*HW, 3)


def test_black_and_white_is_one_object(folders: tuple[Path, Path]) -> None:
    add_image(folders[0], "a.jpg")
    add(folders[1], "a.png", (LEFT * 255).astype(np.uint8))
    np.testing.assert_array_equal(all_masks(MaskFolderSource(*folders)[0]), [LEFT])


def test_one_file_a_mask(folders: tuple[Path, Path]) -> None:
    images, masks = folders
    add_image(images, "sub/a.jpg")
    add_image(images, "sub/b.jpg")
    for i, mask in enumerate([LEFT, TOP]):
        add(masks, f"sub/a/{i}.png", (mask * 255).astype(np.uint8))
        # Values above 0 do not matter here: anti-aliased outlines are part of the mask.
        add(masks, f"sub/b_{i}.png", (mask * 200 + TOP * 50).astype(np.uint8))
    source = MaskFolderSource(*folders, name="own")
    assert source[0].dataset == "own"
    np.testing.assert_array_equal(all_masks(source[0]), [LEFT, TOP])
    np.testing.assert_array_equal(all_masks(source[1]), [LEFT | TOP, TOP])


def test_the_longest_matching_name_owns_a_mask(folders: tuple[Path, Path]) -> None:
    images, masks = folders
    for name in ("cat", "cat_2", "dog_1"):
        add_image(images, f"{name}.jpg")
    for name in ("cat_0", "cat_2_0", "cat_2_1", "dog_1"):
        add(masks, f"{name}.png", (LEFT * 255).astype(np.uint8))
    source = MaskFolderSource(*folders)
    assert [len(source[i].masks_rle) for i in range(3)] == [1, 2, 1]


def test_leftovers_are_named(folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    images, masks = folders
    add_image(images, "a.jpg")
    add_image(images, "bare.jpg")
    add(masks, "a.png", (LEFT * 255).astype(np.uint8))
    add(masks, "stray.png", (LEFT * 255).astype(np.uint8))
    with caplog.at_level(logging.WARNING):
        source = MaskFolderSource(*folders)
    assert len(source) == source.left_out.counts["images without a mask file"] == 1
    assert f"left out: 1 images without a mask file, e.g. {images / 'bare.jpg'}" in caplog.text
    assert f"left out: 1 mask files without an image, e.g. {masks / 'stray.png'}" in caplog.text


def test_damage_is_told_apart(folders: tuple[Path, Path]) -> None:
    images, masks = folders
    for name in ("a", "b", "c"):
        add_image(images, f"{name}.jpg")
    add(masks, "a_0.png", (LEFT * 255).astype(np.uint8))
    (masks / "a_1.png").write_bytes(b"no image")
    add(masks, "b.png", (LEFT * 255).astype(np.uint8))
    noise = np.random.default_rng(0).integers(0, 256, (120, 120, 3), np.uint8)
    add(masks, "c.png", noise)
    source = MaskFolderSource(*folders)
    sample = source[0]
    np.testing.assert_array_equal(all_masks(sample), [LEFT])
    assert "a_1.png" in sample.unusable_masks[0]
    (images / "b.jpg").unlink()
    with pytest.raises(CorruptSampleError) as caught:
        source[1]
    assert caught.value.reason == "missing image"
    assert "c.png" in source[2].unusable_masks[0]
    assert "labels; is it a photograph?" in source[2].unusable_masks[0]


def test_wrong_folders_are_explained(folders: tuple[Path, Path], tmp_path: Path) -> None:
    images, masks = folders
    with pytest.raises(FileNotFoundError, match="no folder"):
        MaskFolderSource(images, tmp_path / "elsewhere")
    add_image(images, "a.jpg")
    add(masks, "a.jpg", (LEFT * 255).astype(np.uint8))
    with pytest.raises(ConfigError, match="none of the 0 masks"):
        MaskFolderSource(images, masks)
    add(masks, "b.png", (LEFT * 255).astype(np.uint8))
    with pytest.raises(ConfigError, match=r"none of the 1 masks .* 1 images"):
        MaskFolderSource(images, masks)
    add_image(images, "a.png")
    with pytest.raises(ConfigError, match="share their masks"):
        MaskFolderSource(images, masks)


def test_hidden_files_are_no_masks_and_no_images(folders: tuple[Path, Path]) -> None:
    images, masks = folders
    for name in ("a.jpg", "._a.jpg", ".ipynb_checkpoints/a.jpg"):
        add_image(images, name)
    for name in ("a.png", "._a.png", "a/._0.png", "__MACOSX/a.png"):
        add(masks, name, (LEFT * 255).astype(np.uint8))
    source = MaskFolderSource(*folders)
    assert len(source) == 1
    np.testing.assert_array_equal(all_masks(source[0]), [LEFT])
    assert source.left_out.counts == {"hidden files": 5}


def test_composed_and_decomposed_names_belong_together(folders: tuple[Path, Path]) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Käfig") for form in ("NFC", "NFD"))
    add_image(folders[0], f"{composed}.jpg")
    add(folders[1], f"{decomposed}_1.png", (LEFT * 255).astype(np.uint8))
    assert len(MaskFolderSource(*folders)) == 1


def test_a_black_mask_is_a_picture_without_an_object(folders: tuple[Path, Path]) -> None:
    add_image(folders[0], "a.jpg")
    add(folders[1], "a.png", np.zeros(HW, np.uint8))
    sample = MaskFolderSource(*folders)[0]
    assert (sample.masks_rle, sample.unusable_masks) == ((), ())


def test_what_was_decided_about_a_file_is_remarked(folders: tuple[Path, Path]) -> None:
    images, masks = folders
    add_image(images, "a.jpg")
    add(masks, "a.png", (LEFT * 1 + RIGHT * 2 + TOP * 255).astype(np.uint8))
    sample = MaskFolderSource(*folders)[0]
    assert sample.remarks == ((WHITE_BESIDE_LABELS, str(masks / "a.png")),)
    sample = MaskFolderSource(*folders, ignore_labels=(255,))[0]
    assert sample.remarks == ()
    np.testing.assert_array_equal(all_masks(sample), [LEFT, RIGHT])
    sample = MaskFolderSource(*folders, background=2, ignore_labels=(255, 0))[0]
    np.testing.assert_array_equal(all_masks(sample), [LEFT])


def test_names_that_differ_in_case_belong_together_if_no_other_does(
    folders: tuple[Path, Path],
) -> None:
    images, masks = folders
    for name in ("Cat.jpg", "CAT_2.jpg"):
        add_image(images, name)
    for name in ("cat.png", "cat_2_1.png", "CAT_2_2.png"):
        add(masks, name, (LEFT * 255).astype(np.uint8))
    source = MaskFolderSource(*folders)
    assert [Path(source[i].name).name for i in range(2)] == ["CAT_2.jpg", "Cat.jpg"]
    assert [len(source[i].masks_rle) for i in range(2)] == [2, 1]
    add_image(images, "cAt.jpg")
    with pytest.raises(ConfigError, match=r"cat\.png may belong to .*C?at\.jpg or "):
        MaskFolderSource(*folders)


def test_masks_are_counted_without_the_picture(folders: tuple[Path, Path]) -> None:
    images, masks = folders
    for name in ("sub/a", "b", "c"):
        add_image(images, f"{name}.jpg")
    add(masks, "sub/a.png", (LEFT * 3 + RIGHT * 9).astype(np.uint8))
    add(masks, "sub/a_1.png", (TOP * 255).astype(np.uint8))
    add(masks, "b_1.png", (TOP * 255).astype(np.uint8))
    (masks / "b_2.png").write_bytes(b"never read for it")
    (masks / "c.png").write_bytes(b"no image")
    source = MaskFolderSource(*folders)
    for path in images.rglob("*.jpg"):
        path.unlink()
    assert [source.file_name(i) for i in range(3)] == ["b", "c", "sub/a"]
    assert (source.num_masks(0), source.num_masks(2)) == (2, 3)
    with pytest.raises(CorruptSampleError, match="no valid mask"):
        source.num_masks(1)


def test_two_label_maps_of_an_image_are_refused(folders: tuple[Path, Path]) -> None:
    images, masks = folders
    add_image(images, "a.jpg")
    add(masks, "a_1.png", (LEFT * 255).astype(np.uint8))
    add(masks, "a.png", LEFT.astype(np.uint8))
    assert len(MaskFolderSource(*folders)[0].masks_rle) == 2
    np.save(masks / "a.npy", LEFT)
    with pytest.raises(ConfigError, match=r"a\.npy and .*a\.png would both be label maps of .*a\."):
        MaskFolderSource(*folders)
