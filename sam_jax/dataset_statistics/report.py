"""The statistics of data sets side by side: numbers for programs, a table for people."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sam_jax.arrays import Float
from sam_jax.data.tally import Tally
from sam_jax.dataset_statistics.counts import (
    IMAGE_BIN_ENDS,
    IMAGE_BINS,
    NUM_STRATA,
    SIZE_BINS,
    STRATUM_EDGES,
    MaskCounts,
    mean_of_units,
)

# Fewest masks that each data set must have in a stratum for it to be sampled from: the spread of a
# few would be drawn as if it were that of many.
MIN_MASKS_OF_STRATUM = 20
# A data set of fewer masks has no say in which strata there are, but for data sets like itself.
_MIN_MASKS_TO_CHOOSE = 10 * MIN_MASKS_OF_STRATUM
_SHOWN_SIZE_BINS = 100
_QUANTILES = (0.1, 0.5, 0.9)


@dataclasses.dataclass(frozen=True, eq=False)
class StoreStatistics:
    """The statistics of one data set.

    Attributes:
      name: of it.
      counts: all that was counted.
      left_out: what of it is not among its images, by reason.
      seconds: how long counting took.
    """

    name: str
    counts: MaskCounts
    left_out: Tally
    seconds: float

    @property
    def masks_per_image(self) -> float:
        """The mean number of masks of the images that have any."""
        return self.counts.num_masks / self.counts.num_images

    @property
    def image_rates(self) -> Float[np.ndarray, "5"]:
        """Rates of images by number of masks, in ``IMAGE_BINS``; images without masks left out."""
        rates = np.zeros(len(IMAGE_BINS))
        for number, images in self.counts.masks_per_image.items():
            if number:
                rates[np.searchsorted(IMAGE_BIN_ENDS, number)] += images
        return rates / self.counts.num_images

    @property
    def mean_size(self) -> float:
        """The mean relative size: the square root of mask area over image area."""
        return mean_of_units(self.counts.size_units, self.counts.num_masks)

    def size_quantile(self, rate: float) -> float:
        """A quantile of relative size, to half a thousandth."""
        below = np.cumsum(self.counts.sizes)
        place = int(np.searchsorted(below, rate * self.counts.num_masks))
        return (place + 0.5) / SIZE_BINS

    @property
    def mean_concavity(self) -> float:
        """The mean over all masks, whatever their size."""
        return mean_of_units(sum(self.counts.concavity_units), self.counts.num_masks)

    def stratified_concavity(
        self, strata: Sequence[int]
    ) -> tuple[float, Float[np.ndarray, "v"]] | None:
        """Mean and distribution of concavity, each stratum counting alike; None without strata.

        That is what sampling equally many masks from each stratum gives on average, without the
        chance of a draw. None as well if one of them has too few masks.
        """
        chosen = self.counts.concavity[list(strata)]
        numbers = chosen.sum(axis=1)
        if not strata or numbers.min() < MIN_MASKS_OF_STRATUM:
            return None
        units = (self.counts.concavity_units[stratum] for stratum in strata)
        means = [mean_of_units(u, n) for u, n in zip(units, numbers.tolist(), strict=True)]
        return float(np.mean(means)), (chosen / numbers[:, None]).mean(axis=0)


@dataclasses.dataclass(frozen=True, eq=False)
class DatasetReport:
    """The statistics of data sets, as ``sam-jax stats`` gives them.

    Source: Kirillov et al. 2023, section 5, figures 5 and 6.

    Attributes:
      stores: of each data set; each has masks.
      max_images: most images of each, or None.
      seed: of their draw.
    """

    stores: tuple[StoreStatistics, ...]
    max_images: int | None = None
    seed: int = 0

    @property
    def strata(self) -> list[int]:
        """The strata of relative size that every data set of some size has enough masks in."""
        numbers = np.stack([store.counts.concavity.sum(axis=1) for store in self.stores])
        has_say = numbers.sum(axis=1) >= _MIN_MASKS_TO_CHOOSE
        if has_say.any():
            numbers = numbers[has_say]
        return np.flatnonzero((numbers >= MIN_MASKS_OF_STRATUM).all(axis=0)).tolist()

    def as_json(self) -> dict[str, Any]:
        """All numbers, as values of JSON."""
        edges = [0.0, *STRATUM_EDGES, 1.0]
        return {
            "definitions": {
                "center": "centroid of the mask, image stretched to a square",
                "relative_size": "sqrt(mask area / image area)",
                "concavity": "1 - area / pixels in the convex hull of the mask's pixels",
                "stratified": "strata of relative size count alike, those in which every data set "
                f"of {_MIN_MASKS_TO_CHOOSE} masks has {MIN_MASKS_OF_STRATUM}",
            },
            "strata": {
                "relative_size": [[edges[i], edges[i + 1]] for i in range(NUM_STRATA)],
                "used": self.strata,
            },
            "max_images": self.max_images,
            "seed": self.seed,
            "datasets": {store.name: self._store_as_json(store) for store in self.stores},
        }

    def _store_as_json(self, store: StoreStatistics) -> dict[str, Any]:
        counts = store.counts
        stratified = store.stratified_concavity(self.strata)
        return {
            "num_images": counts.num_images,
            "num_images_without_mask": counts.masks_per_image[0],
            "num_masks": counts.num_masks,
            "masks_per_image": {
                "mean": store.masks_per_image,
                "image_rates": dict(zip(IMAGE_BINS, store.image_rates.tolist(), strict=True)),
                "num_images": {str(n): k for n, k in sorted(counts.masks_per_image.items()) if n},
            },
            "relative_size": {
                "mean": store.mean_size,
                "quantiles": {str(rate): store.size_quantile(rate) for rate in _QUANTILES},
                "num_masks": counts.sizes.reshape(_SHOWN_SIZE_BINS, -1).sum(axis=1).tolist(),
            },
            "concavity": {
                "mean": store.mean_concavity,
                "stratified_mean": None if stratified is None else stratified[0],
                "stratified_rates": None if stratified is None else stratified[1].tolist(),
                "num_masks_by_stratum": counts.concavity.tolist(),
            },
            "centers": counts.centers.tolist(),
            "skipped_images": dict(counts.skipped_images.counts),
            "skipped_masks": dict(counts.skipped_masks.counts),
            "left_out": dict(store.left_out.counts),
            "examples": counts.skipped_images.examples
            | counts.skipped_masks.examples
            | store.left_out.examples,
            "seconds": round(store.seconds, 2),
        }

    def print_table(self, console: Console) -> None:
        """Prints a row for each data set, and what was skipped in it, within 100 columns."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("data set", overflow="fold")
        headings = ("images", "masks", "per image", *IMAGE_BINS, "size", "concavity")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for store in self.stores:
            stratified = store.stratified_concavity(self.strata)
            table.add_row(
                # As it stands: names may hold what rich reads as markup.
                Text(store.name),
                f"{store.counts.num_images:,}",
                f"{store.counts.num_masks:,}",
                f"{store.masks_per_image:,.1f}",
                *(f"{rate:.0%}" for rate in store.image_rates),
                f"{store.size_quantile(0.5):.3f}",
                "" if stratified is None else f"{stratified[0]:.3f}",
            )
        console.print(table)
        console.print(
            "<=10 ... >200: images by their number of masks. size: median of sqrt(mask area / "
            f"image area). concavity: mean, {self.strata_text}.",
            highlight=False,
        )
        for store in self.stores:
            for what, tally in self._skipped(store).items():
                for line in tally.lines():
                    # As it stands: file names may hold what rich reads as markup.
                    console.print(f"{store.name}: {what}: {line}", markup=False, highlight=False)

    @property
    def strata_text(self) -> str:
        """The strata of sizes that concavity is sampled from, in words."""
        if not self.strata:
            return f"not given, as no stratum of sizes has {MIN_MASKS_OF_STRATUM} masks of each"
        edges = [0.0, *STRATUM_EDGES, 1.0]
        return (
            f"{len(self.strata)} strata of sizes from {edges[self.strata[0]]:.3f} to "
            f"{edges[self.strata[-1] + 1]:.3f} counting alike; none of a data set with fewer than "
            f"{MIN_MASKS_OF_STRATUM} masks in one"
        )

    @staticmethod
    def _skipped(store: StoreStatistics) -> dict[str, Tally]:
        found = {
            "left out of the data set": store.left_out,
            "skipped images": store.counts.skipped_images,
            "skipped masks": store.counts.skipped_masks,
        }
        if store.counts.masks_per_image[0]:
            without = Tally()
            without.add("have no mask", number=store.counts.masks_per_image[0])
            found["images that no statistic is of"] = without
        return {what: tally for what, tally in found.items() if tally}
