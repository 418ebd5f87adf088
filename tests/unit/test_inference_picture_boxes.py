"""Boxes of a detector on a folder: which picture is meant, and what is written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from sam_jax.errors import ConfigError
from sam_jax.inference import folder
from sam_jax.inference.automatic import AutomaticOptions
from sam_jax.inference.box_masks import BoxOptions
from sam_jax.inference.picture_boxes import PictureBoxes, boxes_of_pictures
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.models.sam import Sam
from tests.golden.tiny import SHALLOW, random_variables

OPTIONS = BoxOptions(boxes_per_call=4)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(Sam(SHALLOW), random_variables(SHALLOW), Buckets((1,), (1,), (4,), (1,)))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    source = tmp_path / "pictures"
    (source / "more").mkdir(parents=True)
    for name, size in (("0012.jpg", (30, 40)), ("a.png", (20, 24)), ("more/c.JPEG", (9, 50))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(source / name)
    return source


def result(image: dict[str, Any], *box: float, **more: Any) -> dict[str, Any]:
    return image | {"bbox": list(box), "score": 0.5} | (more or {"label": "cat"})


def boxes_of(source: Path, content: Any, min_score: float | None = None) -> PictureBoxes:
    path = source.parent / "boxes.json"
    path.write_text(json.dumps(content))
    return boxes_of_pictures(path, folder.list_pictures(source), source, min_score)


def test_pictures_are_found_by_name_or_number(pictures: Path) -> None:
    by_number = [
        result({"image_id": 12}, 1, 2, 3, 4),
        result({"image_id": "a"}, 1, 2, 3, 4),
        result({"image_id": "more/c.JPEG"}, 1, 2, 3, 4),
        result({"image_id": 12}, 5, 6, 7, 8),
        result({"image_id": 13}, 5, 6, 7, 8),
    ]
    found = boxes_of(pictures, by_number)
    counts = {path.name: len(boxes) for path, boxes in found.by_picture.items()}
    assert counts == {"0012.jpg": 2, "a.png": 1, "c.JPEG": 1}
    (line,) = found.missing
    assert "1 boxes of image_id 13, which is none of the pictures" in line
    by_name = {"pictures/more/c.jpeg": [], "b.jpg": []}
    found = boxes_of(pictures, by_name)
    assert [path.name for path in found.by_picture] == ["c.JPEG"]
    assert "0 boxes of file_name 'b.jpg'" in found.missing[0]


def test_pictures_that_are_not_clear(pictures: Path) -> None:
    with pytest.raises(ConfigError, match="none of its 1 images is among the 3 pictures"):
        boxes_of(pictures, {"b.jpg": []})
    both = [result({"image_id": name}, 1, 2, 3, 4) for name in (12, "0012")]
    with pytest.raises(ConfigError, match="12 and '0012' are both the picture"):
        boxes_of(pictures, both)
    Image.new("RGB", (8, 8)).save(pictures / "more" / "12.png")
    with pytest.raises(ConfigError, match=r"image_id 12 may be .*write file_name"):
        boxes_of(pictures, both[:1])


def test_boxes_that_were_left_out_or_cut_are_said(pictures: Path) -> None:
    inside = {"xmin": 1, "ymin": 2, "xmax": 11, "ymax": 12}
    content = {
        "a.png": [
            {"score": 0.5, "label": "cat", "box": inside | {"xmax": 90}},
            {"score": 0.1, "label": "dog", "box": inside},
        ]
    }
    found = boxes_of(pictures, content, min_score=0.2)
    below, cut = found.remarks
    assert "1 of 2 boxes have a score below 0.2" in below
    assert "1 boxes end outside of their pictures and were cut, such as 'a.png'[0]" in cut
    # Categories do not depend on the score, so files of several thresholds have the same.
    assert list(found.categories) == ["cat", "dog"]


# pycocotools decodes in a way that numpy 2 warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_labels_and_scores_pass_through(
    predictor: Predictor, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    boxes = boxes_of(
        pictures,
        [
            result({"file_name": "a.png"}, 1, 2, 10, 9, label="dog"),
            result({"file_name": "more/c.JPEG"}, 1.5, 2, 10, 4, label="cat"),
            result({"file_name": "a.png"}, 3, 2, 11.25, 9, label="cat"),
            result({"file_name": "nowhere.png"}, 3, 2, 11, 9, label="cow"),
        ],
    )
    summary = folder.annotate_folder(
        predictor, pictures, out, OPTIONS, boxes=boxes, coco=True, label_maps=True
    )
    assert (summary.num_annotated, summary.num_masks) == (3, 3)
    assert "'nowhere.png'" in summary.skipped[0]
    assert (out / "skipped.txt").read_text().strip() == summary.skipped[0]
    content = json.loads((out / "annotations" / "a.json").read_text())
    first, second = content["annotations"]
    assert (first["label"], first["score"], first["prompt_bbox"]) == ("dog", 0.5, [1, 2, 10, 9])
    assert (second["label"], second["prompt_bbox"]) == ("cat", [3, 2, 11.25, 9])
    assert "category_id" not in first
    # A picture without boxes is done, and has no masks.
    assert json.loads((out / "annotations" / "0012.json").read_text())["annotations"] == []

    coco = COCO(out / "coco.json")
    assert {c["name"]: c["id"] for c in coco.cats.values()} == {"cat": 1, "cow": 2, "dog": 3}
    of_a = [coco.anns[i] for i in coco.getAnnIds(catIds=[3])]
    assert [(a["label"], a["score"]) for a in of_a] == [("dog", 0.5)]
    for annotation in coco.anns.values():
        assert coco.annToMask(annotation).sum() == annotation["area"]
    # The same call has nothing left to do, and another one must not mix its masks with these.
    again = folder.annotate_folder(predictor, pictures, out, OPTIONS, boxes=boxes)
    assert (again.num_annotated, again.num_before) == (0, 3)
    for other, words in (
        ({"options": BoxOptions(refine=True, boxes_per_call=4), "boxes": boxes}, "refine was"),
        ({"options": None, "boxes": None}, "points_per_side was None"),
        ({"options": OPTIONS, "boxes": boxes_of(pictures, {"a.png": []})}, "boxes was"),
    ):
        with pytest.raises(ConfigError, match=words):
            folder.annotate_folder(predictor, pictures, out, **other)


def test_numbers_pass_through(predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    boxes = boxes_of(pictures, [result({"image_id": 12}, 1, 2, 10, 9, category_id=44)])
    folder.annotate_folder(predictor, pictures, tmp_path / "out", OPTIONS, boxes=boxes, coco=True)
    content = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert content["categories"] == [{"id": 44, "name": "44", "supercategory": "object"}]
    assert [a["category_id"] for a in content["annotations"]] == [44]


def test_boxes_are_in_pixels_of_the_upright_picture(predictor: Predictor, tmp_path: Path) -> None:
    source, upright = tmp_path / "in", tmp_path / "upright"
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    for path in (source, upright):
        path.mkdir()
    Image.fromarray(pixels).save(source / "a.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).save(upright / "a.png")
    # 38 is beyond the lower edge of the picture as it is stored.
    content = {
        "a.png": [{"score": 1, "label": "x", "box": {"xmin": 2, "ymin": 9, "xmax": 18, "ymax": 38}}]
    }
    answers = []
    for path in (source, upright):
        out = tmp_path / f"{path.name} out"
        folder.annotate_folder(
            predictor, path, out, OPTIONS, boxes=boxes_of(path, content), overlays=False
        )
        answers.append(json.loads((out / "annotations" / "a.json").read_text()))
    assert answers[0] == answers[1]
    assert answers[0]["annotations"][0]["segmentation"]["size"] == [40, 20]
    outside = {
        "a.png": [
            {"score": 1, "label": "x", "box": {"xmin": 21, "ymin": 9, "xmax": 30, "ymax": 19}}
        ]
    }
    with pytest.raises(ConfigError, match="lies outside"):
        boxes_of(source, outside)


def test_options_of_the_other_kind_are_refused(
    predictor: Predictor, pictures: Path, tmp_path: Path
) -> None:
    boxes = boxes_of(pictures, {"a.png": []})
    with pytest.raises(ConfigError, match="no grid is searched"):
        folder.annotate_folder(
            predictor, pictures, tmp_path / "out", AutomaticOptions(), boxes=boxes
        )
    with pytest.raises(ConfigError, match="give boxes, too"):
        folder.annotate_folder(predictor, pictures, tmp_path / "out", OPTIONS)


def test_coco_knows_every_label(predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    boxes = boxes_of(pictures, [result({"file_name": "a.png"}, 1, 2, 10, 9, label="dog")])
    folder.annotate_folder(predictor, pictures, tmp_path / "out", OPTIONS, boxes=boxes)
    file = tmp_path / "out" / "annotations" / "a.json"
    with pytest.raises(ConfigError, match="a mask's label is 'dog'; expected one of 'cat'"):
        folder.write_coco([file], tmp_path / "coco.json", {"cat": {"id": 1, "name": "cat"}})
    assert not (tmp_path / "coco.json").exists()
