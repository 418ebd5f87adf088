"""Simulated users: the clicks and boxes that training draws from ground-truth masks, inside jit."""

import dataclasses

import jax
import jax.numpy as jnp

from sam_jax.arrays import Array, Float, Int
from sam_jax.ops.packed_masks import MaskLayout, bit_at


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Behaviour of the simulated user; the defaults are the paper's.

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


def noisy_box(
    key: Array,
    box: Float[Array, " 4"],
    image_hw: Int[Array, " 2"],
    config: PromptConfig,
) -> Float[Array, " 4"]:
    """A box ``x0, y0, x1, y1`` with noise on every coordinate, kept inside the image.

    The noise is normal with a deviation of ``box_noise_rate`` times the side along its axis, and
    is clipped at ``box_noise_max_px``.

    Differs: the paper does not say how the maximum acts; SAM 2's code draws uniformly from
    +-min(10 % of the side, 20 px) instead.

    Where noise brings the corners of a narrow box past each other, each takes the other's place.
    """
    side = box[2:] - box[:2] + 1.0
    noise = (
        config.box_noise_rate * jnp.tile(side, 2) * jax.random.normal(key, box.shape, jnp.float32)
    )
    noise = jnp.clip(noise, -config.box_noise_max_px, config.box_noise_max_px)
    last = jnp.tile(image_hw[::-1] - 1, 2).astype(jnp.float32)
    corners = jnp.clip(box + noise, 0.0, last).reshape(2, 2)
    return jnp.concatenate([jnp.min(corners, axis=0), jnp.max(corners, axis=0)])


def error_click(
    key: Array,
    errors: Int[Array, "16 tokens"],
    mask: Int[Array, "16 tokens"],
    area: Int[Array, "16 tokens"],
    mask_layout: MaskLayout,
) -> tuple[Int[Array, " 2"], Int[Array, ""]]:
    """A click for an object, uniform over the pixels where prediction and mask differ.

    Where they agree everywhere, the click is a uniform background pixel, as in SAM 2's training
    code. Only pixels of ``area`` are clicked. All masks are packed (``ops.packed_masks``).

    Returns:
      ``(x, y)`` in pixels of the model input, and the label: 1 on the mask, 0 off it.
    """
    perfect = ~jnp.any(errors & area)
    pixel, place = mask_layout.sample_pixel(key, jnp.where(perfect, ~mask, errors) & area)
    return pixel, bit_at(mask, place)


def mask_round_of(key: Array, config: PromptConfig) -> Int[Array, ""]:
    """The round (0 is the first) in which an object gets no click, besides the last.

    Uniform over the places before, between and after the corrections; -1 if there is none.
    """
    if not config.random_mask_round:
        return jnp.int32(-1)
    return jax.random.randint(key, (), 1, config.num_corrections + 2, jnp.int32)
