"""Masks from boxes: of each box the best of three, refined by itself if wanted."""

import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from sam_jax import rle
from sam_jax.arrays import Float, UInt8
from sam_jax.errors import ConfigError
from sam_jax.inference.candidates import mask_box
from sam_jax.inference.predictor import Buckets, Prediction, Predictor
from sam_jax.inference.prompts import Prompt
from sam_jax.inference.restore import restore_logits

# A row of so many boxes has a program of its own: most images have no more, and on a CPU empty
# places in a row cost as much as boxes.
_FEW_BOXES = 4
# How far the threshold moves for the stability, as in the published generator.
_STABILITY_OFFSET = 1.0


@dataclasses.dataclass(frozen=True)
class BoxOptions:
    """Options of masks from boxes.

    Attributes:
      refine: whether the mask's logits are fed back, with the box, for a single second answer.
      images_per_call: images that each device embeds together, and rows of boxes that it decodes
        together.
      boxes_per_call: boxes in a row, all of one image; an image with more takes several rows.

    Source: Kirillov et al. 2023, appendix D.4.
    """

    refine: bool = False
    images_per_call: int = 1
    boxes_per_call: int = 16

    def __post_init__(self) -> None:
        for name in ("images_per_call", "boxes_per_call"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    def buckets(self) -> Buckets:
        """The sizes of calls that a predictor needs; an image may have few boxes or many."""
        images = (self.images_per_call,)
        prompts = sorted({min(_FEW_BOXES, self.boxes_per_call), self.boxes_per_call})
        return Buckets(images=images, rows=images, prompts=prompts, points=(1,))


@dataclasses.dataclass(frozen=True, eq=False)
class BoxMask:
    """The mask of a box.

    Attributes:
      mask_rle: COCO's compressed run lengths, in the image's pixels.
      mask_box_xyxy: indices of its outermost pixels.
      predicted_iou: the model's estimate.
      stability_score: how little the mask depends on the logit's threshold; 0 if there is nothing.
    """

    mask_rle: dict[str, Any]
    mask_box_xyxy: tuple[float, float, float, float]
    predicted_iou: float
    stability_score: float


class BoxedImage(NamedTuple):
    """An image and the boxes in it.

    Attributes:
      pixels: RGB, or other channels of the model.
      boxes_xyxy: edges in its pixels; what lies outside of it is cut off.
    """

    pixels: UInt8[np.ndarray, "oh ow 3"] | Float[np.ndarray, "oh ow c"]
    boxes_xyxy: Float[np.ndarray, "k 4"]


# What is drawn of an image while the device answers for the next ones.
_Drawing: TypeAlias = list[Future[BoxMask]]


def masks_of_boxes(
    predictor: Predictor, images: Iterable[BoxedImage], options: BoxOptions | None = None
) -> Iterator[list[BoxMask]]:
    """A mask for each box of each image of a stream, in their order.

    Of the three answers to a box, the one with the highest predicted IoU is taken. Masks are
    enlarged and encoded by threads, while the device answers for the images that follow.

    Args:
      predictor: with ``options.buckets()``, or any others.
      images: read as they are needed, no more than two calls ahead.
      options: see there.
    """
    options = options or BoxOptions()
    together = options.images_per_call * predictor.num_devices
    source = iter(images)
    under_way: deque[list[_Drawing]] = deque()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        while group := list(itertools.islice(source, together)):
            under_way.append(_answered(predictor, group, options, pool))
            while len(under_way) > 1:
                yield from _drawn(under_way.popleft())
        for drawings in under_way:
            yield from _drawn(drawings)
    finally:
        # After an error or Ctrl-C, what is still in line is of no use.
        pool.shutdown(cancel_futures=True)


def _drawn(drawings: Sequence[_Drawing]) -> Iterator[list[BoxMask]]:
    for drawing in drawings:
        yield [future.result() for future in drawing]


def _answered(
    predictor: Predictor, group: Sequence[BoxedImage], options: BoxOptions, pool: Executor
) -> list[_Drawing]:
    """The masks of images that are embedded together, on their way."""
    drawings: list[_Drawing] = [[] for _ in group]
    if not any(len(image.boxes_xyxy) for image in group):
        return drawings
    embeddings = predictor.embed([image.pixels for image in group])
    length = options.boxes_per_call
    rows = [
        (number, image.boxes_xyxy[start : start + length])
        for number, image in enumerate(group)
        for start in range(0, len(image.boxes_xyxy), length)
    ]
    # Some rows at a time: a box has three answers of a quarter of a megabyte each.
    num_rows = options.images_per_call * predictor.num_devices
    for start in range(0, len(rows), num_rows):
        prompts: list[list[Prompt]] = [[] for _ in group]
        for number, boxes in rows[start : start + num_rows]:
            prompts[number] += [Prompt(box=box) for box in boxes]
        answers = predictor.predict(embeddings, prompts)
        if options.refine:
            fed_back = [
                [
                    Prompt(box=prompt.box, mask=answer.low_res_logits[place, best])
                    for place, (prompt, best) in enumerate(
                        zip(of_image, _best(answer), strict=True)
                    )
                ]
                for of_image, answer in zip(prompts, answers, strict=True)
            ]
            answers = predictor.predict(embeddings, fed_back, multimask_output=False)
        for drawing, answer in zip(drawings, answers, strict=True):
            drawing += [
                pool.submit(
                    _mask,
                    # A copy, since a view would keep the other answers in memory.
                    answer.low_res_logits[place, best].copy(),
                    float(answer.iou_predictions[place, best]),
                    (answer.model_hw, answer.resized_hw, answer.original_hw),
                )
                for place, best in enumerate(_best(answer))
            ]
    return drawings


def _best(answer: Prediction) -> list[int]:
    """The answer of highest predicted IoU to each prompt."""
    return answer.iou_predictions.argmax(axis=1).tolist()


def _mask(low_res_logits: np.ndarray, predicted_iou: float, sizes: Sequence[Any]) -> BoxMask:
    logits = restore_logits(low_res_logits, *sizes)
    mask = logits > 0
    x0, y0, x1, y1 = (int(edge) for edge in mask_box(mask))
    union = np.count_nonzero(logits > -_STABILITY_OFFSET)
    stability = np.count_nonzero(logits > _STABILITY_OFFSET) / union if union else 0.0
    part = mask[y0 : y1 + 1, x0 : x1 + 1]
    return BoxMask(
        rle.encode_part(part, (mask.shape[0], mask.shape[1]), (x0, y0)),
        mask_box(mask),
        predicted_iou,
        stability,
    )
