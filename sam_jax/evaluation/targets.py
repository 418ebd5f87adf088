"""Target masks: what a model is to find in the images that it is evaluated on, in batches.

Embeddings are made once per image; clicks, masks and scores live on the host at each image's own
resolution.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import cv2
import numpy as np

from sam_jax.arrays import Bool, Float, UInt8
from sam_jax.errors import UserError
from sam_jax.inference.images import ImageEmbeddings
from sam_jax.inference.predictor import Prediction, Predictor
from sam_jax.inference.prompts import Prompt


class NotFiniteError(UserError):
    """A model answers with logits that are no numbers; the message says for which mask."""


@dataclasses.dataclass(frozen=True, eq=False)
class EvalImage:
    """An image with the masks that are to be found in it.

    Attributes:
      dataset: which dataset it belongs to.
      name: its name there.
      pixels: RGB, or other channels of the model, at the original size.
      masks: ground truth at the original size; none is empty.
      mask_indices: which of the sample's masks those are.
      number: of its example in the evaluation.
    """

    dataset: str
    name: str
    pixels: UInt8[np.ndarray, "oh ow 3"] | Float[np.ndarray, "oh ow c"]
    masks: Bool[np.ndarray, "k oh ow"]
    mask_indices: tuple[int, ...]
    number: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class TargetMask:
    """One mask of an image, by its position in ``image.masks``."""

    image: EvalImage
    position: int

    @property
    def ground_truth(self) -> Bool[np.ndarray, "oh ow"]:
        """The mask itself."""
        return self.image.masks[self.position]

    @property
    def mask_index(self) -> int:
        """The number of the mask among the sample's."""
        return self.image.mask_indices[self.position]

    @property
    def key(self) -> str:
        """Names the mask, also for draws; see ``mask_key``."""
        return mask_key(self.image.dataset, self.image.name, self.mask_index)

    @property
    def box_xyxy(self) -> tuple[int, int, int, int]:
        """Tight box in indices of original pixels, both corners inside the mask."""
        return tight_box(self.ground_truth)

    def prompt_box_xyxy(self, resized_hw: tuple[int, int]) -> Float[np.ndarray, "4"]:
        """The tight box as a prompt, which training takes from the resized mask.

        A corner names a pixel of the model's input, so the last one names that in which the
        enlarged mask ends, and not that in which its last pixel begins: at twice the size, pixels 3
        to 5 become 6 to 11. A mask that is thinner than a pixel of the model's input has its
        corners where it is, within the image.

        Args:
          resized_hw: size of the image within the model's input.

        Returns:
          corners in pixels of the original image, as ``Prompt`` takes them.
        """
        (h, w), (oh, ow) = resized_hw, self.ground_truth.shape
        model_pixel = np.array([ow / w, oh / h])
        x0, y0, x1, y1 = self.box_xyxy
        first, last = np.array([x0, y0]), np.array([x1 + 1, y1 + 1]) - model_pixel
        middle = (first + last) / 2
        corners = np.concatenate([np.minimum(first, middle), np.maximum(last, middle)])
        return np.maximum(corners, 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class TargetBatch:
    """Target masks that are prompted for in the same calls.

    Attributes:
      images: theirs, and others that were embedded with them.
      embeddings: of these images.
      targets: the masks.
    """

    images: Sequence[EvalImage]
    embeddings: ImageEmbeddings
    targets: Sequence[TargetMask]

    def resized_hw(self, target: TargetMask) -> tuple[int, int]:
        """The size of a mask's image within the model's input."""
        height, width = self.embeddings.resized_hw[self.images.index(target.image)].tolist()
        return height, width

    def predict(
        self,
        predictor: Predictor,
        prompts: Mapping[TargetMask, Prompt],
        *,
        multimask_output: bool,
    ) -> dict[TargetMask, Prediction]:
        """The model's answers to one prompt for each of some masks, each of one object.

        Args:
          predictor: which embedded the images.
          prompts: by the mask that is meant.
          multimask_output: see ``Predictor.predict``.

        Raises:
          NotFiniteError: if a logit is not finite.
        """
        asked = [[target for target in prompts if target.image is image] for image in self.images]
        predictions = predictor.predict(
            self.embeddings,
            [[prompts[target] for target in of_image] for of_image in asked],
            multimask_output=multimask_output,
        )
        answers = {}
        for of_image, prediction in zip(asked, predictions, strict=True):
            for number, target in enumerate(of_image):
                logits = prediction.low_res_logits[number : number + 1]
                if not np.isfinite(logits).all():
                    raise NotFiniteError(
                        f"mask {target.key}: the model answers with logits that are not finite; "
                        "its training diverged, or the file of its weights is damaged: evaluate an "
                        "earlier checkpoint"
                    )
                answers[target] = dataclasses.replace(
                    prediction,
                    low_res_logits=logits,
                    iou_predictions=prediction.iou_predictions[number : number + 1],
                )
        return answers


def mask_key(dataset: str, image: str, mask_index: int) -> str:
    """A mask's name: the same wherever the dataset is kept."""
    return f"{dataset}/{image.rpartition('/')[2]}/{mask_index}"


def tight_box(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """First and last column and row of a mask, as ``x0, y0, x1, y1``."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    return x, y, x + width - 1, y + height - 1


def make_batches(
    predictor: Predictor, images: Sequence[EvalImage], *, num_rows: int, row_length: int
) -> Iterator[TargetBatch]:
    """All masks of images that are embedded together, in batches that fill a call of the predictor.

    Args:
      predictor: with buckets of ``num_rows`` rows, of all devices, and ``row_length`` prompts.
      images: the images.
      num_rows: most rows of a batch.
      row_length: most masks of a row, all of one image; an image with more takes several rows.
    """
    embeddings = predictor.embed([image.pixels for image in images])
    rows = [
        [TargetMask(image, p) for p in range(first, len(image.masks))[:row_length]]
        for image in images
        for first in range(0, len(image.masks), row_length)
    ]
    for first in range(0, len(rows), num_rows):
        chosen = rows[first : first + num_rows]
        yield TargetBatch(images, embeddings, [target for row in chosen for target in row])
