import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_jax.data.samples import CorruptSampleError, decode_masks
from sam_jax.data.sources.listed_images import PART_LEFT_OUT, UNANNOTATED
from sam_jax.data.sources.polygon_files import NO_POLYGON, SKIPPED_LABEL
from sam_jax.data.sources.polygons import PolygonSource
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import box_mask, encode_image, gradient_image

HW = (12, 20)
BOX = box_mask(HW, 2, 7, 3, 11)
OTHER = box_mask(HW, 8, 11, 14, 19)
POINTS = [[3, 2], [11, 2], [11, 7], [3, 7]]
OTHER_POINTS = [[14.0, 8.0], [19.0, 8.0], [19.0, 11.0], [14.0, 11.0]]
TRIANGLE_WITHOUT_POINTS = [[1, 2], [3, 4]]


def add_images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode_image(gradient_image(HW)))
    return folder


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def via_region(points: list[list[float]], **attributes: str) -> dict[str, Any]:
    xs, ys = zip(*points, strict=True)
    shape = {"name": "polygon", "all_points_x": xs, "all_points_y": ys}
    return {"shape_attributes": shape, "region_attributes": attributes}


def via(*regions: Any) -> dict[str, Any]:
    return {
        "a.png123": {"filename": "a.png", "size": 123, "regions": list(regions)},
        "b.png123": {"filename": "b.png", "size": 123, "regions": []},
    }


def labelme(*shapes: Any) -> dict[str, Any]:
    return {"imagePath": "a.png", "imageHeight": HW[0], "imageWidth": HW[1], "shapes": list(shapes)}


def visor(*entities: Any) -> dict[str, Any]:
    image = {"name": "P01_107_frame_0001.png", "image_path": "elsewhere/x.png"}
    return {"video_annotations": [{"image": image, "annotations": list(entities)}]}


def woodscape(*annotations: Any, key: str = "00000_FV.json") -> dict[str, Any]:
    record = {"image_height": HW[0], "image_width": HW[1], "annotation": list(annotations)}
    return {key: record}


def write_via(folder: Path) -> PolygonSource:
    rectangle = {"shape_attributes": {"name": "rect", "x": 1}, "region_attributes": {}}
    content = via(via_region(POINTS), rectangle, via_region(OTHER_POINTS, kind="void"))
    path = save(folder / "labels.json", content)
    return PolygonSource(path, "via", add_images(folder / "pictures", "a.png"))


def write_labelme(folder: Path) -> PolygonSource:
    shapes = [
        {"label": "car", "points": POINTS, "shape_type": "polygon"},
        {"label": "dot", "points": [[1, 1]], "shape_type": "point"},
        {"label": "void", "points": OTHER_POINTS},
    ]
    save(folder / "images" / "a.json", labelme(*shapes))
    return PolygonSource(folder / "images", "labelme", add_images(folder / "images", "a.png"))


def write_visor(folder: Path) -> PolygonSource:
    entities = [
        {"name": "left hand", "segments": [POINTS, []]},
        {"name": "nothing", "segments": [[]]},
        {"name": "void", "segments": [OTHER_POINTS]},
    ]
    save(folder / "val" / "P01_107.json", visor(*entities))
    images = add_images(folder / "frames", "P01/P01_107/P01_107_frame_0001.png")
    return PolygonSource(folder / "val", "visor", images)


def write_woodscape(folder: Path) -> PolygonSource:
    annotations = [
        {"tags": ["car"], "segmentation": POINTS},
        {"tags": ["void"], "segmentation": OTHER_POINTS},
    ]
    save(folder / "instances" / "00000_FV.json", woodscape(*annotations))
    images = add_images(folder / "rgb_images", "00000_FV.png")
    return PolygonSource(folder / "instances", "woodscape", images)


@pytest.mark.parametrize(
    ("write", "counts"),
    [
        (write_via, {NO_POLYGON: 1, UNANNOTATED: 1}),
        (write_labelme, {NO_POLYGON: 1}),
        (write_visor, {NO_POLYGON: 1}),
        (write_woodscape, {}),
    ],
)
def test_each_form_gives_its_polygons(
    write: Callable[[Path], PolygonSource], counts: dict[str, int], tmp_path: Path
) -> None:
    source = write(tmp_path)
    assert len(source) == 1
    assert source.num_masks(0) == 2
    np.testing.assert_array_equal(decode_masks(source[0], range(2)), [BOX, OTHER])
    assert source[0].unusable_masks == source[0].remarks == ()
    assert source.left_out.counts == counts


def test_labelme_names_pictures_from_the_folder_of_each_file(tmp_path: Path) -> None:
    """Pictures of one name in two folders, and one of a folder beside."""
    shape = {"label": "car", "points": POINTS, "shape_type": "polygon"}
    for folder, picture in (("v1", "a.png"), ("v2", "a.png"), ("json", "../v2/b.png")):
        content = labelme(shape) | {"imagePath": picture}
        save(tmp_path / folder / f"{Path(picture).stem}.json", content)
    for folder, names in (("v1", ["a.png"]), ("v2", ["a.png", "b.png"])):
        add_images(tmp_path / folder, *names)
    source = PolygonSource(tmp_path, "labelme", tmp_path)
    names = sorted(
        Path(source[i].name).relative_to(tmp_path).as_posix() for i in range(len(source))
    )
    assert names == ["v1/a.png", "v2/a.png", "v2/b.png"]


def test_shapes_of_a_group_are_one_object_of_labelmes(tmp_path: Path) -> None:
    shapes = [
        {"label": "car", "points": POINTS, "group_id": 1},
        {"label": "car", "points": OTHER_POINTS, "group_id": 1},
        {"label": "tree", "points": POINTS, "group_id": 1},
        {"label": "car", "points": POINTS, "group_id": None},
        {"label": "car", "points": POINTS},
    ]
    save(tmp_path / "a.json", labelme(*shapes))
    sample = PolygonSource(tmp_path, "labelme", add_images(tmp_path, "a.png"))[0]
    both, *others = decode_masks(sample, range(len(sample.masks_rle)))
    assert len(others) == 3
    first = others[0]
    assert (both >= first).all()
    assert both.sum() > first.sum()
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("write", [write_via, write_labelme, write_visor, write_woodscape])
def test_a_missing_picture_is_told_when_it_is_due(
    write: Callable[[Path], PolygonSource], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path)
    for picture in tmp_path.rglob("*.png"):
        picture.unlink()
    source = write.__globals__["PolygonSource"]
    form = write.__name__.removeprefix("write_")
    path, images = {
        "via": ("labels.json", "pictures"),
        "labelme": ("images", "images"),
        "visor": ("val", "frames"),
        "woodscape": ("instances", "rgb_images"),
    }[form]
    found = source(tmp_path / path, form, tmp_path / images)
    assert "1 of 1 pictures are not in" in caplog.text
    with pytest.raises(CorruptSampleError, match="missing image"):
        found[0]


def test_skipped_labels_are_counted(tmp_path: Path) -> None:
    for write in (write_via, write_labelme, write_visor, write_woodscape):
        folder = tmp_path / write.__name__
        write(folder)
        source = PolygonSource(
            next(iter(folder.rglob("*.json"))),
            write.__name__.removeprefix("write_"),  # type: ignore[arg-type]
            next(iter(folder.rglob("*.png"))).parent,
            skip_labels=("void",),
        )
        assert source.left_out.counts[SKIPPED_LABEL] == 1
        np.testing.assert_array_equal(decode_masks(source[0], [0]), [BOX])


def test_bad_polygons_cost_themselves_only(tmp_path: Path) -> None:
    bad: list[Any] = [TRIANGLE_WITHOUT_POINTS, "x", [[1, 2, 3]] * 3, [[0, 0], [1e9, 0], [3, 3]]]
    entities = [{"name": "cup", "segments": [polygon]} for polygon in bad]
    entities.append({"name": "hand", "segments": [POINTS, TRIANGLE_WITHOUT_POINTS]})
    save(tmp_path / "val" / "P01_107.json", visor(*entities))
    add_images(tmp_path / "images", "P01_107_frame_0001.png")
    sample = PolygonSource(tmp_path / "val", "visor")[0]
    np.testing.assert_array_equal(decode_masks(sample, [0]), [BOX])
    assert len(sample.unusable_masks) == len(bad)
    assert sample.unusable_masks[0].startswith(
        "P01_107.json: video_annotations[0].annotations[0]: "
    )
    ((reason, detail),) = sample.remarks
    assert reason == PART_LEFT_OUT
    assert "part 2 of 2" in detail


def test_projects_and_first_versions_of_via(tmp_path: Path) -> None:
    images = add_images(tmp_path / "images", "a.png")
    numbered = {"filename": "a.png", "regions": {"0": via_region(POINTS)}}
    project = {"_via_settings": {}, "_via_img_metadata": via(via_region(POINTS))}
    for content in ({"a.png1": numbered}, project):
        source = PolygonSource(save(tmp_path / "via.json", content), "via", images)
        np.testing.assert_array_equal(decode_masks(source[0], [0]), [BOX])


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("via", {"a": {"regions": []}}, "the entry 'a'.filename is missing"),
        ("via", {"a": {"filename": "a.png"}}, "regions is missing"),
        ("via", via({"shape_attributes": {"all_points_x": [1]}}), "as many values"),
        ("via", via({"shape_attributes": None}), "shape_attributes is None"),
        ("via", {"a": 3}, "the entry 'a' is 3"),
        ("via", [], r"the file is \[\]"),
        ("labelme", {"shapes": []}, "imagePath is missing"),
        ("labelme", {"imagePath": "a.png"}, "shapes is missing"),
        ("labelme", {**labelme(), "imageHeight": 0}, "imageHeight of 'a.png' is 0"),
        ("visor", {"annotations": []}, "video_annotations is missing"),
        ("visor", {"video_annotations": [{"annotations": []}]}, "image is None"),
        ("visor", visor({"name": "cup"}), r"annotations\[0\].segments is missing"),
        ("woodscape", woodscape(key="00001_FV.json"), "'x.json' is None"),
        ("woodscape", woodscape({"segmentation": POINTS}, key="x.json"), "tags is missing"),
    ],
)
def test_other_files_are_refused_with_the_place(
    tmp_path: Path, form: Any, content: Any, message: str
) -> None:
    (tmp_path / "images").mkdir()
    path = save(tmp_path / "x.json", content)
    with pytest.raises(ConfigError, match=message) as caught:
        PolygonSource(path, form)
    assert f"{path} is not of the form {form!r}" in str(caught.value)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    with pytest.raises(ConfigError, match=r"no JSON in .*empty"):
        PolygonSource(tmp_path / "empty", "visor")
    with pytest.raises(FileNotFoundError):
        PolygonSource(tmp_path / "none.json", "visor")
    path = save(tmp_path / "x.json", via(via_region(POINTS)))
    with pytest.raises(FileNotFoundError, match="images="):
        PolygonSource(path, "via", tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no image with an annotation to use"):
        PolygonSource(save(tmp_path / "y.json", via()), "via")


def test_an_image_of_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(tmp_path / "labels" / f"{name}.json", via(via_region(POINTS)))
    add_images(tmp_path / "images", "a.png")
    with pytest.raises(ConfigError, match=r"two\.json .*the image 'a\.png' stands in it, or befor"):
        PolygonSource(tmp_path / "labels", "via")
