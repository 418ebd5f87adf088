"""Digests of truth: other ones for corrected files, the same ones for copies."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_jax.data.config import SourceConfig, build_source
from sam_jax.data.truth_digest import files_digest, truth_digest
from tests.unit.data_fixtures import (
    box_mask,
    encode_image,
    gradient_image,
    sa1b_files,
    write_coco,
    write_tar,
)

HW = (20, 30)


def picture() -> bytes:
    return encode_image(gradient_image(HW))


def mask(value: int = 255, y0: int = 2) -> bytes:
    return encode_image(box_mask(HW, y0, 12, 3, 23).astype(np.uint8) * value)


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def panoptic(root: Path) -> None:
    ids = np.zeros((*HW, 3), np.uint8)
    ids[2:9, 3:20, 0] = 7
    segment = {"id": 7, "category_id": 1, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": [segment]}],
        "categories": [{"id": 1, "name": "thing", "isthing": 1}],
    }
    write(root, {"images/a.png": picture(), "val/a.png": encode_image(ids)})
    (root / "val.json").write_text(json.dumps(content))


def polygons(root: Path) -> None:
    shape = {"label": "a", "points": [[2, 2], [9, 2], [9, 9]], "shape_type": "polygon"}
    said = {"imagePath": "a.png", "imageHeight": 20, "imageWidth": 30, "shapes": [shape]}
    write(root, {"images/a.png": picture(), "json/a.json": json.dumps(said).encode()})


# By kind: what writes the data set, its options, and the file of it that is corrected.
KINDS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "coco": (lambda root: write_coco(root, 2), {"path": "train.json"}, "train.json"),
    "panoptic": (panoptic, {"path": "val.json"}, "val/a.png"),
    "polygons": (
        polygons,
        {"path": "json", "images": "images", "form": "labelme"},
        "json/a.json",
    ),
    "mask_folder": (
        lambda root: write(root, {"images/a.png": picture(), "masks/a.png": mask()}),
        {"path": "images", "masks": "masks"},
        "masks/a.png",
    ),
    "label_maps": (
        lambda root: write(root, {"images/a.jpg": picture(), "masks/a.png": mask()}),
        {"path": "images", "masks": "masks"},
        "masks/a.png",
    ),
    "image_folders": (
        lambda root: write(root, {"a/images/a.png": picture(), "a/masks/0.png": mask()}),
        {"path": "."},
        "a/masks/0.png",
    ),
    "sa1b": (lambda root: write(root, sa1b_files([1, 2])), {"path": "."}, "sa_1.json"),
    "images": (lambda root: write(root, {"a.png": picture()}), {"path": "."}, "a.png"),
}


def corrected(path: Path) -> None:
    """Changes a file, in a way that leaves the data set readable."""
    if path.suffix == ".json":
        text = path.read_text()
        # Of a polygon a coordinate, of run lengths the end.
        changed = text.replace("[9, 9]", "[9, 8]").replace('"counts": "', '"counts": "0')
        assert changed != text
        path.write_text(changed)
    else:
        path.write_bytes(mask(y0=5))


@pytest.mark.parametrize("kind", KINDS)
def test_corrections_show_and_copies_do_not(tmp_path: Path, kind: str) -> None:
    writes, options, corrected_file = KINDS[kind]
    (tmp_path / "here").mkdir()
    writes(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")

    def digest(folder: str) -> str:
        places = {
            name: str(tmp_path / folder / value) if name in ("path", "images", "masks") else value
            for name, value in options.items()
        }
        source = build_source(SourceConfig.from_dict({"kind": kind, **places}))
        return truth_digest(source, range(len(source)))

    assert digest("here") == digest("there")
    corrected(tmp_path / "there" / corrected_file)
    assert digest("here") != digest("there")


def test_only_the_samples_in_use_count(tmp_path: Path) -> None:
    write(tmp_path, sa1b_files([1, 2]))
    source = build_source(SourceConfig("sa1b", str(tmp_path)))
    chosen = [0], [1], [0, 1], [1, 0]
    before = [truth_digest(source, indices) for indices in chosen]
    assert len(set(before)) == 4
    corrected(tmp_path / "sa_2.json")
    after = [truth_digest(source, indices) for indices in chosen]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True] + 3 * [False]


@pytest.mark.parametrize("kind", ["sa1b", "images"])
def test_tars_and_folders_of_the_same_files_are_alike(tmp_path: Path, kind: Any) -> None:
    files = sa1b_files([1, 2])
    write(tmp_path / "folder", files)
    tar = write_tar(tmp_path / "a.tar", files)
    found = []
    for path in (tar, tmp_path / "folder"):
        source = build_source(SourceConfig(kind, str(path)))
        found.append(truth_digest(source, range(len(source))))
    assert found[0] == found[1]


def test_parts_and_shares_are_those_of_their_sources(tmp_path: Path) -> None:
    path = write_coco(tmp_path, 4)
    part = {"kind": "coco", "path": str(path)}

    def digests() -> list[str]:
        configs = [SourceConfig("joined", parts=(part,)), SourceConfig(**part, share=(0.0, 0.5))]
        sources = [build_source(config) for config in configs]
        return [truth_digest(source, range(len(source))) for source in sources]

    before = digests()
    corrected(path)
    for old, new in zip(before, digests(), strict=True):
        assert old != new


def test_truth_that_cannot_be_read_has_a_digest(tmp_path: Path) -> None:
    write(tmp_path, sa1b_files([1]))
    source = build_source(SourceConfig("sa1b", str(tmp_path)))
    before = truth_digest(source, [0])
    (tmp_path / "sa_1.json").unlink()
    assert truth_digest(source, [0]) != before


def test_generated_data_have_one_of_nothing() -> None:
    first, second = (
        build_source(SourceConfig("synthetic", num_images=2, image_size=(32, 48), seed=seed))
        for seed in (0, 1)
    )
    assert truth_digest(first, range(2)) == truth_digest(second, range(2))


def test_files_by_name_and_content(tmp_path: Path) -> None:
    write(tmp_path, {"a/x": b"1", "b/x": b"1", "b/y": b"1", "c/x": b"2"})
    named = [files_digest([tmp_path / name]) for name in ("a/x", "b/x", "b/y", "c/x", "none")]
    assert named[0] == named[1]
    assert len(set(named)) == 4
