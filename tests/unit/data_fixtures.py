"""Small data sets on disk, in the forms that users have them in."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from sam_jax.data.samples import Sample


def box_mask(hw: tuple[int, int], y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    """A filled rectangle: bool [h, w]."""
    mask = np.zeros(hw, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def compress(mask: np.ndarray) -> dict[str, Any]:
    """The compressed RLE of a mask as it stands in a JSON, by pycocotools."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def encode_image(image: np.ndarray, kind: str = "PNG") -> bytes:
    """The file an array [h, w, ...] is stored as."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def gradient_image(hw: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3], a different colour everywhere."""
    y, x = np.mgrid[: hw[0], : hw[1]]
    return np.stack([(3 * y) % 256, (5 * x) % 256, (y + x) % 256], axis=-1).astype(np.uint8)


def make_sample(masks: Sequence[np.ndarray], **changes: Any) -> Sample:
    """A sample with these masks and an image of their size."""
    fields: dict[str, Any] = {
        "image": encode_image(gradient_image(masks[0].shape)),
        "masks_rle": tuple(compress(mask) for mask in masks),
        "dataset": "made",
        "name": "made.png",
    }
    return Sample(**{**fields, **changes})


def numbered_hw(number: int) -> tuple[int, int]:
    """The size of image `number`, which tells it from the others."""
    return 20 + number, 30


def write_coco(folder: Path, count: int) -> Path:
    """`count` images of size `numbered_hw(i)` with one mask each; returns the JSON."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        h, w = numbered_hw(i)
        name = f"{i}.png"
        (folder / "images" / name).write_bytes(encode_image(gradient_image((h, w))))
        images.append({"id": 100 + i, "file_name": name, "height": h, "width": w})
        rle = compress(box_mask((h, w), 2, 12, 3, 23))
        annotations.append({"id": i, "image_id": 100 + i, "segmentation": rle, "iscrowd": 0})
    path = folder / "train.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def sa1b_json(masks: Sequence[np.ndarray], image_id: int) -> bytes:
    """The annotation file of an SA-1B image, boxes one pixel short as released."""
    h, w = masks[0].shape
    annotations = []
    for number, mask in enumerate(masks):
        y, x = np.nonzero(mask)
        box = [int(x.min()), int(y.min()), int(np.ptp(x)), int(np.ptp(y))]
        annotations.append(
            {
                # The release has both kinds of box.
                "bbox": [float(v) for v in box] if number % 2 else box,
                "area": int(mask.sum()),
                "segmentation": compress(mask),
                "predicted_iou": 0.95,
                "point_coords": [[float(x[0]), float(y[0])]],
                "crop_box": [0.0, 0.0, float(w), float(h)],
                "id": number,
                "stability_score": 0.97,
            }
        )
    image = {"image_id": image_id, "width": w, "height": h, "file_name": f"sa_{image_id}.jpg"}
    return json.dumps({"image": image, "annotations": annotations}).encode()


def sa1b_pair(number: int) -> tuple[bytes, bytes]:
    """A jpg and its json, of size `numbered_hw(number)`, with two masks."""
    hw = numbered_hw(number)
    masks = [box_mask(hw, 1, 9, 2, 12), box_mask(hw, 5, 15, 10, 25)]
    return encode_image(gradient_image(hw), "JPEG"), sa1b_json(masks, number)


def sa1b_files(numbers: Sequence[int], folder: str = "") -> dict[str, bytes]:
    """The files of these pairs, by their path."""
    files = {}
    for number in numbers:
        files[f"{folder}sa_{number}.jpg"], files[f"{folder}sa_{number}.json"] = sa1b_pair(number)
    return files


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """An uncompressed tar of these files, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
