"""Counts of the masks of a data set: whole numbers, so that parts add up the same in any order."""

import dataclasses
from collections import Counter

import numpy as np

from sam_jax import rle
from sam_jax.arrays import Float, Int
from sam_jax.data.mask_stores import ImageMasks
from sam_jax.data.tally import Tally
from sam_jax.mask_shapes import MaskShapes, mask_shapes

# Bins of the numbers of masks of an image: their largest; the last bin has no end.
IMAGE_BIN_ENDS = (10, 50, 100, 200)
IMAGE_BINS = ("<=10", "11-50", "51-100", "101-200", ">200")
# Cells of the map of centres, along either side.
CENTER_CELLS = 64
SIZE_BINS = 1000
CONCAVITY_BINS = 100
# Relative sizes at which strata meet: halves of an octave, from 1/128 to 1.
STRATUM_EDGES = tuple(2.0 ** (-step / 2) for step in range(14, 0, -1))
NUM_STRATA = len(STRATUM_EDGES) + 1
# Sums of rates are kept as integers of this fraction.
_UNITS = 2**40


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int64)


@dataclasses.dataclass(eq=False)
class MaskCounts:
    """Counts of images and masks. Objects for parts of a data set add up to the whole's.

    Attributes:
      masks_per_image: numbers of images by their number of masks, none included.
      centers: masks by the cell of their centroid, on the image stretched to a square.
      sizes: masks by relative size, in ``SIZE_BINS`` equal bins of [0, 1].
      concavity: masks by stratum of relative size, and by concavity in ``CONCAVITY_BINS`` equal
        bins of [0, 1].
      size_units: sum of relative sizes, in units of 2**-40.
      concavity_units: sums of concavity by stratum, in the same units; Python's integers.
      skipped_images: images that could not be used, by reason.
      skipped_masks: masks of used images that could not be, by reason.
    """

    masks_per_image: Counter[int] = dataclasses.field(default_factory=Counter)
    centers: Int[np.ndarray, "c c"] = dataclasses.field(
        default_factory=lambda: _zeros(CENTER_CELLS, CENTER_CELLS)
    )
    sizes: Int[np.ndarray, "s"] = dataclasses.field(default_factory=lambda: _zeros(SIZE_BINS))
    concavity: Int[np.ndarray, "strata v"] = dataclasses.field(
        default_factory=lambda: _zeros(NUM_STRATA, CONCAVITY_BINS)
    )
    size_units: int = 0
    concavity_units: list[int] = dataclasses.field(default_factory=lambda: [0] * NUM_STRATA)
    skipped_images: Tally = dataclasses.field(default_factory=Tally)
    skipped_masks: Tally = dataclasses.field(default_factory=Tally)

    @property
    def num_masks(self) -> int:
        """All masks that were measured."""
        return int(self.sizes.sum())

    @property
    def num_images(self) -> int:
        """The images with at least one of them."""
        return self.masks_per_image.total() - self.masks_per_image[0]

    def add(self, image: ImageMasks) -> None:
        """Counts an image and its masks; what cannot be used of them is counted with its reason."""
        for detail in image.unusable:
            self.skipped_masks.add("unusable annotation", f"{image.name}: {detail}")
        runs = self._usable_runs(image)
        self.masks_per_image[len(runs)] += 1
        if runs:
            assert image.hw is not None
            self._add_shapes(mask_shapes(runs, image.hw), image.hw)

    def update(self, other: "MaskCounts") -> None:
        """Adds all that another object holds."""
        self.masks_per_image.update(other.masks_per_image)
        self.centers += other.centers
        self.sizes += other.sizes
        self.concavity += other.concavity
        self.size_units += other.size_units
        both = zip(self.concavity_units, other.concavity_units, strict=True)
        self.concavity_units = [a + b for a, b in both]
        self.skipped_images.update(other.skipped_images)
        self.skipped_masks.update(other.skipped_masks)

    def _usable_runs(self, image: ImageMasks) -> list[Int[np.ndarray, "_"]]:
        sizes = [rle_of.get("size") for rle_of in image.masks_rle]
        if image.hw is not None and all(size == list(image.hw) for size in sizes):
            try:
                found = rle.run_lengths_of_all(image.masks_rle)
            except rle.BadRleError:
                pass
            else:
                usable = [runs for runs in found if runs[1::2].any()]
                self._skip("empty", image.name, len(found) - len(usable))
                return usable
        return self._usable_one_by_one(image)

    def _usable_one_by_one(self, image: ImageMasks) -> list[Int[np.ndarray, "_"]]:
        usable = []
        for number, mask in enumerate(image.masks_rle):
            where = f"{image.name}: mask {number}"
            try:
                runs = rle.run_lengths(mask)
            except rle.BadRleError as error:
                self._skip("bad rle", f"{where}: {error}")
                continue
            if image.hw is None or tuple(mask["size"]) != image.hw:
                self._skip("size mismatch", f"{where} is {list(mask['size'])}, not {image.hw}")
            elif not runs[1::2].any():
                self._skip("empty", where)
            else:
                usable.append(runs)
        return usable

    def _skip(self, reason: str, example: str, number: int = 1) -> None:
        if number:
            self.skipped_masks.add(reason, example, number)

    def _add_shapes(self, shapes: MaskShapes, hw: tuple[int, int]) -> None:
        height, width = hw
        size = np.sqrt(shapes.area_px / (height * width))
        concavity = shapes.concavity
        cells = _bins(shapes.center_xy / np.array([width, height]), CENTER_CELLS)
        np.add.at(self.centers, (cells[:, 1], cells[:, 0]), 1)
        np.add.at(self.sizes, _bins(size, SIZE_BINS), 1)
        stratum = np.searchsorted(STRATUM_EDGES, size, side="right")
        np.add.at(self.concavity, (stratum, _bins(concavity, CONCAVITY_BINS)), 1)
        self.size_units += int(_units(size).sum())
        sums = _zeros(NUM_STRATA)
        np.add.at(sums, stratum, _units(concavity))
        self.concavity_units = [
            a + b for a, b in zip(self.concavity_units, sums.tolist(), strict=True)
        ]


def mean_of_units(units: int, number: int) -> float:
    """The mean of rates whose sum is kept in units."""
    return units / _UNITS / number


def _units(rates: Float[np.ndarray, "k"]) -> Int[np.ndarray, "k"]:
    return np.rint(rates * _UNITS).astype(np.int64)


def _bins(rates: Float[np.ndarray, "*shape"], count: int) -> Int[np.ndarray, "*shape"]:
    """Numbers of equal bins of [0, 1], whose end belongs to the last."""
    return np.minimum((rates * count).astype(np.int64), count - 1)
