import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_jax.data.samples import CorruptSampleError, decode_masks
from sam_jax.data.sources.coco import VideoCocoSource
from sam_jax.data.sources.coco_file import CROWD, NO_SEGMENTATION
from sam_jax.data.sources.listed_images import UNANNOTATED
from sam_jax.data.sources.video_coco_file import OF_NO_VIDEO
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import box_mask, compress, encode_image, gradient_image

HW = (12, 20)
BOX = box_mask(HW, 2, 7, 3, 11)
OTHER = box_mask(HW, 0, 3, 15, 20)
POLYGON = [3, 2, 11, 2, 11, 7, 3, 7]


def content() -> dict[str, Any]:
    """Two videos of three frames and one; the second frame of the first is empty."""
    return {
        "videos": [
            {
                "id": 1,
                "height": HW[0],
                "width": HW[1],
                "file_names": [f"cat/img_{i}.png" for i in range(3)],
            },
            {"id": 2, "height": HW[0], "width": HW[1], "file_names": ["dog/img_0.png"]},
        ],
        "annotations": [
            {"id": 1, "video_id": 1, "iscrowd": 0, "segmentations": [compress(BOX), None, None]},
            {
                "id": 2,
                "video_id": 1,
                "segmentations": [compress(OTHER), None, [POLYGON]],
            },
            {"id": 3, "video_id": 2, "iscrowd": 1, "segmentations": [compress(OTHER)]},
            {"id": 4, "video_id": 2, "segmentations": [compress(BOX)]},
            {"id": 5, "video_id": 9, "segmentations": [compress(BOX)]},
            {"id": 6, "video_id": 2},
        ],
    }


def write(folder: Path, changed: Any = None) -> Path:
    found = content() if changed is None else changed
    for name in ("cat/img_0", "cat/img_1", "cat/img_2", "dog/img_0"):
        path = folder / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(gradient_image(HW)))
    path = folder / "annotations_train.json"
    path.write_text(json.dumps(found))
    return path


def test_frames_with_objects_are_the_samples(tmp_path: Path) -> None:
    source = VideoCocoSource(write(tmp_path))
    names = [source.file_name(i) for i in range(len(source))]
    assert names == ["cat/img_0.png", "cat/img_2.png", "dog/img_0.png"]
    assert [source.num_masks(i) for i in range(3)] == [2, 1, 1]
    np.testing.assert_array_equal(decode_masks(source[0], range(2)), [BOX, OTHER])
    np.testing.assert_array_equal(decode_masks(source[1], [0]), [BOX])
    np.testing.assert_array_equal(decode_masks(source[2], [0]), [BOX])
    assert source.left_out.counts == {CROWD: 1, OF_NO_VIDEO: 1, NO_SEGMENTATION: 1, UNANNOTATED: 1}
    kept = VideoCocoSource(tmp_path / "annotations_train.json", crowd="keep")
    np.testing.assert_array_equal(decode_masks(kept[2], range(2)), [OTHER, BOX])


def test_damage_is_told_apart(tmp_path: Path) -> None:
    changed = content()
    changed["annotations"][0]["segmentations"][0] = {"size": list(HW), "counts": "\x00"}
    changed["annotations"][1]["segmentations"][0] = [[1, 2]]
    source = VideoCocoSource(write(tmp_path, changed))
    sample = source[0]
    assert "annotations[1].segmentations[0]" in sample.unusable_masks[0]
    with pytest.raises(CorruptSampleError, match="bad rle"):
        decode_masks(sample, [0])
    (tmp_path / "images" / "dog" / "img_0.png").unlink()
    with pytest.raises(CorruptSampleError, match="missing image"):
        VideoCocoSource(tmp_path / "annotations_train.json")[2]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("annotations", 0, "segmentations"), [None], r"is '1 of them'; expected one for each of"),
        (("annotations", 0, "segmentations"), "x", "expected one for each"),
        (("videos", 0, "file_names"), None, r"videos\[0\].file_names is None"),
        (("videos", 0, "file_names"), [1], "names of files"),
        (("videos", 1, "id"), 1, "same id 1"),
        (("annotations", 0, "video_id"), True, "video_id is True"),
        (("annotations", 0, "iscrowd"), 3, "iscrowd is 3"),
        (("videos", 0, "height"), -1, "height of 'cat/img_0.png' is -1"),
        (("videos",), None, "videos is None"),
    ],
)
def test_what_is_no_such_file_is_refused_with_its_place(
    tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    changed = content()
    place: Any = changed
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        VideoCocoSource(write(tmp_path, changed))


def test_a_file_of_images_is_no_file_of_videos(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a YouTube-VIS file: videos is missing"):
        VideoCocoSource(write(tmp_path, {"images": [], "annotations": []}))
