"""Masked reconstruction: how well a masked autoencoder predicts the patches that it does not see.

No number of the literature: He et al. 2022 judge pre-training by what comes after it. This one says
whether it still learns, on images that it does not train on.
"""

import base64
import dataclasses
import functools
import io
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sam_jax.arrays import Float, UInt8
from sam_jax.data.config import SourceConfig, build_source
from sam_jax.data.corruption import NoObjectsError
from sam_jax.data.crops import central_crop
from sam_jax.data.pipeline import EvalSamples, ReadSample, eval_images
from sam_jax.data.tally import Tally
from sam_jax.data.truth_digest import truth_digest
from sam_jax.errors import ConfigError
from sam_jax.evaluation.clicks import keyed_number
from sam_jax.evaluation.draw import draw
from sam_jax.evaluation.evaluation import Measures, Record
from sam_jax.evaluation.mean_ious import MEAN
from sam_jax.evaluation.targets import NotFiniteError
from sam_jax.image_channels import rgb_view
from sam_jax.inference.predictor import Buckets
from sam_jax.inference.reconstructor import Reconstructor
from sam_jax.visualize import grid

_LOSS = "loss"
_PANELS = ("image", "seen", "reconstructed")
# Options that change how fast records are made, but not what they say.
_WITHOUT_INFLUENCE = ("images_per_call",)


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """Images to reconstruct.

    Attributes:
      sources: datasets, see ``data.config.SourceConfig``; masks are not looked at.
      max_images: of each dataset, drawn by the seed; None for all.
      images_per_call: images that the model answers at once, on all devices.
      num_examples: images in the picture.
      seed: of the patches that are dropped, which are the same ones at every evaluation.
    """

    sources: tuple[Any, ...]
    max_images: int | None = None
    images_per_call: int = 16
    num_examples: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        sources = tuple(
            source if isinstance(source, SourceConfig) else SourceConfig.from_dict(source)
            for source in self.sources
        )
        object.__setattr__(self, "sources", sources)
        names = [source.name or source.kind for source in sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"needs datasets with different names, got {names}")
        if self.images_per_call < 1 or self.num_examples < 0:
            raise ValueError("images_per_call must be at least 1, and num_examples at least 0")
        if self.max_images is not None and self.max_images < 1:
            raise ValueError("max_images must be at least 1, or None")


class MaskedReconstruction:
    """Images of datasets, from a quarter of their patches: an ``Evaluation``.

    An image is the largest part in its middle that has the form of the model's input. A record
    holds the dataset, the name of the image and its loss; some, by the seed, hold a picture. Of an
    image that cannot be used it holds why.

    Args:
      config: the datasets.
      in_channels: of the images that the model takes; None for 8-bit RGB.

    Raises:
      FileNotFoundError: a dataset is not where the config says.
      ConfigError: a source lacks an option or has one too many.
    """

    def __init__(self, config: ReconstructionConfig, in_channels: int | None = None):
        self._config = config
        try:
            self._sources = [build_source(source, in_channels) for source in config.sources]
        except ValueError as error:
            raise ConfigError(f"a dataset of the evaluation: {error}") from error
        self._places = [
            (source, index)
            for source in self._sources
            for index in draw(len(source), config.max_images, f"{config.seed}/{source.name}")
        ]
        self._shown = set(
            draw(len(self._places), config.num_examples, f"{config.seed}/examples")
            if config.num_examples
            else ()
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The options that records depend on, and how many images each dataset has.

        With a digest of each dataset's images, see ``truth_digest``, so that others are answered
        anew.
        """
        settings = dataclasses.asdict(self._config)
        for name in _WITHOUT_INFLUENCE:
            del settings[name]
        counts = Counter(source.name for source, _ in self._places)
        return settings | {"num_images": dict(counts), "truth_digests": self._truth_digests}

    @functools.cached_property
    def _truth_digests(self) -> dict[str, str]:
        """Read when they are first asked for, as only records that are kept need them."""
        return {
            source.name: truth_digest(source, [i for other, i in self._places if other is source])
            for source in self._sources
        }

    def __len__(self) -> int:
        """The number of images of all datasets."""
        return len(self._places)

    def buckets(self, num_devices: int) -> Buckets:
        """One size of calls."""
        return Buckets(images=(-(-self._config.images_per_call // num_devices),))

    def records(self, reconstructor: Reconstructor, indices: Iterable[int]) -> Iterator[Record]:
        """The record of each of these images; see ``Evaluation``.

        Raises:
          TooManyCorruptSamplesError: more of a dataset is unusable than is tolerated.
          NotFiniteError: a loss is no number.
        """
        samples: dict[str, EvalSamples] = {s.name: eval_images(s) for s in self._sources}
        together: list[tuple[int, str, ReadSample]] = []
        for number in indices:
            source, index = self._places[number]
            together.append((number, source.name, samples[source.name].read(index)))
            if len(together) == reconstructor.images_per_call:
                yield from self._answered(reconstructor, together)
                together = []
        yield from self._answered(reconstructor, together)

    def _answered(
        self, reconstructor: Reconstructor, together: Sequence[tuple[int, str, ReadSample]]
    ) -> Iterator[Record]:
        """Records of images that fit into a call."""
        usable = [
            (dataset, read.name, read.example.image)
            for _, dataset, read in together
            if read.example is not None
        ]
        if usable:
            size, num_patches = reconstructor.model_hw, reconstructor.num_patches
            images = np.stack([central_crop(image, size) for _, _, image in usable])
            noise = np.stack([self._noise(of, name, num_patches) for of, name, _ in usable])
            answers = reconstructor.reconstruct(images, noise)
            _check_finite(answers.losses, [name for _, name, _ in usable])
        row = 0
        for number, dataset, read in together:
            record: Record = {"dataset": dataset, "image": read.name}
            if cases := {what: list(found) for what, found in read.remarked.items() if found}:
                record["remarked"] = cases
            if read.example is not None:
                record[_LOSS] = float(answers.losses[row])
                if number in self._shown:
                    panels = (images[row], answers.seen(row), answers.whole(row))
                    record["picture"] = _encoded(rgb_view(np.concatenate(panels, axis=1)))
                row += 1
            yield record

    def _noise(self, dataset: str, image: str, num_patches: int) -> Float[np.ndarray, " k"]:
        """Random numbers of an image's patches: the same wherever the data set lies."""
        file = image.rpartition("/")[2]
        rng = np.random.default_rng(keyed_number(f"{self._config.seed}/{dataset}/{file}"))
        return rng.random(num_patches, np.float32)

    def report(self, records: Sequence[Record], seconds: float) -> "ReconstructionReport":
        """Mean losses by dataset, with pictures; see ``Evaluation``."""
        skipped = Tally()
        for source in self._sources:
            skipped.update(source.left_out)
        for record in records:
            for what, cases in record.get("remarked", {}).items():
                for reason, case in cases:
                    skipped.add(f"{what} ({reason})", case)
        counts = Counter(record["dataset"] for record in records if _LOSS in record)
        for source in self._sources:
            if not counts[source.name]:
                raise NoObjectsError(
                    f"{source.name} has no image to evaluate on; skipped: {skipped}"
                )
        pictures = [_decoded(record["picture"]) for record in records if "picture" in record]
        names = [record["image"] for record in records if "picture" in record]
        return ReconstructionReport(
            losses=losses(records, {})(np.ones(len(records))),
            num_images=dict(counts),
            skipped=skipped,
            settings=dataclasses.asdict(self._config),
            seconds=seconds,
            pictures={"reconstructions": _sheet(pictures, names)} if pictures else {},
        )


@dataclasses.dataclass(frozen=True)
class ReconstructionReport:
    """The result of masked reconstruction.

    Attributes:
      losses: mean over the images of each dataset under ``dataset/loss``, and the unweighted mean
        of these under ``mean/loss``. Of normalised pixels, 1 is what a patch's own mean gives.
      num_images: by dataset.
      skipped: what was not used.
      settings: the configuration, as plain values.
      seconds: how long it took on this host.
      pictures: RGB pictures by name.
    """

    losses: Mapping[str, float]
    num_images: Mapping[str, int]
    skipped: Tally
    settings: Mapping[str, Any]
    seconds: float = dataclasses.field(compare=False)
    pictures: Mapping[str, UInt8[np.ndarray, "_ _ 3"]] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    def as_flat_dict(self) -> dict[str, float]:
        """The mean losses by name."""
        return dict(self.losses)

    def as_json(self) -> dict[str, Any]:
        """Everything but the pictures, as values of JSON."""
        return {
            "losses": dict(self.losses),
            "num_images": dict(self.num_images),
            "skipped": dict(self.skipped.counts),
            "examples": dict(self.skipped.examples),
            "settings": dict(self.settings),
            "seconds": round(self.seconds, 1),
        }

    def print_table(self, console: Console | None = None) -> None:
        """Prints the mean losses, within 100 columns."""
        console = console or Console(width=None if sys.stdout.isatty() else 100)
        table = Table(title="Masked reconstruction", title_style="bold", box=box.SIMPLE_HEAD)
        table.add_column("dataset")
        table.add_column("images", justify="right")
        table.add_column("loss", justify="right")
        for name, number in self.num_images.items():
            # As it stands: names may hold what rich reads as markup.
            table.add_row(Text(name), f"{number:,}", f"{self.losses[f'{name}/{_LOSS}']:.4f}")
        if len(self.num_images) > 1:
            table.add_row(MEAN, "", f"{self.losses[f'{MEAN}/{_LOSS}']:.4f}", style="bold")
        console.print(table)
        for line in self.skipped.lines():
            # As it stands: file names may hold what rich reads as markup.
            console.print(f"skipped or remarked: {line}", markup=False, highlight=False)


def losses(records: Sequence[Record], settings: Mapping[str, Any]) -> Measures:
    """Mean losses by dataset, ``dataset/loss``, and of the datasets, ``mean/loss``.

    Args:
      records: of ``MaskedReconstruction``; those without a loss count for nothing.
      settings: of it; nothing depends on them.
    """
    del settings
    by_dataset: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        if _LOSS in record:
            by_dataset.setdefault(record["dataset"], []).append(number)
    found = np.array([record.get(_LOSS, np.nan) for record in records])

    def measures(multiplicities: Float[np.ndarray, "n"]) -> dict[str, float]:
        means = {
            name: float(multiplicities[rows] @ found[rows] / multiplicities[rows].sum())
            if multiplicities[rows].any()
            else float("nan")
            for name, rows in by_dataset.items()
        }
        mean = {f"{MEAN}/{_LOSS}": float(np.mean(list(means.values())))} if means else {}
        return mean | {f"{name}/{_LOSS}": value for name, value in means.items()}

    return measures


def _check_finite(losses: Float[np.ndarray, " n"], names: Sequence[str]) -> None:
    for loss, name in zip(losses.tolist(), names, strict=True):
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"{name}: the loss is {loss}, expected a finite number; the training diverged, or "
                "the file of the weights is damaged: evaluate an earlier checkpoint"
            )


def _sheet(
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]], names: Sequence[str]
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Three panels a row: the image, what the encoder sees of it, and what it makes of that."""
    panels, captions = [], []
    for picture, name in zip(pictures, names, strict=True):
        panels += np.split(picture, len(_PANELS), axis=1)
        captions += [name.rpartition("/")[2], *_PANELS[1:]]
    return grid(panels, captions, columns=len(_PANELS))


def _encoded(picture: UInt8[np.ndarray, "_ _ 3"]) -> str:
    """A picture as a value of JSON."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def _decoded(text: str) -> UInt8[np.ndarray, "_ _ 3"]:
    """The picture that ``_encoded`` was given."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
