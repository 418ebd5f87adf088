"""Regions that are searched for masks: the whole image, its crops or tiles; and their points."""

import dataclasses
import itertools
import math

import numpy as np

from sam_jax.arrays import Float

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of an image that is embedded and prompted by itself.

    Attributes:
      box: edges ``(x0, y0, x1, y1)`` in pixels of the image.
      layer: 0 for the whole image, rising with finer crops.
      is_tile: whether objects that its borders cut go on in the next one and are put together.
    """

    box: Box
    layer: int
    is_tile: bool = False


def crop_boxes(
    size: tuple[int, int], num_layers: int, overlap_ratio: float
) -> tuple[list[Box], list[int]]:
    """Edges ``(x0, y0, x1, y1)`` of the whole image and of all crops, and the layer of each.

    Layer i has ``2 ** i`` by ``2 ** i`` crops.

    Args:
      size: height and width of the image.
      num_layers: besides the whole image.
      overlap_ratio: overlap of the crops of the first layer, over the image's shorter side.

    Source: segment-anything, ``generate_crop_boxes``.
    """
    height, width = size
    boxes, layers = [(0, 0, width, height)], [0]
    for layer in range(1, num_layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / count))
        crop_h, crop_w = (math.ceil((overlap * (count - 1) + side) / count) for side in size)
        for column, row in itertools.product(range(count), range(count)):
            x0, y0 = column * (crop_w - overlap), row * (crop_h - overlap)
            boxes.append((x0, y0, min(x0 + crop_w, width), min(y0 + crop_h, height)))
            layers.append(layer)
    return boxes, layers


def tile_boxes(size: tuple[int, int], tile_px: int, halo_px: int) -> list[Box]:
    """Edges of tiles of one size that cover an image, row by row; one if the image is no larger.

    Args:
      size: height and width of the image.
      tile_px: side of a tile, halo included.
      halo_px: neighbours share at least this much; the tiles are spread evenly.
    """

    def starts(side: int) -> list[int]:
        if side <= tile_px:
            return [0]
        count = math.ceil((side - halo_px) / (tile_px - halo_px))
        return [round(index * (side - tile_px) / (count - 1)) for index in range(count)]

    height, width = size
    return [
        (x0, y0, min(x0 + tile_px, width), min(y0 + tile_px, height))
        for y0, x0 in itertools.product(starts(height), starts(width))
    ]


def point_grid(points_per_side: int) -> Float[np.ndarray, "n 2"]:
    """Points ``(x, y)`` in (0, 1), evenly spaced, row by row."""
    offset = 1 / (2 * points_per_side)
    side = np.linspace(offset, 1 - offset, points_per_side)
    return np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
