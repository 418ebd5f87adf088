"""Masks of data sets without their images: which readers a path means, and what they give."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from sam_jax import rle
from sam_jax.data.annotation_ids import mask_numbers
from sam_jax.data.mask_stores import open_store
from sam_jax.data.samples import CorruptSampleError
from sam_jax.errors import ConfigError
from sam_jax.mask_shapes import mask_shapes
from tests.unit.data_fixtures import (
    box_mask,
    compress,
    encode_image,
    gradient_image,
    numbered_hw,
    sa1b_files,
    sa1b_json,
    write_coco,
    write_tar,
)


def read_all(store):
    """Size and areas of each image by the last part of its name, read as another process would."""
    found = {}
    for index in range(len(store)):
        image = pickle.loads(pickle.dumps(store.reader(index)))()
        areas = [rle.area_px(rle.run_lengths(mask)) for mask in image.masks_rle]
        found[image.name.rpartition("/")[2]] = (image.hw, areas)
    return found


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


TWO = {
    "sa_3.jpg": (numbered_hw(3), [80, 150]),
    "sa_5.jpg": (numbered_hw(5), [80, 150]),
}


@pytest.mark.parametrize("form", ["tar", "folder of tars", "folder", "pattern"])
def test_sa1b_with_images(tmp_path, form):
    files = sa1b_files([3, 5])
    if form in ("folder", "pattern"):
        write_files(tmp_path / "x", files)
        store = open_store(str(tmp_path / ("x" if form == "folder" else "?")))
    else:
        tar = write_tar(tmp_path / "a.tar", files)
        store = open_store(str(tar if form == "tar" else tmp_path))
        assert store.name == (tar.name if form == "tar" else tmp_path.name)
    found = read_all(store)
    assert {name.rpartition("::")[2]: value for name, value in found.items()} == TWO


@pytest.mark.parametrize("in_tar", [True, False])
def test_no_image_is_read_and_a_missing_json_is_said(tmp_path, in_tar):
    files = sa1b_files([3, 5])
    del files["sa_3.jpg"], files["sa_5.json"]
    if in_tar:
        store = open_store(str(write_tar(tmp_path / "a.tar", files)))
    else:
        write_files(tmp_path / "a", files)
        store = open_store(str(tmp_path / "a"))
    assert store.reader(0)().hw == numbered_hw(3)
    with pytest.raises(CorruptSampleError, match=r"sa_5\.jpg: missing json"):
        store.reader(1)()


def test_a_tar_that_is_cut_short(tmp_path):
    tar = write_tar(tmp_path / "a.tar", sa1b_files([3]))
    store = open_store(str(tar))
    content = tar.read_bytes()
    tar.write_bytes(content[: content.index(b'"annotations"')])
    with pytest.raises(CorruptSampleError, match="truncated tar"):
        store.reader(0)()


def test_one_annotation_file_of_an_image(tmp_path):
    hw = (6, 8)
    path = tmp_path / "sa_1.json"
    path.write_bytes(sa1b_json([box_mask(hw, 0, 1, 0, 1)], 1))
    store = open_store(str(path))
    assert read_all(store) == {"sa_1.json": (hw, [1])}
    assert store.name == f"{tmp_path.name}/sa_1"


def test_what_the_masks_command_writes(tmp_path):
    hw = (6, 8)
    for name in ("a.json", "sub/b.json"):
        write_files(tmp_path / "annotations", {name: sa1b_json([box_mask(hw, 1, 3, 2, 4)], 1)})
    write_files(tmp_path, {"settings.json": b"{}", "coco.json": b"{}", "skipped.txt": b""})
    assert read_all(open_store(str(tmp_path))) == {"a.json": (hw, [4]), "b.json": (hw, [4])}


def test_coco_without_its_images(tmp_path):
    path = write_coco(tmp_path, 2)
    for image in (tmp_path / "images").iterdir():
        image.unlink()
    content = json.loads(path.read_bytes())
    content["annotations"] += [
        {"image_id": 100, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]},
        {"image_id": 101, "segmentation": [[0, 0, 1]]},
        {"image_id": 101, "iscrowd": 1, "segmentation": compress(box_mask((21, 30), 0, 1, 0, 1))},
    ]
    path.write_text(json.dumps(content))
    store = open_store(str(path), "mine")
    assert store.name == "mine"
    assert read_all(store) == {"0.png": ((20, 30), [200, 16]), "1.png": ((21, 30), [200])}
    assert len(store.reader(1)().unusable) == 1
    assert store.left_out.total() == 1
    kept = open_store(f"kind=coco,path={path},crowd=keep")
    assert read_all(kept)["1.png"] == ((21, 30), [200, 1])


def test_coco_sizes_come_from_run_lengths_where_nothing_else_says_them(tmp_path):
    path = write_coco(tmp_path, 1)
    content = json.loads(path.read_bytes())
    del content["images"][0]["height"]
    content["annotations"].append({"image_id": 100, "segmentation": [[0, 0, 4, 0, 4, 4]]})
    path.write_text(json.dumps(content))
    image = open_store(str(path)).reader(0)()
    assert image.hw == (20, 30)
    assert len(image.masks_rle) == len(image.unusable) == 1


@pytest.mark.parametrize("spec", ["folder", "kind"])
def test_folders_of_masks(tmp_path, spec):
    hw = (9, 7)
    write_files(tmp_path / "images", {"cat.png": encode_image(gradient_image(hw))})
    (tmp_path / "masks").mkdir()
    labels = np.zeros(hw, np.uint8)
    labels[2:4, 1:6], labels[6:, :2] = 1, 2
    Image.fromarray(labels).save(tmp_path / "masks" / "cat.png")
    given = str(tmp_path)
    if spec == "kind":
        given = f"kind=mask_folder,path={tmp_path}/images,masks={tmp_path}/masks,ignore_labels=2+9"
    expected = [10, 6] if spec == "folder" else [10]
    assert read_all(open_store(given)) == {"cat.png": (hw, expected)}


def test_made_up_images_are_a_store_too():
    store = open_store("kind=synthetic,num_images=2,image_size=40+50,num_objects=1+3")
    assert len(store) == 2
    assert store.reader(1)().hw == (40, 50)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("kind=coco,path", "found 'path'"),
        ("kind=synthetic,num_images=two", "num_images is 'two'"),
        ("kind=synthetic,image_size=3x4", "image_size is '3x4'"),
        ("kind=label_maps,components=yes", "components is 'yes'; expected true or false"),
        ("kind=coco,paht=x", "did you mean 'path'"),
        ("{folder}", "no image with annotations"),
        ("{folder}/x.json", "is not a COCO instance file"),
    ],
)
def test_what_is_no_store_is_refused(tmp_path, given, message):
    (tmp_path / "x.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    folder = tmp_path / "empty" if given == "{folder}" else tmp_path
    with pytest.raises(ConfigError, match=message):
        open_store(given.format(folder=folder))


def test_a_coco_file_in_a_folder_of_sa1b_is_not_one_image(tmp_path):
    write_coco(tmp_path / "x", 2)
    store = open_store(str(tmp_path / "x"))
    reasons = []
    for index in range(len(store)):
        with pytest.raises(CorruptSampleError) as error:
            store.reader(index)()
        reasons.append(error.value.reason)
    assert sorted(reasons) == ["malformed json", "missing json", "missing json"]


def test_numbers_of_masks_by_annotation_id(tmp_path):
    path = write_coco(tmp_path, 2)
    content = json.loads(path.read_bytes())
    hw = numbered_hw(1)
    good, empty, other = (
        compress(mask) for mask in (box_mask(hw, 0, 2, 0, 2), np.zeros(hw, bool), np.eye(4) > 0)
    )
    for own_id, mask in (("a", [[0, 0]]), (7, empty), (8, other), ("c", good), (None, good)):
        content["annotations"].append({"id": own_id, "image_id": 101, "segmentation": mask})
    path.write_text(json.dumps(content))
    assert mask_numbers(path) == {"0.png": {"0": 0}, "1.png": {"1": 0, "c": 1}}


def test_kinds_whose_options_are_several_words(tmp_path):
    hw = (9, 7)
    write_files(tmp_path / "images", {"cat.png": encode_image(gradient_image(hw))})
    square = [[1, 1], [4, 1], [4, 4], [1, 4]]
    shapes = [
        {"label": label, "points": square, "shape_type": "polygon"}
        for label in ("cat", "void", "sky")
    ]
    drawn = {"imagePath": "cat.png", "imageHeight": 9, "imageWidth": 7, "shapes": shapes}
    write_files(tmp_path / "json", {"cat.json": json.dumps(drawn).encode()})
    given = f"kind=polygons,path={tmp_path}/json,form=labelme,skip_labels=void+sky"
    assert read_all(open_store(given)) == {"cat.png": (hw, [9])}


def test_released_annotations_are_what_their_files_say(shared_data):
    path = shared_data / "sa1b" / "sa_226381_partial.json"
    image = open_store(str(path)).reader(0)()
    shapes = mask_shapes(rle.run_lengths_of_all(image.masks_rle), image.hw)
    annotations = json.loads(path.read_bytes())["annotations"]
    assert shapes.area_px.tolist() == [annotation["area"] for annotation in annotations]
    for (x, y), annotation in zip(shapes.center_xy, annotations, strict=True):
        # Boxes there are one pixel short.
        left, top, width, height = annotation["bbox"]
        assert left < x < left + width + 1
        assert top < y < top + height + 1
