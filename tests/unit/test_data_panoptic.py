import json
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sam_jax.data.samples import CorruptSampleError, decode_masks
from sam_jax.data.sources.coco_file import CROWD, OF_NO_IMAGE
from sam_jax.data.sources.listed_images import UNANNOTATED
from sam_jax.data.sources.panoptic import NOT_LISTED, STUFF, PanopticSource
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import box_mask, encode_image, gradient_image

HW = (12, 20)
CAR = box_mask(HW, 2, 7, 3, 11)
SKY = box_mask(HW, 0, 2, 0, 20)
CROWDED = box_mask(HW, 8, 12, 10, 20)
# Ids in three channels.
CAR_ID, SKY_ID, CROWD_ID = 70_000, 300, 5


def colors(ids: np.ndarray) -> np.ndarray:
    """The PNG's colours of ids, by bytes."""
    return np.ascontiguousarray(ids.astype("<u4")).view(np.uint8).reshape(*ids.shape, 4)[..., :3]


def segment(segment_id: int, category: int, crowd: int = 0) -> dict[str, Any]:
    return {"id": segment_id, "category_id": category, "iscrowd": crowd, "area": 1}


def content(*segments: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": [
            {"id": 1, "file_name": "a.png", "height": HW[0], "width": HW[1]},
            {"id": 2, "file_name": "b.png", "height": HW[0], "width": HW[1]},
        ],
        "categories": [
            {"id": 1, "name": "car", "isthing": 1},
            {"id": 2, "name": "sky", "isthing": 0},
        ],
        "annotations": [{"image_id": 1, "file_name": "a_ids.png", "segments_info": list(segments)}],
    }


THREE = (segment(SKY_ID, 2), segment(CAR_ID, 1), segment(CROWD_ID, 1, crowd=1))


def write(folder: Path, changed: Any = None, ids: np.ndarray | None = None) -> Path:
    if ids is None:
        ids = CAR * CAR_ID + SKY * SKY_ID + CROWDED * CROWD_ID
    for name in ("images", "panoptic_val"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "images" / "a.png").write_bytes(encode_image(gradient_image(HW)))
    (folder / "panoptic_val" / "a_ids.png").write_bytes(encode_image(colors(ids)))
    path = folder / "panoptic_val.json"
    path.write_text(json.dumps(content(*THREE) if changed is None else changed))
    return path


def test_things_and_stuff_are_objects_and_groups_are_not(tmp_path: Path) -> None:
    path = write(tmp_path)
    source = PanopticSource(path)
    assert len(source) == 1
    assert (source.file_name(0), source.num_masks(0)) == ("a.png", 2)
    np.testing.assert_array_equal(decode_masks(source[0], range(2)), [SKY, CAR])
    assert source.left_out.counts == {CROWD: 1, UNANNOTATED: 1}
    assert source[0].remarks == source[0].unusable_masks == ()
    things = PanopticSource(path, stuff="skip", crowd="keep")
    np.testing.assert_array_equal(decode_masks(things[0], range(2)), [CAR, CROWDED])
    assert things.left_out.counts == {STUFF: 1, UNANNOTATED: 1}


def test_what_json_and_png_say_differently_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, content(segment(CAR_ID, 1), segment(77, 1)))
    sample = PanopticSource(path)[0]
    np.testing.assert_array_equal(decode_masks(sample, [0]), [CAR])
    assert sample.unusable_masks == (
        f"segment 77 is not in {tmp_path / 'panoptic_val' / 'a_ids.png'}",
    )
    assert [reason for reason, _ in sample.remarks] == [NOT_LISTED] * 2


def test_damage_is_told_apart(tmp_path: Path) -> None:
    path = write(tmp_path)
    png = tmp_path / "panoptic_val" / "a_ids.png"
    png.write_bytes(encode_image(CAR.astype(np.uint8)))
    with pytest.raises(CorruptSampleError, match="its mode is L; expected 8-bit RGB"):
        PanopticSource(path)[0]
    png.write_bytes(b"nothing")
    with pytest.raises(CorruptSampleError, match="unreadable segments"):
        PanopticSource(path)[0]
    png.unlink()
    with pytest.raises(CorruptSampleError, match=r"a_ids\.png: missing segments"):
        PanopticSource(path)[0]
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(CorruptSampleError, match=r"a\.png: missing image"):
        PanopticSource(path)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": None}, "categories is None"),
        ({"annotations": [{"image_id": 1, "file_name": "a"}]}, "segments_info is missing"),
        ({"annotations": [{"image_id": 1, "segments_info": []}]}, "file_name is missing"),
        ({"annotations": content()["annotations"] * 2}, "the same id 1"),
        ({"annotations": content(segment(3, 9))["annotations"]}, "which no category has"),
        ({"annotations": content(segment(3, 1), segment(3, 1))["annotations"]}, "id is 3, as of"),
        ({"annotations": content({"id": "x", "category_id": 1})["annotations"]}, "id is 'x'"),
    ],
)
def test_other_files_are_refused_with_the_place(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        PanopticSource(write(tmp_path, content(*THREE) | changes))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(FileNotFoundError, match="masks="):
        PanopticSource(path, masks=tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="images="):
        PanopticSource(path, images=tmp_path / "elsewhere")
    strange = content(*THREE)
    strange["annotations"][0]["image_id"] = 5
    with pytest.raises(ConfigError, match=f"no image with a segment to use.*{OF_NO_IMAGE}"):
        PanopticSource(write(tmp_path, strange))


IDS = hnp.arrays(np.int64, HW, elements=st.sampled_from([0, 1, 255, 256, 65_536, 16_777_215]))


@hypothesis.settings(
    max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(ids=IDS, order=st.randoms())
def test_every_segment_is_the_pixels_of_its_id(tmp_path: Path, ids: np.ndarray, order: Any) -> None:
    values = [value for value in np.unique(ids).tolist() if value]
    hypothesis.assume(values)
    order.shuffle(values)
    sample = PanopticSource(write(tmp_path, content(*(segment(v, 1) for v in values)), ids))[0]
    expected = [ids == value for value in values]
    np.testing.assert_array_equal(decode_masks(sample, range(len(values))), expected)
