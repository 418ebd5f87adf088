"""The paper's data sets with one made-up image for each part, laid out as the registry says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam_jax.evaluation.zero_shot_sets import ZeroShotSet
from tests.unit.data_fixtures import box_mask, compress, gradient_image

HW = (12, 20)
# Apart, so that connected pieces are the same objects.
MASKS = (box_mask(HW, 1, 11, 1, 6), box_mask(HW, 1, 11, 12, 19))
POLYGONS = tuple(
    [[int(x), int(y)] for x, y in ((x0, 1), (x1, 1), (x1, 11), (x0, 11))]
    for x0, x1 in ((1, 6), (12, 19))
)
# What stands for each star of a path in the registry: names as the published files have them.
_FILES = {
    "PPDLS": "Ara2012/plant001_rgb.png",
    "DOORS": "0001.png",
    "TimberSeg": "0001.png",
    "LVIS": "000000397133.jpg",
    "ZeroWaste-f": "01_frame_000000.PNG",
    "ADE20K": "cultural/apse/ADE_val_00000001.jpg",
    "OVIS": "0a1b2c3d/img_0000001.jpg",
    "VISOR": "P01/P01_107/P01_107_frame_0000000123.jpg",
    "EgoHOS": "ego4d_0001.jpg",
    "IBD": "0001.png",
    "WoodScape": "00000_FV.png",
    "Cityscapes": "ulm/ulm_000000_000019_leftImg8bit.png",
    "DRAM": "realism/someone/1.jpg",
}


def write_set(one: ZeroShotSet, folder: Path) -> Path:
    """Writes an image with ``MASKS`` for each part of a set; returns the set's own folder."""
    root = folder / one.name
    for number, part in enumerate(one.parts):
        name = _FILES.get(one.name, f"{number}.jpg")
        _WRITERS[part["kind"]](root, part, name)
    return root


def _write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(gradient_image(HW)).save(path)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _coco(root: Path, part: Mapping[str, Any], name: str) -> None:
    _write_image(root / part["images"] / name)
    listed = f"COCO_val2014_{name}" if root.name == "LVIS" else name
    image = {"id": 1, "file_name": listed, "height": HW[0], "width": HW[1]}
    annotations = [
        {"id": number, "image_id": 1, "category_id": 1, "segmentation": compress(mask)}
        for number, mask in enumerate(MASKS)
    ]
    _write_json(root / part["path"], {"images": [image], "annotations": annotations})


def _video_coco(root: Path, part: Mapping[str, Any], name: str) -> None:
    _write_image(root / part["images"] / name)
    video = {"id": 1, "file_names": [name], "height": HW[0], "width": HW[1]}
    annotations = [
        {"id": number, "video_id": 1, "iscrowd": 0, "segmentations": [compress(mask)]}
        for number, mask in enumerate(MASKS)
    ]
    _write_json(root / part["path"], {"videos": [video], "annotations": annotations})


def _polygons(root: Path, part: Mapping[str, Any], name: str) -> None:
    _write_image(root / part["images"] / name)
    path = root / part["path"]
    if part["form"] == "via":
        shapes = [
            {
                "name": "polyline",
                "all_points_x": [x for x, _ in p],
                "all_points_y": [y for _, y in p],
            }
            for p in POLYGONS
        ]
        regions = [{"shape_attributes": shape, "region_attributes": {}} for shape in shapes]
        _write_json(path, {f"{name}1": {"filename": name, "size": 1, "regions": regions}})
    elif part["form"] == "visor":
        frame = name.rsplit("/", maxsplit=1)[-1]
        entities = [{"id": str(n), "name": "cup", "segments": [p]} for n, p in enumerate(POLYGONS)]
        record = {"image": {"name": frame, "image_path": frame}, "annotations": entities}
        _write_json(path / "P01_107.json", {"video_annotations": [record]})
    else:
        file = f"{Path(name).stem}.json"
        annotations = [{"tags": ["car"], "segmentation": polygon} for polygon in POLYGONS]
        record = {"image_height": HW[0], "image_width": HW[1], "annotation": annotations}
        _write_json(path / file, {file: record})


def _label_maps(root: Path, part: Mapping[str, Any], name: str) -> None:
    image_suffix = part.get("image_suffix", Path(name).suffix)
    stem = name.removesuffix(image_suffix)
    _write_image(root / part["path"] / name)
    labels = MASKS[0] * 1 + MASKS[1] * 2
    for suffix in part.get("mask_suffixes", (".png",)):
        if part.get("encoding") == "ade20k":
            # Red and green hold the class, of which both objects are; a part is empty here.
            is_part = "parts" in suffix
            blue = labels * (not is_part)
            pixels = np.stack([(blue > 0) * 40, (blue > 0) * 7, blue], axis=-1).astype(np.uint8)
        elif part.get("encoding") == "cityscapes":
            pixels = np.where(labels > 0, 26_000 + labels, 0).astype(np.uint16)
        elif part.get("background") == -1:
            pixels = labels - 1
        else:
            pixels = (labels * (1 if not part.get("components") else 100)).astype(np.uint8)
        masks = root / part.get("masks", part["path"])
        path = masks / f"{stem}{suffix.replace('*', '1')}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, pixels)
        else:
            Image.fromarray(pixels).save(path)


def _image_folders(root: Path, part: Mapping[str, Any], name: str) -> None:
    stem = Path(name).stem
    folder = root / part["path"] / stem
    _write_image(folder / "images" / f"{stem}.png")
    (folder / "masks").mkdir()
    for number, mask in enumerate(MASKS):
        Image.fromarray((mask * 255).astype(np.uint8)).save(folder / "masks" / f"{number}.png")


_WRITERS = {
    "coco": _coco,
    "video_coco": _video_coco,
    "polygons": _polygons,
    "label_maps": _label_maps,
    "image_folders": _image_folders,
}
