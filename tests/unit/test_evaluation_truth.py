"""The truth of instances: COCO's and LVIS's files with their categories, crowds and lists."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam_jax.data.samples import CorruptSampleError
from sam_jax.data.sources.labelled_file import read_labelled
from sam_jax.errors import ConfigError
from sam_jax.evaluation.detection.truth import InstanceTruth

# pycocotools decodes in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SQUARE = [[2.0, 1.0, 8.0, 1.0, 8.0, 5.0, 2.0, 5.0]]


def content() -> dict[str, Any]:
    """Two images of 10 x 12 pixels; the second id comes first."""
    return {
        "images": [
            {"id": 9, "file_name": "b.png", "height": 10, "width": 12},
            {"id": 4, "file_name": "a.png", "height": 10, "width": 12},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 7, "segmentation": SQUARE, "area": 20.5},
            {
                "id": 2,
                "image_id": 9,
                "category_id": 3,
                "segmentation": {"size": [10, 12], "counts": [0, 15, 105]},
                "bbox": [0, 0, 2, 10],
                "iscrowd": 1,
            },
            {"id": 3, "image_id": 9, "category_id": 7, "segmentation": []},
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog", "frequency": "r"}],
    }


def written(folder: Path, changed: dict[str, Any]) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (12, 10)).save(folder / "images" / name)
    path = folder / "val.json"
    path.write_text(json.dumps(changed))
    return path


def test_images_and_masks(tmp_path: Path) -> None:
    truth = InstanceTruth(written(tmp_path, content()))
    assert [image.image_id for image in truth.images] == [4, 9]
    assert [(c.category_id, c.name, c.frequency) for c in truth.categories] == [
        (3, "dog", "r"),
        (7, "cat", None),
    ]
    assert not truth.is_federated
    assert truth.left_out.counts == {"annotations without a segmentation": 1}
    assert list(truth.read(0).masks) == []
    image = truth.read(1)
    assert image.pixels.shape == (10, 12, 3)
    crowd, square = image.masks
    assert (crowd.category_id, crowd.is_crowd, crowd.number) == (3, True, 1)
    # What the file does not say is the mask's.
    assert (crowd.area, crowd.box_xywh) == (15.0, (0.0, 0.0, 2.0, 10.0))
    assert (square.area, square.is_crowd) == (20.5, False)
    assert square.box_xywh == (2.0, 1.0, 6.0, 4.0)
    assert coco_mask.decode(square.mask_rle).sum() == 24


def test_lvis_lists_and_names(tmp_path: Path) -> None:
    lvis = content()
    first, second = lvis["images"]
    first |= {"neg_category_ids": [3], "not_exhaustive_category_ids": [7]}
    second |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    # LVIS v1 names pictures by their place on the web only.
    second["coco_url"] = "http://images.example/val2017/a.png"
    del second["file_name"]
    truth = InstanceTruth(written(tmp_path, lvis))
    assert truth.is_federated
    assert truth.images[0].file_name == "val2017/a.png"
    image = truth.read(1)
    assert (image.negative, image.not_exhaustive) == ({3}, {7})
    assert Path(truth.read(0).name).name == "a.png"


def test_a_draw_of_images(tmp_path: Path) -> None:
    many = content()
    many["images"] = [
        {"id": number, "file_name": f"{number}.png", "height": 10, "width": 12}
        for number in range(30)
    ]
    many["annotations"] = []
    path = written(tmp_path, many)
    draws = [
        tuple(image.image_id for image in InstanceTruth(path, max_images=5, seed=seed).images)
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(draw) == 5 and list(draw) == sorted(draw) for draw in draws)
    assert len(InstanceTruth(path, max_images=31)) == 30


@pytest.mark.parametrize("side", ["upright", "stored"])
def test_pictures_that_are_stored_turned(tmp_path: Path, side: str) -> None:
    """The sizes in the file tell which way up a picture was annotated."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = content()
    path = written(tmp_path, turned)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    if side == "stored":
        pixels = pixels.transpose(1, 0, 2)
    Image.fromarray(pixels).save(tmp_path / "images" / "b.png", exif=exif)
    image = InstanceTruth(path).read(1)
    expected = np.rot90(pixels, -1) if side == "upright" else pixels
    np.testing.assert_array_equal(image.pixels, expected)


def test_pictures_that_cannot_be_used(tmp_path: Path) -> None:
    path = written(tmp_path, content())
    truth = InstanceTruth(path)
    Image.new("RGB", (13, 10)).save(tmp_path / "images" / "b.png")
    with pytest.raises(CorruptSampleError, match=r"size mismatch.*\[10, 13\].*\[10, 12\]"):
        truth.read(1)
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(CorruptSampleError, match="missing image"):
        InstanceTruth(path).read(1)
    wrong = content()
    wrong["annotations"][1]["segmentation"] = {"size": [10, 12], "counts": [0, 15]}
    wrong["annotations"][0]["segmentation"] = {"size": [12, 10], "counts": [0, 15, 105]}
    image = InstanceTruth(written(tmp_path, wrong)).read(1)
    assert not image.masks
    first, second = image.unusable
    assert "annotations[0]: it is of an image [12, 10]" in first
    assert "annotations[1]: runs do not sum" in second
    with pytest.raises(FileNotFoundError, match="no image folder"):
        InstanceTruth(path, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("where", "change", "words"),
    [
        (("annotations", 0), {"category_id": 8}, "expected the id of one of the categories"),
        (("annotations", 0), {"category_id": "x"}, r"category_id is 'x'; expected a whole number"),
        (("annotations", 0), {"area": -1}, r"annotations\[0\]\.area is -1"),
        (("annotations", 0), {"bbox": [1, 2, 3]}, r"annotations\[0\]\.bbox is \[1, 2, 3\]"),
        (("images", 0), {"neg_category_ids": ["x"]}, r"images\[0\]\.neg_category_ids is \['x'\]"),
        (("images", 0), {"id": 4}, "have the same id 4"),
        (("categories", 0), {"name": None}, r"categories\[0\]\.name is None; expected a name"),
        (("categories", 0), {"frequency": "x"}, r"categories\[0\]\.frequency is 'x'"),
        (("categories", 0), {"id": 3}, "have the same id 3"),
    ],
)
def test_files_that_are_refused(
    tmp_path: Path, where: tuple[str, int], change: dict[str, Any], words: str
) -> None:
    wrong = content()
    wrong[where[0]][where[1]] |= change
    with pytest.raises(ConfigError, match=words) as error:
        read_labelled(written(tmp_path, wrong))
    assert "val.json is not a COCO or LVIS instance file" in str(error.value)


def test_files_without_images_or_categories(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no image"):
        InstanceTruth(written(tmp_path, content() | {"images": [], "annotations": []}))
    for wrong, words in (([], "the file is"), ({"images": []}, "annotations is missing")):
        path = tmp_path / "wrong.json"
        path.write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match=words):
            read_labelled(path)


def test_pictures_of_channels(tmp_path: Path) -> None:
    changed = content()
    changed["images"][0]["file_name"] = "b.npy"
    path = written(tmp_path, changed)
    pixels = np.random.default_rng(0).normal(size=(10, 12, 5)).astype(np.float32)
    np.save(tmp_path / "images" / "b.npy", pixels)
    image = InstanceTruth(path, in_channels=5).read(1)
    np.testing.assert_array_equal(image.pixels, pixels)
    with pytest.raises(CorruptSampleError, match=r"model\.in_channels"):
        InstanceTruth(path).read(1)
