"""Images in BSDS500's layout, and a predictor whose edges are known."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image
from scipy.io import savemat

from sam_jax.inference.images import ImageEmbeddings
from sam_jax.inference.predictor import Buckets, PointBatch, Predictor

SIZE_HW = (48, 64)


def write_annotations(path: Path, boundaries: list[np.ndarray]) -> None:
    cells = np.empty((1, len(boundaries)), object)
    for number, marked in enumerate(boundaries):
        cells[0, number] = {"Segmentation": marked.astype(np.uint16), "Boundaries": marked}
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"groundTruth": cells})


def rectangle(box: tuple[int, int, int, int], size_hw: tuple[int, int] = SIZE_HW) -> np.ndarray:
    """The pixels of a rectangle, given by its edges."""
    x0, y0, x1, y1 = box
    mask = np.zeros(size_hw, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def outline(box: tuple[int, int, int, int]) -> np.ndarray:
    """The outermost pixels of a rectangle."""
    x0, y0, x1, y1 = box
    return rectangle(box) & ~rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1))


def write_example(folder: Path, name: str, box: tuple[int, int, int, int], split: str = "") -> None:
    """A white rectangle on black, which two annotators outlined and a third overlooked."""
    pixels = np.repeat(rectangle(box)[..., None] * np.uint8(255), 3, axis=2)
    path = folder / "images" / split / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    marked = outline(box).astype(np.uint8)
    write_annotations(
        folder / "groundTruth" / split / f"{name}.mat", [marked, marked, np.zeros_like(marked)]
    )


class BrightnessPredictor(Predictor):
    """Answers each point with what is white, with what is black, and with nothing.

    It believes in these in this order. Its logits have the image's resolution.
    """

    logit = 8.0

    def __init__(self) -> None:
        self._images: list[np.ndarray] = []

    @property
    def num_devices(self) -> int:
        return 1

    def fingerprint(self) -> str:
        return "bright"

    def with_variables(self, variables):
        return self

    def embed(self, images):
        self._images = list(images)
        sizes = np.array([image.shape[:2] for image in images])
        return ImageEmbeddings(
            jnp.zeros((len(images), 1, 1, 1)), sizes, sizes, (int(sizes[0, 0]), int(sizes[0, 1]))
        )

    def predict_points(self, embeddings, points, *, points_per_batch, iou_threshold):
        for image, pixels in enumerate(self._images):
            is_white = pixels[..., 0] > 127
            logits = self.logit * np.stack([2.0 * is_white - 1, 1 - 2.0 * is_white])
            logits = np.concatenate([logits, np.full((1, *is_white.shape), -self.logit)])
            for first in range(0, len(points[image]), points_per_batch):
                numbers = np.arange(len(points[image]))[first : first + points_per_batch]
                yield PointBatch(
                    images=np.full(3 * len(numbers), image),
                    points=np.repeat(numbers, 3),
                    iou_predictions=np.tile(np.float32([0.9, 0.5, -0.1]), len(numbers)),
                    low_res_logits=np.tile(logits, (len(numbers), 1, 1)).astype(np.float32),
                )


BUCKETS = Buckets((1,), (1,), (1,), (1,))
