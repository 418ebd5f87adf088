"""A detector's file: both forms, and everything that is refused by file and number."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from sam_jax.errors import ConfigError
from sam_jax.inference.detections import Detection, check_boxes, read_detections

RESULT = {"image_id": 7, "category_id": 3, "bbox": [1.5, 2, 10, 20.25], "score": 0.5}
FOUND = {"score": 0.5, "label": "cat", "box": {"xmin": 1, "ymin": 2, "xmax": 11, "ymax": 22}}


def written(folder: Path, content: Any) -> Path:
    path = folder / "boxes.json"
    path.write_text(json.dumps(content))
    return path


def test_both_forms_say_the_same(tmp_path: Path) -> None:
    result = {"file_name": "a.jpg", "label": "cat", "bbox": [1, 2, 10, 20], "score": 0.5}
    ours = read_detections(written(tmp_path, [result]))
    theirs = read_detections(written(tmp_path, {"a.jpg": [FOUND], "b.jpg": []}))
    (one,), (other,) = ours.by_image["a.jpg"], theirs.by_image["a.jpg"]
    assert (one.box_xyxy, one.score, one.label) == ((1.0, 2.0, 11.0, 22.0), 0.5, "cat")
    assert (other.box_xyxy, other.score, other.label) == (one.box_xyxy, one.score, one.label)
    assert (one.place, other.place) == ("[0]", "'a.jpg'[0]")
    assert theirs.by_image["b.jpg"] == []
    assert (ours.as_corners, theirs.as_corners) == (False, True)
    assert (len(ours), len(theirs)) == (1, 1)


def test_images_by_number(tmp_path: Path) -> None:
    detections = read_detections(written(tmp_path, [RESULT, RESULT | {"image_id": 9.0}]))
    assert detections.names == "image_id"
    assert list(detections.by_image) == [7, 9]
    assert detections.by_image[7][0].box_xywh == [1.5, 2.0, 10.0, 20.25]
    assert detections.categories() == {3: {"id": 3, "name": "3", "supercategory": "object"}}
    assert len(read_detections(written(tmp_path, []))) == 0


def test_categories_are_made_of_labels(tmp_path: Path) -> None:
    def categories(*classes: dict[str, Any]) -> dict[Any, Any]:
        boxes = [{"image_id": 1, "bbox": [0, 0, 1, 1], "score": 1} | found for found in classes]
        return read_detections(written(tmp_path, boxes)).categories()

    named = categories({"label": "dog"}, {"label": "cat"}, {"label": "dog"})
    assert {name: found["id"] for name, found in named.items()} == {"cat": 1, "dog": 2}
    both = categories({"label": "dog", "category_id": 18}, {"label": "cat", "category_id": 17})
    assert {name: found["id"] for name, found in both.items()} == {"cat": 17, "dog": 18}
    # Those without a number get one that no other has.
    mixed = categories({"label": "dog", "category_id": 1}, {"label": "cat"}, {"label": "ox"})
    assert {name: found["id"] for name, found in mixed.items()} == {"cat": 2, "dog": 1, "ox": 3}
    assert categories() == {}
    with pytest.raises(ConfigError, match="category_id 1 differ in their label"):
        categories({"label": "dog", "category_id": 1}, {"label": "cat", "category_id": 1})
    with pytest.raises(ConfigError, match="label 'dog' differ in their category_id"):
        categories({"label": "dog", "category_id": 1}, {"label": "dog", "category_id": 2})
    with pytest.raises(ConfigError, match=r"\[1\]: of it and \[0\], one has a label"):
        categories({"label": "dog"}, {"category_id": 2})
    with pytest.raises(ConfigError, match="label 'dog' differ in their category_id"):
        categories({"label": "dog"}, {"label": "dog", "category_id": 2})


def test_scores_below_are_left_out(tmp_path: Path) -> None:
    boxes = [RESULT | {"score": score} for score in (0.1, 0.3, 0.29)]
    kept = read_detections(written(tmp_path, boxes)).above(0.29)
    assert [detection.score for detection in kept.by_image[7]] == [0.3, 0.29]
    assert list(read_detections(written(tmp_path, boxes)).above(0.9).by_image) == [7]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", r"boxes\.json is no JSON"),
        ('"boxes"', "the file is 'boxes'; expected a list of COCO's results"),
        ('{"images": [], "annotations": []}', "is a COCO annotation file"),
        ("[1]", r"\[0\] is 1; expected an object with bbox and score"),
        ('{"a.jpg": 1}', "'a.jpg' is 1; expected a list"),
        ('{"a.jpg": [1]}', r"'a\.jpg'\[0\] is 1; expected an object"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_detections(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bbox": [0, 0, float("nan"), 1]}, r"\[1\]: the box is .*expected finite numbers"),
        ({"bbox": [0, 0, float("inf"), 1]}, r"\[1\]: the box is .*expected finite numbers"),
        ({"bbox": [5, 5, 0, 3]}, r"\[1\]: the box from \(5, 5\) to \(5, 8\) is empty"),
        ({"bbox": [5, 5, 3, -3]}, "is empty"),
        ({"bbox": [5, 5, 3]}, r"\[1\]\.bbox is .*expected four numbers"),
        ({"bbox": [5, 5, 3, True]}, "expected four numbers"),
        ({"bbox": None}, r"\[1\]\.bbox is missing"),
        ({"score": None}, r"\[1\]\.score is missing"),
        ({"score": float("nan")}, "score is nan; expected a finite number"),
        ({"score": "high"}, "expected a finite number"),
        ({"category_id": None}, "label is missing; expected a label, or a category_id"),
        ({"category_id": 1.5}, r"category_id is 1\.5; expected a whole number"),
        ({"label": 5}, "label is 5; expected a name"),
        ({"image_id": None}, r"\[1\]\.image_id is missing"),
        ({"image_id": True}, "image_id is True"),
    ],
)
def test_boxes_that_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        read_detections(written(tmp_path, [RESULT, RESULT | change]))
    assert "boxes.json" in str(error.value)


def test_corners_that_are_refused(tmp_path: Path) -> None:
    reversed_box = FOUND | {"box": {"xmin": 5, "ymin": 2, "xmax": 5, "ymax": 22}}
    with pytest.raises(ConfigError, match=r"'a\.jpg'\[1\]: the box .* is empty"):
        read_detections(written(tmp_path, {"a.jpg": [FOUND, reversed_box]}))
    with pytest.raises(ConfigError, match="expected an object with xmin, ymin, xmax, ymax"):
        read_detections(written(tmp_path, {"a.jpg": [FOUND | {"box": [1, 2, 3, 4]}]}))


corners = st.tuples(*[st.floats(0, 99)] * 4).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]) + 1, max(c[1], c[3]) + 1)
)


@given(st.lists(corners, min_size=1, max_size=30))
def test_boxes_within_their_image_pass(boxes: list[tuple[float, ...]]) -> None:
    detections = _detections([[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes])
    assert check_boxes(detections, {7: (100, 100)}) == []


def _detections(boxes_xywh: list[list[float]]) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return read_detections(
            written(Path(folder), [RESULT | {"bbox": box} for box in boxes_xywh])
        )


def test_corners_given_as_sizes_are_caught() -> None:
    rng = np.random.default_rng(0)
    near, size = rng.uniform(0, 60, (40, 2)), rng.uniform(5, 40, (40, 2))
    right = np.concatenate([near, size], axis=1).tolist()
    wrong = np.concatenate([near, near + size], axis=1).tolist()
    assert check_boxes(_detections(right), {7: (100, 100)}) == []
    with pytest.raises(ConfigError, match=r"boxes leave their images.*write \[x, y, width, height"):
        check_boxes(_detections(wrong), {7: (100, 100)})
    # One of 40 is 2.5 %: it is cut, and said. Three are 7.5 %.
    leaving = check_boxes(_detections([*right[:-1], [90.0, 90.0, 50.0, 5.0]]), {7: (100, 100)})
    assert [detection.place for _, detection in leaving] == ["[39]"]
    with pytest.raises(ConfigError, match=r"3 of 40 boxes .*images of another size"):
        check_boxes(_detections(right[:-3] + [[90.0, 90.0, 50.0, 5.0]] * 3), {7: (100, 100)})
    # Boxes of an image whose size is not known are not looked at.
    assert check_boxes(_detections(wrong), {}) == []


def test_boxes_outside_of_their_image_are_refused(tmp_path: Path) -> None:
    far = FOUND | {"box": {"xmin": 60, "ymin": 2, "xmax": 70, "ymax": 22}}
    cut = FOUND | {"box": {"xmin": 20, "ymin": 2, "xmax": 70, "ymax": 22}}
    path = written(tmp_path, {"a.jpg": [FOUND, far, far]})
    with pytest.raises(
        ConfigError, match=r"'a\.jpg'\[1\].*60 wide and 50 high, lies outside .*1 more"
    ):
        check_boxes(read_detections(path), {"a.jpg": (50, 60)})
    # Named corners cannot be mistaken for something else, however many are cut.
    detections = read_detections(written(tmp_path, {"a.jpg": [cut]}))
    assert [found for _, found in check_boxes(detections, {"a.jpg": (50, 60)})] == [
        Detection("'a.jpg'[0]", (20.0, 2.0, 70.0, 22.0), 0.5, "cat")
    ]
