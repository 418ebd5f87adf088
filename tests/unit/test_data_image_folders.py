import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sam_jax.data.samples import CorruptSampleError, decode_image, decode_masks
from sam_jax.data.sources.coco import CocoSource
from sam_jax.data.sources.image_folders import NO_PICTURE, ImageFoldersSource
from sam_jax.data.sources.label_map_files import NO_MASK_FILE
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import box_mask, encode_image, gradient_image

HW = (12, 20)
LEFT = box_mask(HW, 1, 11, 1, 6)
RIGHT = box_mask(HW, 1, 11, 12, 19)
OVER_BOTH = box_mask(HW, 3, 5, 2, 18)


def write(root: Path, name: str, *masks: np.ndarray) -> Path:
    folder = root / name
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    (folder / "images" / f"{name}.png").write_bytes(encode_image(gradient_image(HW)))
    for number, mask in enumerate(masks):
        Image.fromarray((mask * 255).astype(np.uint8)).save(folder / "masks" / f"{number}.png")
    return folder


def test_each_folder_is_a_sample(tmp_path: Path) -> None:
    write(tmp_path, "b", LEFT, RIGHT, OVER_BOTH)
    write(tmp_path, "a", LEFT)
    (tmp_path / "a" / "masks" / ".DS_Store.png").write_bytes(b"")
    (tmp_path / ".cache" / "images").mkdir(parents=True)
    (tmp_path / "stage1_train_labels.csv").write_text("")
    source = ImageFoldersSource(tmp_path)
    assert [source.file_name(i) for i in range(len(source))] == ["a", "b"]
    assert [source.num_masks(i) for i in range(2)] == [1, 3]
    np.testing.assert_array_equal(decode_masks(source[1], range(3)), [LEFT, RIGHT, OVER_BOTH])
    np.testing.assert_array_equal(decode_image(source[0]), gradient_image(HW))
    assert source.left_out.counts == {"hidden files": 1}


def test_leftovers_and_damage_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path, "a", LEFT, RIGHT)
    write(tmp_path, "b")
    (write(tmp_path, "c", LEFT) / "images" / "c.png").unlink()
    (tmp_path / "d").mkdir()
    (tmp_path / "a" / "masks" / "1.png").write_bytes(b"no image")
    source = ImageFoldersSource(tmp_path)
    assert source.left_out.counts == {NO_MASK_FILE: 1, NO_PICTURE: 2}
    sample = source[0]
    np.testing.assert_array_equal(decode_masks(sample, [0]), [LEFT])
    assert "1.png" in sample.unusable_masks[0]
    (tmp_path / "a" / "images" / "a.png").unlink()
    with pytest.raises(CorruptSampleError, match="missing image"):
        source[0]


def test_a_mask_of_another_size_is_refused_when_it_is_decoded(tmp_path: Path) -> None:
    write(tmp_path, "a", LEFT.T)
    with pytest.raises(CorruptSampleError, match="size mismatch"):
        decode_masks(ImageFoldersSource(tmp_path)[0], [0])


def test_wrong_folders_are_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        ImageFoldersSource(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="none of the 0 folders"):
        ImageFoldersSource(tmp_path)
    folder = write(tmp_path, "a", LEFT)
    (folder / "images" / "z.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"has 2 pictures, a\.png and z\.png among them"):
        ImageFoldersSource(tmp_path)


def read_coco_masks(path: Path) -> dict[str, list[np.ndarray]]:
    """Masks by the name of the picture, as the COCO reader has them."""
    source = CocoSource(path)
    return {
        Path(source[i].name).stem: list(decode_masks(source[i], range(source.num_masks(i))))
        for i in range(6)
    }


def test_nuclei_read_from_folders_are_those_of_the_coco_file(
    shared_data: Path, tmp_path: Path
) -> None:
    """Real images of BBBC038v1, laid out as that is, and read by both readers."""
    path = shared_data / "permissive" / "dsb2018" / "val.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    content: dict[str, Any] = json.loads(path.read_text())
    files = {image["file_name"].split("/")[-1] for image in content["images"]}
    expected = read_coco_masks(path)
    for stem, masks in expected.items():
        (name,) = (file for file in files if Path(file).stem == stem)
        for part in ("images", "masks"):
            (tmp_path / stem / part).mkdir(parents=True)
        picture = (path.parent / "images" / name).read_bytes()
        (tmp_path / stem / "images" / name).write_bytes(picture)
        for number, mask in enumerate(masks):
            file = tmp_path / stem / "masks" / f"{number:04}.png"
            Image.fromarray((mask * 255).astype(np.uint8)).save(file)
    source = ImageFoldersSource(tmp_path)
    assert len(source) == len(expected) == 6
    for index in range(len(source)):
        sample, masks = source[index], expected[source.file_name(index)]
        assert source.num_masks(index) == len(masks)
        np.testing.assert_array_equal(decode_masks(sample, range(len(masks))), masks)
        assert sample.unusable_masks == ()
