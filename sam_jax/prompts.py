"""Simulated users: the clicks and boxes that training draws from ground-truth masks, inside jit."""

import dataclasses

import jax
import jax.numpy as jnp

from sam_jax.arrays import Array, Bool, Float, Int
from sam_jax.ops.masks import masks_to_boxes, sample_pixel


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """How a simulated user behaves; the defaults are the paper's.

    Attributes:
      box_rate: probability that the first prompt is a box and not a point.
      box_noise_rate: standard deviation of a box coordinate's noise over the box's side.
      box_noise_max_px: largest noise in pixels of the model input (the paper's 20 are meant for
        1024 pixels).
      num_corrections: rounds that add a click in the error region.
      random_mask_round: whether a round without a new click is inserted at a random place among
        the corrections.
      final_mask_round: whether such a round comes last.

    Source: Kirillov et al. 2023, appendix A, "Training algorithm".
    """

    box_rate: float = 0.5
    box_noise_rate: float = 0.1
    box_noise_max_px: float = 20.0
    num_corrections: int = 8
    random_mask_round: bool = True
    final_mask_round: bool = True

    @property
    def num_rounds(self) -> int:
        """Decoder calls per object, the first one included."""
        return 1 + self.num_corrections + self.random_mask_round + self.final_mask_round

    @property
    def num_points(self) -> int:
        """Points that an object can collect: the first and the corrections."""
        return 1 + self.num_corrections


def noisy_boxes(
    key: Array,
    masks: Bool[Array, "b p h w"],
    image_hw: Int[Array, "b 2"],
    config: PromptConfig,
) -> Float[Array, "b p 4"]:
    """Boxes of masks with noise on every coordinate, kept inside the image.

    The noise is normal with a deviation of ``box_noise_rate`` times the side along its axis, and
    is clipped at ``box_noise_max_px``.

    Differs: the paper does not say how the maximum acts; SAM 2's code draws uniformly from
    +-min(10 % of the side, 20 px) instead.
    """
    boxes = masks_to_boxes(masks)
    side = boxes[..., 2:] - boxes[..., :2] + 1.0
    noise = config.box_noise_rate * jnp.tile(side, 2) * jax.random.normal(key, boxes.shape)
    noise = jnp.clip(noise, -config.box_noise_max_px, config.box_noise_max_px)
    last = jnp.tile(image_hw[:, None, ::-1] - 1, 2).astype(jnp.float32)
    return jnp.clip(boxes + noise, 0.0, last)


def error_clicks(
    key: Array,
    predicted: Bool[Array, "b p h w"],
    masks: Bool[Array, "b p h w"],
    area: Bool[Array, "b h w"],
) -> tuple[Int[Array, "b p 2"], Int[Array, "b p"]]:
    """One click per object, uniform over the pixels where prediction and mask differ.

    Where they agree everywhere, the click is a uniform background pixel, as in SAM 2's training
    code. Only pixels of ``area`` are clicked.

    Returns:
      ``(x, y)`` in pixels of the model input, and the label: 1 on the mask, 0 off it.
    """
    inside = area[:, None]
    errors = (predicted ^ masks) & inside
    perfect = ~jnp.any(errors, axis=(-2, -1), keepdims=True)
    coords = sample_pixel(key, jnp.where(perfect, ~masks & inside, errors))
    return coords, masks_at(masks, coords)


def masks_at(masks: Bool[Array, "b p h w"], coords: Int[Array, "b p 2"]) -> Int[Array, "b p"]:
    """1 where the pixel ``(x, y)`` lies on the object's mask, 0 elsewhere."""
    rows = jnp.take_along_axis(masks, coords[..., 1, None, None], axis=-2)[..., 0, :]
    return jnp.take_along_axis(rows, coords[..., 0, None], axis=-1)[..., 0].astype(jnp.int32)


def mask_round_of(key: Array, shape: tuple[int, ...], config: PromptConfig) -> Int[Array, "..."]:
    """For each object, the round (0 is the first) that adds no click, besides the last.

    Uniform over the places before, between and after the corrections; -1 if there is none.
    """
    if not config.random_mask_round:
        return jnp.full(shape, -1)
    return jax.random.randint(key, shape, 1, config.num_corrections + 2)
