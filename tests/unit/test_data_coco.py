import json
import re
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from sam_jax import rle
from sam_jax.data.samples import (
    CorruptSampleError,
    Sample,
    SkippedSampleError,
    decode_image,
    decode_masks,
)
from sam_jax.data.sources.coco import CocoSource
from sam_jax.data.sources.coco_file import CROWD, NO_SEGMENTATION, OF_NO_IMAGE
from sam_jax.data.sources.listed_images import (
    PART_LEFT_OUT,
    UNANNOTATED,
    segmentation_to_rle,
)
from sam_jax.data.transforms import TrainTransform
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


def test_crowds_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    annotations: list[dict[str, Any]] = [
        {"segmentation": compress(BOX), "iscrowd": 1},
        {"segmentation": compress(~BOX), "iscrowd": 0},
        {"segmentation": compress(BOX)},
        {"segmentation": compress(BOX), "iscrowd": True},
        {"segmentation": compress(BOX), "iscrowd": None},
    ]
    path = write(tmp_path, annotations)
    source = CocoSource(path)
    np.testing.assert_array_equal(decode_masks(source[0], range(3)), [~BOX, BOX, BOX])
    assert source.left_out.counts == {CROWD: 2, UNANNOTATED: 1}
    assert "2 annotations of a crowd (iscrowd), e.g. annotations[0] with image_id 7" in caplog.text
    assert 'crowd="keep"' in caplog.text
    kept = CocoSource(path, crowd="keep")
    np.testing.assert_array_equal(decode_masks(kept[0], range(5)), [BOX, ~BOX, BOX, BOX, BOX])
    assert kept.left_out.counts == {UNANNOTATED: 1}


def test_a_file_of_crowds_names_the_key(tmp_path: Path) -> None:
    path = write(tmp_path, [{"segmentation": compress(BOX), "iscrowd": 1}] * 3)
    with pytest.raises(ConfigError, match=r'3 annotations of a crowd .*crowd="keep"'):
        CocoSource(path)


BAD_POLYGONS: list[Any] = [
    [],
    [1, 2],
    [1, 2, 3, 4],
    [1, 2, 3, 4, 5, 6, 7],
    [1, 2, 3, 4, 5, "6"],
    [1, 2, 3, 4, 5, None],
    [1, 2, 3, 4, 5, True],
    [[1, 2], [3, 4], [5, 6]],
    [[1, 2, 3, 4, 5, 6]],
    [0, 0, 1e9, 0, 1e9, 5],
    [0, 0, 10**400, 0, 9, 5],
    [0, 0, float("nan"), 0, 5, 5],
    [0, 0, float("-inf"), 0, 5, 5],
    [0.1, 0.1, 0.9, 0.1, 0.9, 0.9],
    5,
    "x",
    None,
    {},
]


def test_bad_annotations_cost_only_their_own_mask(tmp_path: Path) -> None:
    bad = ["x", 3, [5], BOX_POLYGON, *([polygon] for polygon in BAD_POLYGONS)]
    annotations = [{"segmentation": s} for s in [*bad, [BOX_POLYGON]]]
    source = CocoSource(write(tmp_path, annotations))
    sample = source[0]
    assert len(sample.unusable_masks) == len(bad)
    assert sample.unusable_masks[0].startswith("annotations[0]: ")
    assert sample.remarks == ()
    np.testing.assert_array_equal(decode_masks(sample, [0]), [BOX])


@pytest.mark.parametrize("bad", BAD_POLYGONS, ids=lambda bad: f"{bad!r:.30}")
def test_a_bad_part_costs_the_part_only(tmp_path: Path, bad: Any) -> None:
    parts = [bad, BOX_POLYGON, bad]
    sample = CocoSource(write(tmp_path, [{"segmentation": parts}]))[0]
    np.testing.assert_array_equal(decode_masks(sample, [0]), [BOX])
    assert sample.unusable_masks == ()
    assert [reason for reason, _ in sample.remarks] == [PART_LEFT_OUT] * 2
    assert sample.remarks[1][1].startswith("annotations[0]: part 3 of 3: ")


@pytest.mark.parametrize("nothing", [None, [], {}, ""])
def test_boxes_alone_are_no_masks(tmp_path: Path, nothing: Any) -> None:
    box = {"bbox": [3, 2, 8, 5], "segmentation": nothing}
    annotations: list[dict[str, Any]] = [
        box,
        {"bbox": [3, 2, 8, 5]},
        {"segmentation": compress(BOX)},
    ]
    source = CocoSource(write(tmp_path, annotations))
    assert source.left_out.counts == {NO_SEGMENTATION: 2, UNANNOTATED: 1}
    assert len(source[0].masks_rle) == 1
    with pytest.raises(ConfigError, match=r"no image .*1 annotations without a segmentation"):
        CocoSource(write(tmp_path, [box]))


@pytest.mark.parametrize("absent", [{"height": None}, {"height": None, "width": None}])
def test_a_size_that_is_not_said_is_the_pictures(tmp_path: Path, absent: dict[str, Any]) -> None:
    path = write(tmp_path, [{"segmentation": [BOX_POLYGON]}], **absent)
    np.testing.assert_array_equal(decode_masks(CocoSource(path)[0], [0]), [BOX])


def test_a_wrong_size_is_told_when_the_picture_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, [{"segmentation": [BOX_POLYGON]}], height=HW[1], width=HW[0])
    with pytest.raises(CorruptSampleError, match=r"is \[20, 12\], the image \[12, 20\]"):
        decode_masks(CocoSource(path)[0], [0])


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


def test_missing_pictures_are_counted_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    CocoSource(write(tmp_path, [{"segmentation": [BOX_POLYGON]}], file_name="c.png"))
    assert f"1 of 1 pictures are not in {tmp_path / 'images'}, e.g. 'c.png'" in caplog.text


def test_names_of_another_disk_are_found_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "D:\\labels\\A.PNG"
    source = CocoSource(write(tmp_path, [{"segmentation": [BOX_POLYGON]}], file_name=name))
    assert source[0].name == str(tmp_path / "images" / "a.png")
    assert f"1 file names are not those of the files found for them, e.g. {name!r}" in caplog.text


def merged(tmp_path: Path, **changes: Any) -> Path:
    """Two annotated images, with `images_1_id=...` and the like put into their records."""
    path = write(tmp_path, [{"id": 1, "segmentation": [BOX_POLYGON]}] * 2)
    content = json.loads(path.read_text())
    content["annotations"][1] |= {"id": 2, "image_id": 8}
    content["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    for place, value in changes.items():
        records, number, field = place.split("_", 2)
        if value is ...:
            del content[records][int(number)][field]
        else:
            content[records][int(number)][field] = value
    path.write_text(json.dumps(content))
    return path


NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"images_1_id": 8}, ["images[0] ('b.png') and images[1] ('a.png')", "same id 8"]),
        ({"images_1_id": "8"}, ["images[0] ('b.png') and images[1] ('a.png')", "same id '8'"]),
        ({"images_1_id": 8.0}, ["images[0] ('b.png') and images[1] ('a.png')", "same id 8"]),
        ({"annotations_1_id": 1}, ["annotations[0]", "annotations[1]", "same id 1", "image_id 7"]),
        ({"annotations_1_id": "1"}, ["annotations[1]", "same id '1'"]),
        ({"categories_1_id": 1}, ["categories[0] ('cat')", "('dog')", "same id 1"]),
        ({"annotations_0_image_id": "7"}, ["annotations[0].image_id is '7'", "id is 7", "numbers"]),
        ({"images_0_id": "8"}, ["annotations[1].image_id is 8", "id is '8'", "strings"]),
        *(
            ({f"{place}_{field}": value}, [f"{place.replace('_', '[')}].{field} {shown}"])
            for place, field in (
                ("images_0", "id"),
                ("annotations_0", "image_id"),
                ("categories_0", "id"),
            )
            for value, shown in (
                (None, "is None"),
                (True, "is True"),
                (1.5, "is 1.5"),
                (NAN, "is nan"),
                ([1], "is [1]"),
                (..., "is missing"),
            )
        ),
        ({"annotations_0_id": 1.5}, ["annotations[0].id is 1.5", "a whole number or a string"]),
        ({"annotations_0_id": False}, ["annotations[0].id is False"]),
        ({"annotations_0_iscrowd": "0"}, ["annotations[0].iscrowd is '0'", "0 or 1"]),
        ({"annotations_0_iscrowd": 2}, ["annotations[0].iscrowd is 2"]),
        ({"images_0_file_name": ...}, ["images[0].file_name is missing"]),
        ({"images_0_file_name": None}, ["images[0].file_name is None", "the name of a file"]),
        ({"images_0_file_name": " "}, ["images[0].file_name is ' '"]),
        ({"images_0_file_name": ["a"]}, ["images[0].file_name is ['a']"]),
        ({"images_0_height": 0}, ["images[0].height of 'b.png' is 0", "picture's own size"]),
        ({"images_0_width": -5}, ["images[0].width of 'b.png' is -5"]),
        ({"images_0_width": "640"}, ["images[0].width of 'b.png' is '640'"]),
        ({"images_0_width": 6.5}, ["images[0].width of 'b.png' is 6.5"]),
        ({"images_0_width": NAN}, ["images[0].width of 'b.png' is nan"]),
        ({"images_0_width": True}, ["images[0].width of 'b.png' is True"]),
        ({"images_0_width": 10**9}, ["images[0].width of 'b.png' is 1000000000"]),
        ({"images_0_file_name": "a.png"}, ["two images, 'a.png' and 'a.png'", "one picture"]),
        ({"images_0_file_name": "train/a.png"}, ["two images, 'train/a.png' and 'a.png'"]),
    ],
    ids=str,
)
def test_what_cannot_be_told_apart_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    path = merged(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        CocoSource(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"images_0_id": "x", "annotations_1_image_id": "x"},
        {"images_0_id": 8.0, "annotations_1_image_id": 8.0},
        {"annotations_0_id": None, "annotations_1_id": ...},
        {"annotations_0_id": "x"},
        {"annotations_0_category_id": 99},
    ],
    ids=str,
)
def test_ids_of_every_kind_are_fine_if_they_agree(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = CocoSource(merged(tmp_path, **changes))
    assert len(source) == 2
    assert not source.left_out


def test_annotations_of_a_larger_file_are_left_out(tmp_path: Path) -> None:
    source = CocoSource(merged(tmp_path, annotations_1_image_id=77))
    assert source.left_out.counts == {OF_NO_IMAGE: 1, UNANNOTATED: 1}
    assert source.left_out.examples[OF_NO_IMAGE] == "annotations[1] with image_id 77"
    with pytest.raises(ConfigError, match="2 annotations of an image that is not in the file"):
        CocoSource(merged(tmp_path, annotations_0_image_id=5, annotations_1_image_id=6))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("\xff", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", r"the file is \[\]; expected an object"),
        ("null", "the file is None"),
        ('{"annotations": []}', "images is missing; expected a list"),
        ('{"images": {}, "annotations": []}', "images is {}; expected a list"),
        ('{"images": []}', "annotations is missing"),
        ('{"images": [], "annotations": null}', "annotations is None"),
        ('{"images": [5], "annotations": []}', r"images\[0\] is 5; expected an object"),
        ('{"images": [{}], "annotations": []}', r"images\[0\].file_name is missing"),
        ('{"images": [], "annotations": ["x"]}', r"annotations\[0\] is 'x'"),
        ('{"images": [], "annotations": [], "categories": 5}', "categories is 5"),
        ('{"images": [], "annotations": [], "images": []}', "the name 'images' twice"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path, [])
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=f"not a COCO instance file: .*{message}"):
        CocoSource(path)


def test_files_without_annotations_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [])
    with pytest.raises(ConfigError, match="no image with an annotation"):
        CocoSource(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        CocoSource(path)


numbers = st.integers(-60, 60) | st.floats(-60, 60) | st.sampled_from([float("inf"), 1e300])


@hypothesis.given(st.lists(st.lists(numbers, max_size=12), max_size=3))
def test_arbitrary_polygons_give_a_mask_or_an_error(polygons: list[list[float]]) -> None:
    try:
        result, bad_parts = segmentation_to_rle(polygons, list(HW))
    except rle.BadRleError:
        return
    assert rle.decode(rle.run_lengths(result), HW).shape == HW
    assert len(bad_parts) < len(polygons)


ids = st.sampled_from([1, 2, 3, 4, 3.0, "3", "x", 1.5, None, True, ...])
own_number = st.just("its number")
segmentations = st.one_of(
    st.just([BOX_POLYGON]),
    st.just([BOX_POLYGON, BOX_POLYGON]),
    st.just(compress(BOX)),
    st.just({"size": list(HW), "counts": [30, 5, 205]}),
    st.just({"size": list(HW), "counts": "nonsense"}),
    st.just({"size": [5, 5], "counts": [25]}),
    st.sampled_from([None, [], {}, "x", 5, ...]),
    st.lists(st.sampled_from([BOX_POLYGON, *BAD_POLYGONS]), max_size=3),
)


def records(**fields: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with these fields; those drawn as `...` are absent."""
    return st.fixed_dictionaries(fields).map(
        lambda record: {key: value for key, value in record.items() if value is not ...}
    )


def mostly(usual: st.SearchStrategy, odd: st.SearchStrategy) -> st.SearchStrategy:
    return st.integers(0, 99).flatmap(lambda number: odd if number == 0 else usual)


images = records(
    id=mostly(own_number, ids),
    file_name=mostly(
        st.sampled_from(["1.png", "2.png", "./3.png", "sub\\4.png", "5.PNG", "gone.png"]),
        st.sampled_from(["", None, 5, "../1.png", "/", "a" * 300, ...]),
    ),
    height=mostly(st.sampled_from([HW[0], float(HW[0]), None, ...]), st.sampled_from([0, "9", -1])),
    width=mostly(st.sampled_from([HW[1], None, ...]), st.sampled_from([5, NAN, True])),
)
annotations = records(
    id=mostly(st.just(...), ids),
    image_id=mostly(st.sampled_from([1, 2, 3, 4, 5, 6]), ids),
    segmentation=segmentations,
    bbox=st.sampled_from([[3, 2, 8, 5], ...]),
    iscrowd=mostly(st.sampled_from([0, 1, ...]), st.sampled_from([False, None, "1", 7])),
    category_id=mostly(st.just(1), st.sampled_from([None, 9, "cat"])),
)
categories = records(id=mostly(own_number, ids), name=st.just("cat"))


def numbered(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**record, "id": number} if record.get("id") == "its number" else record
        for number, record in enumerate(records, start=1)
    ]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    (folder / "images" / "sub").mkdir(parents=True)
    for name in ("1", "2", "3", "sub/4", "5"):
        (folder / "images" / f"{name}.png").write_bytes(encode_image(gradient_image(HW)))
    return folder


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(
    st.lists(
        images, min_size=1, max_size=5, unique_by=lambda image: str(image.get("file_name"))
    ).map(numbered),
    st.lists(annotations, min_size=1, max_size=8),
    st.lists(categories, max_size=2).map(numbered),
    st.sampled_from(["skip", "keep"]),
)
def test_every_annotation_is_used_or_counted_or_the_file_refused(
    pictures: Path,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    categories: list[dict[str, Any]],
    crowd: Any,
) -> None:
    path = pictures / "train.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    try:
        source = CocoSource(path, crowd=crowd)
    except ConfigError as error:
        message = str(error)
        assert str(path) in message
        # It says which record is wrong, which names clash, or why nothing is left.
        named = r"(images|annotations|categories)\[\d+\]|two images, '|no image with an annotation"
        assert re.search(named, message)
        if "no image with" in message:
            assert sum(map(int, re.findall(r"(\d+) annotations ", message))) == len(annotations)
        return
    left_out = source.left_out.counts
    assert len(source) + left_out[UNANNOTATED] == len(images)
    num_used = num_unusable = num_missing = 0
    reasons = set()
    for index in range(len(source)):
        marked = len(source._images[index].segmentations)
        try:
            sample = source[index]
        except CorruptSampleError as error:
            reasons.add(error.reason)
            num_missing += marked
            continue
        assert len(sample.masks_rle) + len(sample.unusable_masks) == marked
        num_used += len(sample.masks_rle)
        num_unusable += len(sample.unusable_masks)
        assert all(text.startswith("annotations[") for text in sample.unusable_masks)
        check_reported(sample)
    assert reasons <= {"missing image"}
    in_file = left_out[CROWD] + left_out[NO_SEGMENTATION] + left_out[OF_NO_IMAGE]
    assert num_used + num_unusable + num_missing + in_file == len(annotations)
    assert crowd == "skip" or not left_out[CROWD]
    assert left_out.keys() == source.left_out.examples.keys()


def check_reported(sample: Sample) -> None:
    """All masks come into the example, or are counted with a reason."""
    marked = len(sample.masks_rle) + len(sample.unusable_masks)
    transform = TrainTransform((HW[0], 24), max_area_rate=1.0)
    try:
        example, dropped = transform.with_report(sample, np.random.default_rng(0))
    except SkippedSampleError as error:
        counted = re.findall(r"(?:^|; )(\d+) [a-z ]+, e\.g\. ", error.detail)
        assert sum(map(int, counted)) == marked + len(sample.remarks)
    else:
        assert example["mask_valid"].sum() + len(dropped) == marked


def test_the_real_pack(shared_data: Path) -> None:
    folder = shared_data / "permissive" / "coco_ccby"
    source = CocoSource(folder / "val.json")
    assert len(source) == 34
    assert sum(len(source[i].masks_rle) for i in range(34)) == 161
    sample = source[3]
    masks = decode_masks(sample, range(len(sample.masks_rle)))
    assert masks.any(axis=(1, 2)).all()
    assert masks.shape[1:] == decode_image(sample).shape[:2]


def lvis(tmp_path: Path, file: str, **image: Any) -> CocoSource:
    """LVIS annotations of a picture of COCO, which lies as that has it since 2017."""
    path = write(tmp_path, [{"id": 1, "segmentation": [BOX_POLYGON]}], **image)
    (tmp_path / "coco" / file).parent.mkdir(parents=True)
    (tmp_path / "images" / "a.png").rename(tmp_path / "coco" / file)
    return CocoSource(path, tmp_path / "coco")


def test_lvis_v1_names_pictures_by_their_address(tmp_path: Path) -> None:
    url = "http://images.cocodataset.org/val2017/000000397133.jpg"
    path = write(tmp_path, [{"id": 1, "segmentation": [BOX_POLYGON]}])
    content = json.loads(path.read_text())
    for image in content["images"]:
        del image["file_name"]
        image["coco_url"] = url.replace("397133", f"{image['id']:06}")
    path.write_text(json.dumps(content))
    for folder in ("coco/val2017", "coco/train2017"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "images" / "a.png").rename(tmp_path / "coco/val2017/000000000007.jpg")
    for folder in ("coco", "coco/val2017"):
        source = CocoSource(path, tmp_path / folder)
        assert source.file_name(0) == "val2017/000000000007.jpg"
        np.testing.assert_array_equal(decode_masks(source[0], [0]), [BOX])
    content["images"][0]["coco_url"] = ""
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"images\[0\]\.coco_url is ''; expected the address"):
        CocoSource(path)


def test_lvis_v05_has_the_names_of_2014(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "COCO_val2014_000000397133.jpg"
    source = lvis(tmp_path, "000000397133.jpg", file_name=name, coco_url="http://x.org/y/z.jpg")
    assert source.file_name(0) == name
    np.testing.assert_array_equal(decode_masks(source[0], [0]), [BOX])
    assert "file names are not those" not in caplog.text


def test_a_picture_of_the_name_of_2014_is_taken_first(tmp_path: Path) -> None:
    name = "COCO_val2014_000000397133.jpg"
    source = lvis(tmp_path, name, file_name=name)
    (tmp_path / "coco" / "000000397133.jpg").write_bytes(b"another")
    assert source[0].name == str(tmp_path / "coco" / name)


def test_masks_are_counted_without_decoding(tmp_path: Path) -> None:
    source = CocoSource(write(tmp_path, [{"segmentation": [BOX_POLYGON]}, {"segmentation": "x"}]))
    assert source.num_masks(0) == 2
