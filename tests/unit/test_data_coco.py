import json
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from sam_jax.data import rle
from sam_jax.data.samples import CorruptSampleError, decode_image, decode_masks
from sam_jax.data.sources.coco import CocoSource, segmentation_to_rle
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import box_mask, compress, encode_image, gradient_image

HW = (12, 20)
BOX = box_mask(HW, 2, 7, 3, 11)
BOX_POLYGON = [3, 2, 11, 2, 11, 7, 3, 7]


def write(folder: Path, annotations: list[dict[str, Any]], **image: Any) -> Path:
    """A data set of one annotated image and one that is not."""
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "a.png").write_bytes(encode_image(gradient_image(HW)))
    first = {"id": 7, "file_name": "a.png", "height": HW[0], "width": HW[1], **image}
    second = {"id": 8, "file_name": "b.png", "height": 5, "width": 5}
    content = {
        "images": [second, first],
        "annotations": [{"image_id": 7, **annotation} for annotation in annotations],
    }
    path = folder / "train.json"
    path.write_text(json.dumps(content))
    return path


def test_all_forms_of_segmentation(tmp_path: Path) -> None:
    flat = BOX.T.reshape(-1).astype(int)
    changes = np.flatnonzero(np.diff(flat)) + 1
    uncompressed = np.diff(changes, prepend=0, append=flat.size).tolist()
    two_parts = [BOX_POLYGON, [14, 8, 19, 8, 19, 11, 14, 11]]
    segmentations: list[Any] = [
        [BOX_POLYGON],
        compress(BOX),
        {"size": list(HW), "counts": uncompressed},
        two_parts,
    ]
    source = CocoSource(write(tmp_path, [{"segmentation": s} for s in segmentations]))
    assert len(source) == 1
    sample = source[0]
    assert (sample.dataset, Path(sample.name).name) == ("coco", "a.png")
    np.testing.assert_array_equal(decode_image(sample), gradient_image(HW))
    masks = decode_masks(sample, range(4))
    both = BOX | box_mask(HW, 8, 11, 14, 19)
    np.testing.assert_array_equal(masks, [BOX, BOX, BOX, both])


def test_crowds_are_left_out(tmp_path: Path) -> None:
    annotations: list[dict[str, Any]] = [
        {"segmentation": compress(BOX), "iscrowd": 1},
        {"segmentation": compress(~BOX), "iscrowd": 0},
        {"segmentation": compress(BOX)},
    ]
    sample = CocoSource(write(tmp_path, annotations))[0]
    np.testing.assert_array_equal(decode_masks(sample, [0, 1]), [~BOX, BOX])
    assert len(sample.masks_rle) == 2


def test_bad_polygons_cost_only_their_own_mask(tmp_path: Path) -> None:
    bad: list[Any] = [
        [],
        None,
        "x",
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, "6"]],
        [5],
    ]
    bad += [[[0, 0, 1e9, 0, 1e9, 5]], [[0, 0, float("nan"), 0, 5, 5]]]
    annotations = [{"segmentation": s} for s in [*bad, [BOX_POLYGON]]]
    sample = CocoSource(write(tmp_path, annotations))[0]
    assert len(sample.unusable_masks) == len(bad)
    np.testing.assert_array_equal(decode_masks(sample, [0]), [BOX])


def test_polygons_need_the_size_of_the_image(tmp_path: Path) -> None:
    path = write(tmp_path, [{"segmentation": [BOX_POLYGON]}], height=None)
    assert "size" in CocoSource(path)[0].unusable_masks[0]


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    source = CocoSource(write(tmp_path, [{"segmentation": [BOX_POLYGON]}], file_name="c.png"))
    with pytest.raises(CorruptSampleError, match=r"c\.png: missing image"):
        source[0]


def test_where_images_are_looked_for(tmp_path: Path) -> None:
    annotations = [{"segmentation": [BOX_POLYGON]}]
    path = write(tmp_path, annotations, file_name="images/a.png")
    assert CocoSource(path)[0].image == CocoSource(path, images=tmp_path)[0].image
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "images").rename(elsewhere)
    assert CocoSource(path, images=elsewhere)[0].masks_rle
    with pytest.raises(FileNotFoundError, match="images="):
        CocoSource(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [])
    with pytest.raises(ConfigError, match="no image with an annotation"):
        CocoSource(path)
    for content in ("", "[]", "{", '{"images": []}', '{"images": [{}], "annotations": []}'):
        path.write_text(content)
        with pytest.raises(ConfigError, match="not a COCO instance file"):
            CocoSource(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        CocoSource(path)


numbers = st.integers(-60, 60) | st.floats(-60, 60) | st.sampled_from([float("inf"), 1e300])


@hypothesis.given(st.lists(st.lists(numbers, max_size=12), max_size=3))
def test_arbitrary_polygons_give_a_mask_or_an_error(polygons: list[list[float]]) -> None:
    try:
        result = segmentation_to_rle(polygons, list(HW))
    except rle.BadRleError:
        return
    assert rle.decode(rle.run_lengths(result), HW).shape == HW


def test_the_real_pack(shared_data: Path) -> None:
    folder = shared_data / "permissive" / "coco_ccby"
    source = CocoSource(folder / "val.json")
    assert len(source) == 34
    assert sum(len(source[i].masks_rle) for i in range(34)) == 161
    sample = source[3]
    masks = decode_masks(sample, range(len(sample.masks_rle)))
    assert masks.any(axis=(1, 2)).all()
    assert masks.shape[1:] == decode_image(sample).shape[:2]
