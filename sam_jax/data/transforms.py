"""From a `Sample` to a fixed-shape training example, on the host.

Frames: the image is resized to fit the model input with its longest side,
placed at the upper left and padded with zeros at the bottom and right.
Normalising (and zeroing the pad again afterwards) happens on the device:
uint8 pixels (float32 values of other channels) and bit-packed masks cross the
bus at an eighth to a quarter of the size.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Shaped, UInt8

from sam_jax import rle
from sam_jax.data.samples import (
    CorruptSampleError,
    NoObjectError,
    Sample,
    SkippedSampleError,
    image_hw,
    mask_runs,
)
from sam_jax.data.tally import Tally
from sam_jax.data.windows import LazyImage, Placement, Window
from sam_jax.resizing import fit_longest_side

# Luma weights of the colour jitter's grey axis (ITU-R BT.601).
_LUMA = np.array([0.299, 0.587, 0.114])
# Field of a batch in the place of images.
LAZY_IMAGES = "lazy_images"
# Masks dropped for these reasons are the recipe's filters at work, not damage.
FILTERS = frozenset({"too large", "too small"})


class DroppedMask(NamedTuple):
    """A mask that was left out of a sample.

    Attributes:
      reason: "bad rle", "size mismatch", "unusable annotation" (damage), "empty", or one of
        `FILTERS`.
      detail: which mask, and what was wrong; "" for filters.
    """

    reason: str
    detail: str = ""


def dropped_by_source(sample: Sample) -> list[DroppedMask]:
    """The masks that the source has left out of the sample."""
    return [DroppedMask("unusable annotation", text) for text in sample.unusable_masks]


def no_valid_mask(sample: Sample, dropped: Iterable[DroppedMask]) -> SkippedSampleError:
    """The error of a sample that lost all its masks, to be raised, with all reasons.

    Without a damaged mask among them, there is nothing wrong with the sample.
    """
    tally = Tally()
    for mask in dropped:
        tally.add(mask.reason, mask.detail)
    reasons = set(tally.counts)
    for reason, detail in sample.remarks:
        tally.add(reason, detail)
    detail = str(tally)
    if not reasons:
        return NoObjectError(sample.name, "no annotation", detail)
    if reasons <= {"empty"}:
        return NoObjectError(sample.name, "only empty masks", detail)
    if reasons <= FILTERS | {"empty"}:
        return NoObjectError(sample.name, "only filtered masks", detail)
    return CorruptSampleError(sample.name, "no valid mask", detail)


def image_zeros(
    shape: tuple[int, int, int], in_channels: int | None
) -> UInt8[np.ndarray, "b h w 3"] | Float32[np.ndarray, "b h w c"]:
    """Images to write into: uint8 RGB, or float32 of so many channels."""
    if in_channels is None:
        return np.zeros((*shape, 3), np.uint8)
    return np.zeros((*shape, in_channels), np.float32)


class PackedMask(NamedTuple):
    """A mask that is empty outside of a box.

    Attributes:
      box: first row, number of rows, and the same for columns in bytes of eight pixels.
      bits: what is in the box, as `np.packbits` has it.
    """

    box: tuple[int, int, int, int]
    bits: UInt8[np.ndarray, "rows bytes"]


def pack_mask(part: Bool[np.ndarray, "h w"], top: int, left: int) -> PackedMask:
    """The mask that is `part` from a row and a column on, and empty elsewhere."""
    before = left % 8
    shifted = np.zeros((part.shape[0], before + part.shape[1]), bool)
    shifted[:, before:] = part
    bits = np.packbits(shifted, axis=-1)
    return PackedMask((top, bits.shape[0], left // 8, bits.shape[1]), bits)


class PackedExample(NamedTuple):
    """A training example before it is padded, a fifth of its size: what processes hand over.

    Attributes:
      image: the part of the model input that the image fills, RGB or other channels.
      image_hw: its size.
      original_hw: the image's size in the file.
      mask_boxes: of each mask, as in `PackedMask`.
      mask_bits: of all masks, one after the other.
    """

    image: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w c"] | LazyImage
    image_hw: tuple[int, int]
    original_hw: tuple[int, int]
    mask_boxes: Int32[np.ndarray, "k 4"]
    mask_bits: UInt8[np.ndarray, "n"]

    def unpack_into(self, batch: Mapping[str, Shaped[np.ndarray, "..."]], row: int) -> None:
        """Writes the example into a batch of zeros; see `TrainTransform.zeros`."""
        if isinstance(self.image, LazyImage):
            batch[LAZY_IMAGES][row] = self.image
        else:
            h, w = self.image_hw
            batch["image"][row, :h, :w] = self.image
        batch["image_hw"][row] = self.image_hw
        batch["original_hw"][row] = self.original_hw
        batch["mask_valid"][row, : len(self.mask_boxes)] = True
        begin = 0
        for mask, (y, rows, x, columns) in zip(
            batch["masks_packed"][row], self.mask_boxes.tolist(), strict=False
        ):
            end = begin + rows * columns
            mask[y : y + rows, x : x + columns] = self.mask_bits[begin:end].reshape(rows, columns)
            begin = end


@dataclass(frozen=True)
class TrainTransform:
    """Makes training examples: resize, pad, sample masks, pack them.

    The paper trains without augmentation, so it is off by default. Scale
    jitter is what it used where only data of the engine's first two stages
    was trained on; small models trained from nothing profit from all three.

    Attributes:
      image_size: (H, W) of the model input, pixels; W a multiple of 8.
      max_masks: p, how many masks an example holds at most.
      max_area_rate: masks covering more of the original image are dropped.
      min_mask_area_px: masks with fewer pixels at model resolution are dropped; 1 drops those that
        vanish.
      hflip_rate: probability of a horizontal flip.
      scale_jitter: (low, high) factors on the fitted size, drawn uniformly, then a random crop or
        padding to (H, W); None is off.
      color_jitter: strength s >= 0: brightness, contrast and saturation are scaled by factors in
        [1-s, 1+s], hue turned by up to s/2 rad.
      reduced_decoding: JPEGs of twice the size needed, or more, are decoded to a half, a quarter or
        an eighth of it. Masks are not concerned.
      in_channels: channels of the images, with values as they are stored; None for 8-bit RGB.

    Source: Appendix A, training recipe (up to 64 masks drawn at random, masks
        above 90 % of the image dropped, scale jitter [0.1, 2.0]).
    Differs: decoding at reduced size leaves somewhat more of the high
        frequencies in the image: 1 to 3 grey values on average (docs/scaling.md).
    """

    image_size: tuple[int, int]
    max_masks: int = 64
    max_area_rate: float = 0.9
    min_mask_area_px: int = 1
    hflip_rate: float = 0.0
    scale_jitter: tuple[float, float] | None = None
    color_jitter: float = 0.0
    reduced_decoding: bool = True
    in_channels: int | None = None

    def __post_init__(self):
        if self.color_jitter and self.in_channels is not None:
            raise ValueError(
                f"color_jitter = {self.color_jitter} changes red, green and blue, and "
                f"model.in_channels = {self.in_channels} takes channels as they are stored: set "
                "color_jitter to 0"
            )
        if min(self.image_size) < 1 or self.image_size[1] % 8:
            raise ValueError(
                "image_size must be positive and its width a multiple of 8 "
                f"(masks are packed 8 pixels to a byte), got {self.image_size}"
            )
        if self.max_masks < 1 or self.min_mask_area_px < 1:
            raise ValueError("max_masks and min_mask_area_px must be at least 1")
        if self.scale_jitter and not 0 < self.scale_jitter[0] <= self.scale_jitter[1]:
            raise ValueError(f"scale_jitter must be 0 < low <= high: {self}")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A training example; see `with_report`."""
        return self.with_report(sample, rng)[0]

    def with_report(
        self, sample: Sample, rng: np.random.Generator
    ) -> tuple[dict[str, np.ndarray], tuple[DroppedMask, ...]]:
        """A training example, and the masks it had to do without.

        Masks are drawn uniformly without replacement among the valid ones;
        only those drawn are decoded, and a drawn mask that proves unusable
        is replaced by another. Unusable masks that were never drawn are not
        reported.

        Returns:
          (example, dropped). The example has the arrays of `zeros` without b.

        Raises:
          CorruptSampleError: the image is unreadable, or has damaged masks only.
          NoObjectError: it has no mask, or none that the filters let pass.
        """
        packed, dropped = self.packed(sample, rng)
        batch = self.zeros(1)
        packed.unpack_into(batch, 0)
        return {key: array[0] for key, array in batch.items()}, dropped

    def zeros(self, batch_size: int) -> dict[str, np.ndarray]:
        """An empty batch.

        Returns:
          image: uint8 [b, H, W, 3], RGB, or float32 [b, H, W, c], zeros outside image_hw; image_hw:
          int32 [b, 2], the part of it the image fills; original_hw: int32 [b, 2], the size before
          resizing; masks_packed: uint8 [b, p, H, W/8], `np.packbits` of bool masks over the last
          axis (most significant bit first), zero where invalid; mask_valid: bool [b, p], true for
          the leading ones.
        """
        h, w = self.image_size
        return {
            "image": image_zeros((batch_size, h, w), self.in_channels),
            "image_hw": np.zeros((batch_size, 2), np.int32),
            "original_hw": np.zeros((batch_size, 2), np.int32),
            "masks_packed": np.zeros((batch_size, self.max_masks, h, w // 8), np.uint8),
            "mask_valid": np.zeros((batch_size, self.max_masks), bool),
        }

    def packed(
        self, sample: Sample, rng: np.random.Generator, known: Container[str] | None = None
    ) -> tuple[PackedExample, tuple[DroppedMask, ...]]:
        """The example of `with_report` in a form to hand over, and the masks left out.

        Args:
          sample: what to make it of.
          rng: what is random.
          known: digests of windows that have been decoded, and need not be again: the example then
            has a `LazyImage`. None decodes all.

        Raises:
          CorruptSampleError: the image is unreadable, or has damaged masks only.
          NoObjectError: it has no mask, or none that the filters let pass.
        """
        hw = image_hw(sample)
        placement = self._place(hw, rng)
        image = self._image(sample, placement, known)
        order = rng.permutation(len(sample.masks_rle))

        masks, dropped = self._masks(sample, hw, order, placement)
        if not masks and self.scale_jitter is not None:
            # The crop missed every mask, or they became too small. That is no
            # fault of the sample.
            placement = Placement.whole(fit_longest_side(hw, self.image_size), placement.flip)
            image = self._image(sample, placement, known)
            masks, dropped = self._masks(sample, hw, order, placement)
        if not masks:
            raise no_valid_mask(sample, dropped)

        if self.color_jitter:
            assert isinstance(image, np.ndarray), "no image looks twice the same"
            image = cv2.transform(image, self._color_matrix(image, rng))
        return PackedExample(
            image,
            placement.crop_hw,
            hw,
            np.array([mask.box for mask in masks], np.int32),
            np.concatenate([mask.bits.reshape(-1) for mask in masks]),
        ), tuple(dropped)

    def _image(
        self, sample: Sample, placement: Placement, known: Container[str] | None
    ) -> UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w c"] | LazyImage:
        window = Window(sample, placement, self.reduced_decoding)
        return window.pixels() if known is None else LazyImage.of(window, known)

    def _place(self, hw: tuple[int, int], rng: np.random.Generator) -> Placement:
        flip = self.hflip_rate > 0 and rng.random() < self.hflip_rate
        if self.scale_jitter is None:
            return Placement.whole(fit_longest_side(hw, self.image_size), flip)
        scale = rng.uniform(*self.scale_jitter)
        scaled_hw = fit_longest_side(hw, self.image_size, scale)
        crop_hw = min(scaled_hw[0], self.image_size[0]), min(scaled_hw[1], self.image_size[1])
        y = int(rng.integers(scaled_hw[0] - crop_hw[0] + 1))
        x = int(rng.integers(scaled_hw[1] - crop_hw[1] + 1))
        return Placement(scaled_hw, (y, x), crop_hw, flip)

    def _masks(
        self,
        sample: Sample,
        hw: tuple[int, int],
        order: np.ndarray,
        placement: Placement,
    ) -> tuple[list[PackedMask], list[DroppedMask]]:
        """Up to max_masks masks, and the dropped."""
        grid = rle.Grid(hw, placement.scaled_hw, placement.crop_yx, placement.crop_hw)
        masks: list[PackedMask] = []
        dropped = dropped_by_source(sample)
        for index in order.tolist():
            if len(masks) == self.max_masks:
                break
            try:
                runs = mask_runs(sample, index, hw)
            except CorruptSampleError as error:
                dropped.append(DroppedMask(error.reason, error.detail))
                continue
            area = rle.area_px(runs)
            if area == 0:
                dropped.append(DroppedMask("empty", f"mask {index}"))
            elif area > self.max_area_rate * hw[0] * hw[1]:
                dropped.append(DroppedMask("too large"))
            else:
                part, (top, left) = grid.resample_part(runs)
                if cv2.countNonZero(part.view(np.uint8)) < self.min_mask_area_px:
                    dropped.append(DroppedMask("too small"))
                    continue
                if placement.flip:
                    part = part[:, ::-1]
                    left = placement.crop_hw[1] - left - part.shape[1]
                masks.append(pack_mask(part, top, left))
        return masks, dropped

    def _color_matrix(
        self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
    ) -> Float64[np.ndarray, "3 4"]:
        """The jitter as one affine map of RGB.

        All four changes are linear (contrast about the mean grey), so one
        pass over the pixels applies them together.
        """
        s = self.color_jitter
        brightness, contrast, saturation = 1 + rng.uniform(-s, s, size=3)
        angle = rng.uniform(-s, s) / 2
        grey = np.tile(_LUMA, (3, 1))
        # Rodrigues' rotation about the grey diagonal turns the hue.
        axis = np.full(3, 3**-0.5)
        cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) * axis[0]
        hue = (
            np.cos(angle) * np.eye(3)
            + np.sin(angle) * cross
            + (1 - np.cos(angle)) * np.outer(axis, axis)
        )
        linear = (saturation * np.eye(3) + (1 - saturation) * grey) @ hue
        mean = float(cv2.mean(image)[:3] @ _LUMA)
        offset = np.full((3, 1), (1 - contrast) * mean * brightness)
        return np.hstack([brightness * contrast * linear, offset])


@dataclass(frozen=True)
class LazyTransform:
    """Makes training examples whose images are decoded only where they are new.

    Attributes:
      transform: what makes the rest of them. Without jitter: no image would come again.
      known: digests of windows that have been decoded, see `Window.digest`.
    """

    transform: TrainTransform
    known: Container[str]

    def zeros(self, batch_size: int) -> dict[str, np.ndarray]:
        """An empty batch: `TrainTransform.zeros` with `LAZY_IMAGES`, objects [b], for `image`."""
        batch = self.transform.zeros(batch_size)
        del batch["image"]
        return {LAZY_IMAGES: np.empty(batch_size, object), **batch}

    def packed(
        self, sample: Sample, rng: np.random.Generator
    ) -> tuple[PackedExample, tuple[DroppedMask, ...]]:
        """See `TrainTransform.packed`."""
        return self.transform.packed(sample, rng, self.known)
