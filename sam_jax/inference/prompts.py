"""Prompts of users: checked, in pixels of their own image, any number of each kind."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np

from sam_jax.arrays import Bool, Float
from sam_jax.errors import UserError
from sam_jax.models.prompt_encoder import BACKGROUND, FOREGROUND, Prompts

# Magnitude that the model's own logits reach well inside and well outside of objects.
MASK_LOGIT = 10.0


class PromptError(UserError, ValueError):
    """A prompt that makes no sense; the message says which, and why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """Prompt for one object; at least one of points, box and mask.

    Attributes:
      points: ``(x, y)`` in pixels of the original image, a pixel's index meaning its centre.
      labels: 1 for a point on the object, 0 for one beside it; by default all are on it.
      box: ``(x0, y0, x1, y1)`` in the same frame; what lies outside of the image is cut off.
      mask: low-resolution logits ``[lh, lw]`` from an earlier prediction, or a binary mask of the
        original image's size (bool, or 8-bit with 0 for background).
    """

    points: Any = ()
    labels: Any = None
    box: Any = None
    mask: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Checked:
    """A prompt in pixels of the model's input; absent kinds are None."""

    points: Float[np.ndarray, "n 2"]
    labels: np.ndarray
    box: Float[np.ndarray, "4"] | None
    mask_logits: Float[np.ndarray, "lh lw"] | None


def mask_logits(
    mask: Bool[np.ndarray, "oh ow"],
    resized_hw: tuple[int, int],
    model_hw: tuple[int, int],
    low_res_hw: tuple[int, int],
) -> Float[np.ndarray, "lh lw"]:
    """Logits as the model would give for a binary mask: a mask prompt made by hand.

    The model was trained on its own logits, so a mask of zeros and ones would tell it almost
    nothing. Cells that the mask covers in part lie between the extremes; padding is background.

    Args:
      mask: in the original image's pixels.
      resized_hw: size of the image within the model's input.
      model_hw: size of the model's input.
      low_res_hw: size of the logits.
    """
    resized = cv2.resize(mask.astype(np.float32), resized_hw[::-1], interpolation=cv2.INTER_AREA)
    padded = np.zeros(model_hw, np.float32)
    padded[: resized_hw[0], : resized_hw[1]] = resized
    covered = cv2.resize(padded, low_res_hw[::-1], interpolation=cv2.INTER_AREA)
    return MASK_LOGIT * (2.0 * covered - 1.0)


def check_prompt(
    prompt: Prompt,
    name: str,
    *,
    original_hw: tuple[int, int],
    resized_hw: tuple[int, int],
    model_hw: tuple[int, int],
    low_res_hw: tuple[int, int],
) -> _Checked:
    """A prompt brought to the model's frame.

    Args:
      prompt: what the user said.
      name: what to call it in messages.
      original_hw: size of the image.
      resized_hw: its size within the model's input.
      model_hw: size of the model's input.
      low_res_hw: size of low-resolution logits.

    Raises:
      PromptError: if anything about it is wrong.
    """
    scale = np.array([resized_hw[1] / original_hw[1], resized_hw[0] / original_hw[0]])
    points, labels = _check_points(prompt, name, original_hw)
    box = _check_box(prompt.box, name, original_hw)
    logits = None
    if prompt.mask is not None:
        mask = _array(prompt.mask, f"{name}: the mask")
        if mask.shape == low_res_hw and mask.dtype.kind == "f":
            if not np.isfinite(mask).all():
                raise PromptError(f"{name}: the mask has values that are not finite")
            logits = mask.astype(np.float32)
        elif mask.shape == original_hw and mask.dtype in (bool, np.uint8):
            logits = mask_logits(mask > 0, resized_hw, model_hw, low_res_hw)
        else:
            raise PromptError(
                f"{name}: the mask is {mask.dtype} {mask.shape}; expected float logits "
                f"{low_res_hw}, or a bool or uint8 mask {original_hw} as large as the image"
            )
    if not len(points) and box is None and logits is None:
        raise PromptError(f"{name} is empty: give points, a box or a mask")
    return _Checked(
        (points * scale).astype(np.float32),
        labels,
        None if box is None else (box.reshape(2, 2) * scale).reshape(4).astype(np.float32),
        logits,
    )


def _check_points(
    prompt: Prompt, name: str, original_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    points = _numbers(() if prompt.points is None else prompt.points, f"{name}: points")
    if points.size == 0:
        points = points.reshape(0, 2)
    if points.ndim != 2 or points.shape[1] != 2:
        raise PromptError(f"{name}: points have shape {points.shape}, expected [n, 2] of (x, y)")
    if prompt.labels is None:
        labels = np.full(len(points), FOREGROUND)
    else:
        labels = _array(prompt.labels, f"{name}: labels").reshape(-1)
    if len(labels) != len(points):
        raise PromptError(f"{name}: {len(points)} points come with {len(labels)} labels")
    for label in labels.tolist():
        if label not in (FOREGROUND, BACKGROUND):
            raise PromptError(
                f"{name}: label {label!r} must be {FOREGROUND} (on the object) or {BACKGROUND} "
                "(beside it); a box is given as a box"
            )
    height, width = original_hw
    for x, y in points.tolist():
        if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
            raise PromptError(
                f"{name}: point ({x:g}, {y:g}) lies outside of the image, which is {width} wide "
                f"and {height} high"
            )
    return points, labels.astype(np.int32)


def _check_box(box: Any, name: str, original_hw: tuple[int, int]) -> np.ndarray | None:
    if box is None:
        return None
    corners = _numbers(box, f"{name}: the box")
    if corners.shape != (4,):
        raise PromptError(
            f"{name}: the box has shape {corners.shape}, expected the four of (x0, y0, x1, y1)"
        )
    x0, y0, x1, y1 = corners.tolist()
    if x1 < x0 or y1 < y0:
        raise PromptError(
            f"{name}: box ({x0:g}, {y0:g}, {x1:g}, {y1:g}) is reversed; expected x0 <= x1 and "
            "y0 <= y1 (not width and height)"
        )
    height, width = original_hw
    if x1 < 0 or y1 < 0 or x0 > width or y0 > height:
        raise PromptError(
            f"{name}: box ({x0:g}, {y0:g}, {x1:g}, {y1:g}) lies outside of the image, which is "
            f"{width} wide and {height} high"
        )
    return np.clip(corners, 0, [width, height, width, height])


def _numbers(values: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(values, np.float64)
    # PyTorch's tensors with gradients raise errors of their own.
    except (TypeError, ValueError, RuntimeError):
        raise PromptError(f"{name}: expected numbers, got {values!r}") from None
    if not np.isfinite(array).all():
        raise PromptError(f"{name}: {array.tolist()} has values that are not finite")
    return array


def _array(values: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(values)
    # Rows of several lengths; PyTorch's tensors on another device or with gradients.
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise PromptError(
            f"{name}: expected an array, got a {type(values).__name__}: {reason}"
        ) from None


@dataclasses.dataclass(frozen=True)
class Row:
    """Objects of one image that are prompted together.

    Attributes:
      image: the image's number.
      prompts: of at most one bucket's size.
    """

    image: int
    prompts: Sequence[_Checked]


def rows_of(per_image: Sequence[Sequence[_Checked]], row_length: int) -> Iterator[Row]:
    """Every image's prompts in rows of at most some length."""
    for image, prompts in enumerate(per_image):
        for start in range(0, len(prompts), row_length):
            yield Row(image, prompts[start : start + row_length])


def pad_rows(
    rows: Sequence[Row],
    *,
    num_rows: int,
    row_length: int,
    num_points: int,
    low_res_hw: tuple[int, int] | None,
) -> Prompts:
    """Rows as padded arrays with their validity, on the host: who places them copies them once.

    Args:
      rows: what to pad.
      num_rows: first axis.
      row_length: second axis.
      num_points: third axis of points.
      low_res_hw: size of mask prompts; None if there are none.
    """
    shape = (num_rows, row_length)
    coords = np.zeros((*shape, num_points, 2), np.float32)
    labels = np.zeros((*shape, num_points), np.int32)
    point_valid = np.zeros((*shape, num_points), bool)
    boxes, box_valid = np.zeros((*shape, 4), np.float32), np.zeros(shape, bool)
    logits = None if low_res_hw is None else np.zeros((*shape, *low_res_hw), np.float32)
    mask_valid = np.zeros(shape, bool)
    for r, row in enumerate(rows):
        for p, prompt in enumerate(row.prompts):
            n = len(prompt.points)
            coords[r, p, :n], labels[r, p, :n] = prompt.points, prompt.labels
            point_valid[r, p, :n] = True
            if prompt.box is not None:
                boxes[r, p], box_valid[r, p] = prompt.box, True
            if prompt.mask_logits is not None and logits is not None:
                logits[r, p], mask_valid[r, p] = prompt.mask_logits, True
    arrays: dict[str, Any] = {
        "point_coords": coords,
        "point_labels": labels,
        "point_valid": point_valid,
        "boxes_xyxy": boxes,
        "box_valid": box_valid,
    }
    if logits is not None:
        arrays |= {"mask_logits": logits, "mask_valid": mask_valid}
    return Prompts(**arrays)
