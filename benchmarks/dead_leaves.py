"""Made-up pictures in SA-1B's layout: a tar of 2,250 x 1,500 JPEGs with some 100 masks each.

The pictures are dead leaves: shapes of all sizes, as many of radius r as 1 / r^3, that hide one
another, each with its own colour and its own strength of 1 / f texture. Edges and spectrum are then
those of photographs, which decides how long a JPEG takes to decode.

Source: Lee, Mumford and Huang, "Occlusion Models for Natural Images", IJCV 2001.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image
from pycocotools import mask as coco_mask

IMAGE_HW = (1500, 2250)
NUM_MASKS = 100
_NUM_LEAVES = 700
_RADII_PX = (25.0, 700.0)
# Every other mask is a leaf with all that lies on it, the rest what is seen of one.
_WHOLE_EVERY = 2
_NUM_CORNERS = 72
_BLUR_SIGMA_PX = 0.7


def write_tar(
    path: Path,
    num_images: int,
    *,
    quality: int = 80,
    image_hw: tuple[int, int] = IMAGE_HW,
    num_masks: int = NUM_MASKS,
) -> None:
    """Writes `num_images` pairs of picture and annotations, a function of their number alone.

    Args:
      path: of the tar.
      num_images: pairs in it.
      quality: of the JPEGs; their chroma has half the resolution, as is usual.
      image_hw: height and width of the pictures.
      num_masks: most masks of a picture.
    """
    with tarfile.open(path, "w") as tar:
        for number in range(num_images):
            image, labels, outlines = draw(image_hw, np.random.default_rng(number))
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=quality)
            _add(tar, f"sa_{number}.jpg", file.getvalue())
            _add(tar, f"sa_{number}.json", annotations(labels, outlines, number, num_masks))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def draw(
    image_hw: tuple[int, int], rng: np.random.Generator
) -> tuple[
    UInt8[np.ndarray, "h w 3"], Int32[np.ndarray, "h w"], list[Int32[np.ndarray, "corners 2"]]
]:
    """A picture (RGB), which leaf each pixel shows, and the leaves' outlines (x, y).

    Leaves count from 1; 0 is the ground.
    """
    h, w = image_hw
    low, high = (radius * min(image_hw) / min(IMAGE_HW) for radius in _RADII_PX)
    # Inverse of the distribution whose density is 1 / r^3.
    radii = (low**-2 + rng.random(_NUM_LEAVES) * (high**-2 - low**-2)) ** -0.5
    # Small leaves lie on large ones more often than below them, and would not be seen otherwise.
    radii = radii[np.argsort(-radii * rng.lognormal(0.0, 0.5, _NUM_LEAVES))]
    labels, outlines = np.zeros(image_hw, np.int32), []
    theta = np.linspace(0, 2 * np.pi, _NUM_CORNERS, endpoint=False)
    waves = np.arange(2, 8)
    for number, radius in enumerate(radii, start=1):
        height = rng.uniform(-0.5, 0.5, waves.size) / waves
        wobble = height @ np.cos(
            waves[:, None] * theta + rng.uniform(0, 2 * np.pi, (waves.size, 1))
        )
        outline = (
            radius * (1 + wobble) * np.stack([np.cos(theta), rng.uniform(0.4, 1) * np.sin(theta)])
        )
        turn = rng.uniform(0, 2 * np.pi)
        cos, sin = np.cos(turn), np.sin(turn)
        outline = np.array([[cos, -sin], [sin, cos]]) @ outline + rng.uniform(0, [[w], [h]])
        outlines.append(np.rint(outline.T).astype(np.int32))
        cv2.fillPoly(labels, outlines[-1:], number)

    colors = rng.uniform(30, 225, (_NUM_LEAVES + 1, 1)) + rng.normal(0, 22, (_NUM_LEAVES + 1, 3))
    strengths = rng.gamma(1.0, 9.0, (_NUM_LEAVES + 1, 1))
    image = colors.astype(np.float32)[labels]
    image += strengths.astype(np.float32)[labels] * _texture(image_hw, rng)[..., None]
    image = cv2.GaussianBlur(image, (0, 0), _BLUR_SIGMA_PX)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), labels, outlines


def _texture(hw: tuple[int, int], rng: np.random.Generator) -> Float32[np.ndarray, "h w"]:
    """Noise whose amplitude falls as 1 / f, of variance one."""
    spectrum = np.fft.rfft2(rng.standard_normal(hw, np.float32))
    frequency = np.hypot(np.fft.fftfreq(hw[0])[:, None], np.fft.rfftfreq(hw[1]))
    # Nothing slower than a dozen periods: a leaf's colour stays its own.
    spectrum /= np.maximum(frequency, 12 / max(hw))
    texture = np.fft.irfft2(spectrum, hw)
    return (texture / texture.std()).astype(np.float32)


def annotations(
    labels: Int32[np.ndarray, "h w"],
    outlines: list[Int32[np.ndarray, "corners 2"]],
    number: int,
    num_masks: int,
) -> bytes:
    """The JSON of picture `number`: its leaves of which most is seen, or fewer if so few are."""
    h, w = labels.shape
    areas = np.bincount(labels.reshape(-1), minlength=len(outlines) + 1)
    areas[0] = 0
    order = np.argsort(-areas)[:num_masks]
    records: list[dict[str, Any]] = []
    for index, leaf in enumerate(order[areas[order] > 0].tolist()):
        mask = (labels == leaf).astype(np.uint8)
        if index % _WHOLE_EVERY == 0:
            cv2.fillPoly(mask, [outlines[leaf - 1]], 1)
        encoded = coco_mask.encode(np.asfortranarray(mask))
        x0, y0, width, height = coco_mask.toBbox(encoded).tolist()
        records.append(
            {
                # As released, boxes are one pixel short.
                "bbox": [x0, y0, width - 1, height - 1],
                "area": int(mask.sum()),
                "segmentation": {"size": [h, w], "counts": encoded["counts"].decode()},
                "predicted_iou": 0.95,
                "point_coords": [[x0, y0]],
                "crop_box": [0.0, 0.0, float(w), float(h)],
                "id": 1000 * number + index,
                "stability_score": 0.97,
            }
        )
    image = {"image_id": number, "width": w, "height": h, "file_name": f"sa_{number}.jpg"}
    return json.dumps({"image": image, "annotations": records}).encode()
