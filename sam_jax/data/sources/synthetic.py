"""Procedural images of textured, overlapping shapes: data that needs no download.

Good enough to train a tiny model from nothing in minutes and to see whether a
pipeline learns, yet not flat cut-outs: objects and background are textured,
lit, shadowed, slightly blurred and noisy, and hide one another.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from sam_jax import rle
from sam_jax.data.samples import Sample
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError

# What is left of a shape counts as an object if it covers this fraction of
# the square of the image's short side and this fraction of the whole shape.
_MIN_AREA_RATE = 0.003
_MIN_VISIBLE_RATE = 0.25
# Coordinates handed to OpenCV carry this many fractional bits.
_SUBPIXEL_BITS = 4
_TAU = 2 * math.pi


class SyntheticSource:
    """`num_images` different images, each a function of (seed, index) alone.

    Masks are the visible parts: where a shape is covered by a later one, the
    pixels belong to the later one.
    """

    def __init__(
        self,
        num_images: int = 10_000,
        image_size: tuple[int, int] = (256, 256),
        seed: int = 0,
        num_objects: tuple[int, int] = (3, 8),
        radius_rates: tuple[float, float] = (0.10, 0.25),
        name: str = "synthetic",
    ):
        """Sets the family of images; nothing is drawn yet.

        Args:
          num_images: the length.
          image_size: (h, w) in pixels.
          seed: another seed, other images.
          num_objects: fewest and most shapes drawn in an image.
          radius_rates: smallest and largest radius of a shape, as rates of the image's shorter
            side.
          name: what `Sample.dataset` says.

        Raises:
          ConfigError: no image or no object could be drawn.
        """
        if num_images < 1 or min(image_size) < 16:
            raise ConfigError("needs an image, of at least 16 x 16 pixels")
        if not 1 <= num_objects[0] <= num_objects[1] < 256:
            raise ConfigError(f"num_objects must be 1 <= low <= high: {num_objects}")
        if not 0 < radius_rates[0] <= radius_rates[1] <= 0.5:
            raise ConfigError(f"radius_rates must be 0 < low <= high <= 0.5: {radius_rates}")
        self.name = name
        self.left_out = Tally()
        self._num_images = num_images
        self._image_size = image_size
        self._seed = seed
        self._num_objects = num_objects
        self._radius_rates = radius_rates

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> Sample:
        """The image (as an array) and its masks; index is below the length."""
        if not 0 <= index < self._num_images:
            raise IndexError(index)
        rng = np.random.default_rng([self._seed, index])
        image, labels = draw(self._image_size, self._num_objects, self._radius_rates, rng)
        masks_rle = tuple(rle.from_labels(labels))
        return Sample(image, masks_rle, self.name, f"{self.name}::{index}")


class _Scene(NamedTuple):
    """A picture in the making.

    Attributes:
      paint: surface colours, RGB.
      light: how much of it arrives; shadows lower it.
      owner: which object a pixel belongs to; 0 is background.
    """

    paint: UInt8[np.ndarray, "h w 3"]
    light: Float32[np.ndarray, "h w"]
    owner: UInt8[np.ndarray, "h w"]


def draw(
    image_size: tuple[int, int],
    num_objects: tuple[int, int],
    radius_rates: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """A picture (RGB) and its labels.

    Each object has its own label; there is at least one. 0 is background, and
    what is left of objects that are mostly hidden.

    Args:
      image_size: (h, w) in pixels.
      num_objects: fewest and most shapes.
      radius_rates: smallest and largest radius, as rates of the shorter side.
      rng: where all choices come from.
    """
    h, w = image_size
    count = int(rng.integers(num_objects[0], num_objects[1] + 1))
    colors = _distinct_colors(count + 1, rng)
    scene = _Scene(
        paint=_surface((h, w), colors[0], float(min(h, w)), rng),
        light=np.ones((h, w), np.float32),
        owner=np.zeros((h, w), np.uint8),
    )
    # Larger shapes first, as they would otherwise bury the smaller ones.
    radii = np.sort(rng.uniform(*radius_rates, count))[::-1] * min(h, w)
    centers = _spread_centers(count, image_size, rng)
    areas = np.array(
        [_draw_object(scene, i + 1, radii[i], centers[i], colors[i + 1], rng) for i in range(count)]
    )
    visible = np.bincount(scene.owner.reshape(-1), minlength=count + 1)[1:]
    enough = np.maximum(_MIN_AREA_RATE * min(h, w) ** 2, _MIN_VISIBLE_RATE * areas)
    labels = np.arange(count + 1, dtype=np.uint8)
    labels[1:][visible < np.maximum(enough, 1)] = 0
    return _photograph(scene, rng), labels[scene.owner]


def _spread_centers(
    count: int, image_size: tuple[int, int], rng: np.random.Generator
) -> Float[np.ndarray, "count 2"]:
    """Points (x, y), pixels, that crowd less than chance would have it.

    Each is the better of two random candidates, the one farther from those
    before it.
    """
    h, w = image_size
    candidates = rng.uniform(0.08, 0.92, (count, 2, 2)) * [w, h]
    centers = candidates[:, 0].copy()
    for i in range(1, count):
        gaps = np.linalg.norm(candidates[i][:, None] - centers[:i], axis=-1)
        centers[i] = candidates[i][gaps.min(axis=1).argmax()]
    return centers


def _draw_object(
    scene: _Scene,
    number: int,
    radius: float,
    center: Float[np.ndarray, "2"],
    color: Float32[np.ndarray, "3"],
    rng: np.random.Generator,
) -> int:
    """Puts one shape into the scene; returns its area there, in pixels."""
    h, w = scene.owner.shape
    outlines = _SHAPES[int(rng.integers(len(_SHAPES)))](radius, rng)
    outlines = [outline + center for outline in outlines]
    margin = 2 + radius * 0.3
    points = np.concatenate(outlines)
    x0, y0 = np.clip(points.min(axis=0) - margin, 0, [w - 1, h - 1]).astype(int)
    x1, y1 = np.clip(points.max(axis=0) + margin, [x0 + 1, y0 + 1], [w, h]).astype(int)
    window = np.s_[y0:y1, x0:x1]
    silhouette = np.zeros((y1 - y0, x1 - x0), np.uint8)
    fixed = [
        np.rint((outline - [x0, y0]) * (1 << _SUBPIXEL_BITS)).astype(np.int32)
        for outline in outlines
    ]
    cv2.fillPoly(silhouette, fixed, 1, shift=_SUBPIXEL_BITS)

    # A soft shadow falls to one side; it makes outlines readable where two
    # surfaces happen to be of similar brightness.
    offset = rng.uniform(-0.15, 0.15, 2) * radius
    shift = np.array([[1, 0, offset[0]], [0, 1, offset[1]]])
    depth = float(rng.uniform(0.15, 0.5))
    shadow = cv2.warpAffine(silhouette.astype(np.float32), shift, silhouette.shape[::-1])
    # A box three times over is close to a Gaussian and its cost does not
    # depend on the width.
    side = 2 * int(0.5 + 0.08 * radius) + 1
    for _ in range(3):
        shadow = cv2.blur(shadow, (side, side))
    light = scene.light[window]
    light *= 1 - depth * shadow
    light[silhouette > 0] = 1.0

    surface = _surface(silhouette.shape, color, 2 * radius, rng)
    cv2.copyTo(surface, silhouette, scene.paint[window])
    cv2.copyTo(np.full_like(silhouette, number), silhouette, scene.owner[window])
    return cv2.countNonZero(silhouette)


def _photograph(scene: _Scene, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """The scene under uneven light, through a lens, on a noisy sensor."""
    h, w = scene.owner.shape
    corners = rng.uniform(0.75, 1.15, (2, 2)).astype(np.float32)
    light = scene.light * cv2.resize(corners, (w, h), interpolation=cv2.INTER_LINEAR)
    image = cv2.multiply(scene.paint, cv2.merge([light] * 3), dtype=cv2.CV_8U)
    image = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.5, 0.9))
    noise = rng.standard_normal((h, w), np.float32) * np.float32(rng.uniform(1, 6))
    return cv2.add(image, cv2.merge([noise] * 3), dtype=cv2.CV_8U)


def _distinct_colors(count: int, rng: np.random.Generator) -> Float32[np.ndarray, "count 3"]:
    """RGB colours, 0..255, that keep apart from each other.

    Each is the best of a few random candidates: the one farthest from those
    chosen before, in Lab, where distance means visible difference.
    """
    candidates = rng.uniform([0, 0.25, 0.25], [360, 0.95, 1.0], (12 * count, 3))
    rgb = cv2.cvtColor(candidates[None].astype(np.float32), cv2.COLOR_HSV2RGB)
    lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2Lab)[0].reshape(count, 12, 3)
    rgb = rgb[0].reshape(count, 12, 3)
    chosen = [0]
    chosen_lab = [lab[0, 0]]
    for options in lab[1:]:
        distance = np.linalg.norm(options[:, None] - np.array(chosen_lab), axis=-1)
        best = int(distance.min(axis=1).argmax())
        chosen.append(best)
        chosen_lab.append(options[best])
    return rgb[np.arange(count), chosen] * 255


# Shapes: (radius, rng) -> closed outlines of points (x, y) about (0, 0).
# Several outlines are filled by the even-odd rule, so an inner one is a hole.
_Outline: TypeAlias = Float[np.ndarray, "n 2"]


def _turned(outline: _Outline, rng: np.random.Generator) -> _Outline:
    angle = rng.uniform(0, _TAU)
    cos, sin = math.cos(angle), math.sin(angle)
    return outline @ np.array([[cos, sin], [-sin, cos]])


def _polar(radius: float | Float[np.ndarray, "n"], theta: Float[np.ndarray, "n"]) -> _Outline:
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=-1)


def _angles(count: int) -> Float[np.ndarray, "count"]:
    return np.arange(count) * (_TAU / count)


def _ellipse(radius: float, rng: np.random.Generator) -> list[_Outline]:
    stretch = rng.uniform(0.45, 1.0)
    return [_turned(_polar(radius, _angles(48)) * [1, stretch], rng)]


def _polygon(radius: float, rng: np.random.Generator) -> list[_Outline]:
    count = int(rng.integers(3, 8))
    theta = _angles(count) + rng.uniform(-0.3, 0.3, count) * _TAU / count
    return [_turned(_polar(radius * rng.uniform(0.75, 1.15, count), theta), rng)]


def _star(radius: float, rng: np.random.Generator) -> list[_Outline]:
    tips = int(rng.integers(4, 9))
    reach = np.where(np.arange(2 * tips) % 2, rng.uniform(0.4, 0.65), 1.15)
    return [_turned(_polar(radius * reach, _angles(2 * tips)), rng)]


def _blob(radius: float, rng: np.random.Generator) -> list[_Outline]:
    theta = _angles(72)
    waves = np.arange(2, 7)
    height = rng.uniform(-0.35, 0.35, 5) / np.sqrt(waves)
    phase = rng.uniform(0, _TAU, 5)
    wobble = (height * np.cos(theta[:, None] * waves + phase)).sum(axis=-1)
    return [_polar(radius * np.clip(1 + wobble, 0.3, 1.6), theta)]


def _ring(radius: float, rng: np.random.Generator) -> list[_Outline]:
    stretch = rng.uniform(0.6, 1.0)
    outer = _turned(_polar(1.1 * radius, _angles(56)) * [1, stretch], rng)
    return [outer, outer * rng.uniform(0.4, 0.62)]


def _stroke(radius: float, rng: np.random.Generator) -> list[_Outline]:
    """A thick arc with round ends."""
    bend = rng.uniform(0.2, 0.9) * math.pi
    arc_radius = 1.35 * radius / bend
    width = radius * rng.uniform(0.2, 0.34)
    arc = np.linspace(-bend, bend, 32)
    # Around each end by half a turn, from the outer side to the inner.
    cap = np.linspace(0, math.pi, 13)
    outline = np.concatenate(
        [
            _polar(arc_radius + width, arc),
            _polar(arc_radius, arc[-1:]) + _polar(width, bend + cap),
            _polar(arc_radius - width, arc[::-1]),
            _polar(arc_radius, arc[:1]) + _polar(width, -bend + math.pi + cap),
        ]
    )
    return [_turned(outline - outline.mean(axis=0), rng)]


def _rounded_rectangle(radius: float, rng: np.random.Generator) -> list[_Outline]:
    half = radius * np.array([rng.uniform(0.75, 1.15), rng.uniform(0.4, 0.85)])
    corner = half.min() * rng.uniform(0.1, 0.7)
    arcs = _polar(corner, _angles(32))
    centers = np.repeat([[1, 1], [-1, 1], [-1, -1], [1, -1]] * (half - corner), 8, axis=0)
    return [_turned(arcs + centers, rng)]


def _crescent(radius: float, rng: np.random.Generator) -> list[_Outline]:
    outer = _polar(1.1 * radius, np.linspace(0.15 * math.pi, 1.85 * math.pi, 40))
    # The inner edge is the outer one, pressed together towards the tips.
    depth = rng.uniform(0.5, 0.75)
    tip_x = outer[0, 0]
    inner = np.stack([tip_x + (outer[:, 0] - tip_x) * depth, outer[:, 1] * 0.8], axis=-1)
    return [_turned(np.concatenate([outer, inner[-2:0:-1]]), rng)]


_SHAPES: tuple[Callable[[float, np.random.Generator], list[_Outline]], ...] = (
    _ellipse,
    _polygon,
    _star,
    _blob,
    _ring,
    _stroke,
    _rounded_rectangle,
    _crescent,
)


# Textures: (x, y, period, rng) -> values in [0, 1], where x and y are pixel
# coordinates and period is the size of the pattern in pixels.
_Plane: TypeAlias = Float32[np.ndarray, "h w"]


def _plain(x: _Plane, y: _Plane, period: float, rng: np.random.Generator) -> _Plane:
    return np.zeros_like(x)


def _gradient(x: _Plane, y: _Plane, period: float, rng: np.random.Generator) -> _Plane:
    ramp, _ = _axes(x, y, period, rng)
    ramp -= ramp.min()
    return ramp / max(float(ramp.max()), 1.0)


def _axes(x: _Plane, y: _Plane, period: float, rng: np.random.Generator) -> tuple[_Plane, _Plane]:
    """Phases that advance by a full turn per period, along turned axes."""
    angle = rng.uniform(0, _TAU)
    cos = np.float32(_TAU / period * math.cos(angle))
    sin = np.float32(_TAU / period * math.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def _stripes(x: _Plane, y: _Plane, period: float, rng: np.random.Generator) -> _Plane:
    u, _ = _axes(x, y, period, rng)
    return np.clip(np.sin(u) * np.float32(rng.uniform(0.7, 3.0)) + 0.5, 0, 1)


def _checks(x: _Plane, y: _Plane, period: float, rng: np.random.Generator) -> _Plane:
    u, v = _axes(x, y, 1.4 * period, rng)
    return np.clip(np.sin(u) * np.sin(v) * 6 + 0.5, 0, 1)


def _dots(x: _Plane, y: _Plane, period: float, rng: np.random.Generator) -> _Plane:
    u, v = _axes(x, y, period, rng)
    return np.clip((np.cos(u) + np.cos(v) - np.float32(rng.uniform(0.3, 0.9))) * 3, 0, 1)


def _clouds(x: _Plane, y: _Plane, period: float, rng: np.random.Generator) -> _Plane:
    """Smooth noise in two octaves."""
    h, w = x.shape
    total = np.zeros((h, w), np.float32)
    for octave, weight in ((1.0, 0.65), (0.4, 0.35)):
        cells = [max(2, math.ceil(side / (period * octave)) + 1) for side in (h, w)]
        coarse = rng.random(cells, np.float32)
        total += np.float32(weight) * cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC)
    return np.clip(total * 1.6 - 0.3, 0, 1)


def _grain(x: _Plane, y: _Plane, period: float, rng: np.random.Generator) -> _Plane:
    """Streaks along one direction, as of wood."""
    h, w = x.shape
    cells = (max(2, h // 2), max(2, math.ceil(w / (2 * period))))
    if rng.random() < 0.5:
        cells = (max(2, math.ceil(h / (2 * period))), max(2, w // 2))
    return cv2.resize(rng.random(cells, np.float32), (w, h), interpolation=cv2.INTER_LINEAR)


_TEXTURES: tuple[Callable[[_Plane, _Plane, float, np.random.Generator], _Plane], ...] = (
    _plain,
    _gradient,
    _stripes,
    _checks,
    _dots,
    _clouds,
    _clouds,
    _grain,
)


def _surface(
    hw: tuple[int, int],
    color: Float32[np.ndarray, "3"],
    extent: float,
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "h w 3"]:
    """A textured surface of one dominant colour.

    Args:
      hw: its height and width in pixels.
      color: RGB 0..255.
      extent: about how large the thing is, pixels; the pattern repeats several times within it.
      rng: where all choices come from.
    """
    y, x = _grid(*hw)
    texture = _TEXTURES[int(rng.integers(len(_TEXTURES)))]
    period = max(extent * rng.uniform(0.12, 0.35), 4.0)
    pattern = (texture(x, y, period, rng) * 255).astype(np.uint8)
    # The second colour is a darker or lighter relative of the first, so that
    # the surface still reads as one thing.
    factor = rng.uniform(0.45, 0.75)
    if color.mean() < 110:
        other = 255 - (255 - color) * factor
    else:
        other = color * factor
    other = np.clip(other + rng.uniform(-25, 25, 3), 0, 255)
    palette = color + np.linspace(0, 1, 256)[:, None] * (other - color)
    return cv2.applyColorMap(pattern, palette.astype(np.uint8)[:, None])


def _grid(h: int, w: int) -> tuple[_Plane, _Plane]:
    """Pixel coordinates (y, x)."""
    # Slices of one grid: making new ones would cost as much as the textures.
    y, x = _square_grid(1 << (max(h, w) - 1).bit_length())
    return y[:h, :w], x[:h, :w]


@functools.lru_cache(maxsize=8)
def _square_grid(side: int) -> Float32[np.ndarray, "2 side side"]:
    return np.mgrid[:side, :side].astype(np.float32)
