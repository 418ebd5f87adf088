"""Segmentation from prompts: clicks and boxes that ask for the masks of datasets."""

import dataclasses
import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from sam_jax import rle
from sam_jax.data.config import SourceConfig, build_source
from sam_jax.data.pipeline import EvalExample, EvalSamples, eval_samples
from sam_jax.data.samples import Sample
from sam_jax.data.sources import Source, truth_of
from sam_jax.data.truth_digest import truth_digest
from sam_jax.errors import ConfigError
from sam_jax.evaluation.baselines import (
    BOX_BASELINES,
    DISK_BASELINE,
    disk_ious,
    disk_measure,
)
from sam_jax.evaluation.clicks import first_click
from sam_jax.evaluation.draw import draw, draw_until
from sam_jax.evaluation.evaluation import Record
from sam_jax.evaluation.gallery import sheet
from sam_jax.evaluation.metrics import mask_iou
from sam_jax.evaluation.protocols import PROTOCOLS
from sam_jax.evaluation.protocols.protocol import Outcome, ProtocolContext
from sam_jax.evaluation.report import EvalReport, summarize
from sam_jax.evaluation.targets import EvalImage, TargetBatch, TargetMask, make_batches
from sam_jax.image_channels import rgb_view
from sam_jax.inference.predictor import Buckets, Predictor

BASELINES = (DISK_BASELINE, *BOX_BASELINES)
# Batches that are under way at once: while the host scores one, the device decodes another.
_BATCHES_UNDER_WAY = 2
_ROW_LENGTH = 4
# Options that change how fast records are made, or what is drawn of them, but not what they say.
_WITHOUT_INFLUENCE = ("images_per_call", "prompts_per_call", "num_examples")

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Datasets, protocols and limits of an evaluation.

    Attributes:
      sources: the datasets, each under its own name. SourceConfigs; they may be given as mappings
        of their fields.
      protocols: ways of prompting, of ``center``, ``random`` (where the first click goes),
        ``center_points_only``, ``random_points_only`` (the same without feeding the logits of the
        last answer back) and ``box``.
      num_clicks: after how many clicks there is a score.
      baselines: what else answers the prompts, of ``disk``, ``box_filled``, ``box_ellipse`` and
        ``box_grabcut``, which takes by far the longest. They are scored once per evaluator.
      target_masks: of a dataset that has more than 1.5 times as many masks, images are drawn by
        ``seed`` until they have so many (``draw.draw_until``); None takes all.
      max_images: most images of each dataset, drawn by ``seed``; None takes all. With
        ``target_masks``, of the images that it draws.
      max_masks_per_image: most masks of each image, drawn by ``seed``; None takes all.
      images_per_call: images that are encoded together.
      prompts_per_call: masks of each of them that are decoded together, on average: of fewer images
        with more masks, or of more images with fewer.
      seed: of the draws and of random first clicks.
      num_examples: masks of each sort (worst, typical, best) in the picture of examples; 0 makes
        no pictures at all.
    """

    sources: tuple[Any, ...]
    protocols: tuple[str, ...] = ("center", "random", "box")
    num_clicks: tuple[int, ...] = (1, 2, 3, 5, 9)
    baselines: tuple[str, ...] = ()
    target_masks: int | None = None
    max_images: int | None = None
    max_masks_per_image: int | None = None
    images_per_call: int = 4
    prompts_per_call: int = 8
    seed: int = 0
    num_examples: int = 2

    def __post_init__(self) -> None:
        sources = tuple(
            s if isinstance(s, SourceConfig) else SourceConfig.from_dict(s) for s in self.sources
        )
        object.__setattr__(self, "sources", sources)
        self._check()

    def _check(self) -> None:
        for field, known in (("protocols", PROTOCOLS), ("baselines", BASELINES)):
            unknown = sorted(set(getattr(self, field)) - set(known))
            if unknown:
                raise ValueError(f"{field} {unknown} do not exist; there are {list(known)}")
        names = [source.name or source.kind for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"needs datasets with different names, got {names}")
        clicks = self.num_clicks
        if not clicks or min(clicks) < 1 or list(clicks) != sorted(set(clicks)):
            raise ValueError(f"num_clicks must rise from 1 or more, got {clicks}")
        if not self.protocols or min(self.images_per_call, self.prompts_per_call) < 1:
            raise ValueError("needs a protocol, and an image and a prompt per call")
        limits = (self.target_masks, self.max_images, self.max_masks_per_image)
        if any(limit is not None and limit < 1 for limit in limits):
            raise ValueError(
                "target_masks, max_images and max_masks_per_image must be at least 1, or None"
            )


class PromptedMasks:
    """The masks of datasets, asked for by the protocols of a config: an ``Evaluation``.

    A record holds the dataset, the name of the image and, by the masks that were asked for, their
    IoUs by measure; the last answer of the first protocol as run lengths, and the clicks that led
    to it. Of an image that cannot be used it holds why.

    Args:
      config: datasets and protocols.
      in_channels: of the images that the model takes; None for 8-bit RGB.

    Raises:
      FileNotFoundError: a dataset is not where the config says.
      ConfigError: a source lacks an option or has one too many.
    """

    def __init__(self, config: EvalConfig, in_channels: int | None = None):
        self._config = config
        try:
            self._sources = [_Drawn(build_source(s, in_channels), config) for s in config.sources]
        except ValueError as error:
            raise ConfigError(f"a dataset of the evaluation: {error}") from error
        self._places = [(source, index) for source in self._sources for index in range(len(source))]
        self._protocols = [PROTOCOLS[name] for name in config.protocols]
        first_clicks = dict.fromkeys(protocol.first_click for protocol in self._protocols)
        self._first_clicks = [rule for rule in first_clicks if rule is not None]
        # Baselines do not depend on the variables: the first run scores them for all, by the
        # example's number and the mask's.
        self._baselines: dict[tuple[int, int], dict[str, float]] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The options that scores depend on, and how many images each dataset has.

        With a digest of each dataset's truth, so that corrected annotations are scored anew.
        """
        settings = dataclasses.asdict(self._config)
        for name in _WITHOUT_INFLUENCE:
            del settings[name]
        num_images = {s.name: len(s) for s in self._sources}
        return settings | {"num_images": num_images, "truth_digests": self._truth_digests}

    @functools.cached_property
    def _truth_digests(self) -> dict[str, str]:
        """Read when they are first asked for, as only records that are kept need them."""
        return {s.name: truth_digest(s, range(len(s))) for s in self._sources}

    def __len__(self) -> int:
        """The number of images of all datasets."""
        return len(self._places)

    def buckets(self, num_devices: int) -> Buckets:
        """One size of each kind, so that the model compiles once per kind of prompt.

        Those are a first click or a box, and any number of clicks more.
        """
        config = self._config
        num_rows = config.images_per_call * -(-config.prompts_per_call // self._row_length)
        return Buckets(
            images=(-(-config.images_per_call // num_devices),),
            rows=(-(-num_rows // num_devices),),
            prompts=(self._row_length,),
            points=sorted({1, max(config.num_clicks)}),
        )

    @property
    def _row_length(self) -> int:
        """Masks in a row, all of one image: few, as the rest of a row is decoded for nothing."""
        return min(self._config.prompts_per_call, _ROW_LENGTH)

    def records(self, predictor: Predictor, indices: Iterable[int]) -> Iterator[Record]:
        """The record of each of these images; see ``Evaluation``.

        Raises:
          TooManyCorruptSamplesError: more of a dataset is unusable than is tolerated.
          NotFiniteError: the model answers with logits that are no numbers.
        """
        waiting: deque[_Waiting] = deque()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            context = ProtocolContext(predictor, self._config.num_clicks, self._config.seed, pool)

            def run(batch: TargetBatch) -> tuple[list[list[Outcome]], list[dict[str, float]]]:
                baselines = list(pool.map(self._scored_baselines, batch.targets))
                return [protocol.run(batch, context) for protocol in self._protocols], baselines

            for outcomes, baselines in _in_order(run, self._batches(predictor, indices, waiting)):
                by_image = {w.image: w for w in waiting if w.image is not None}
                for of_target in zip(*outcomes, strict=True):
                    by_image[of_target[0].target.image].add(of_target)
                for outcome, ious in zip(outcomes[0], baselines, strict=True):
                    by_image[outcome.target.image].masks[outcome.target.position]["ious"] |= ious
                while waiting and waiting[0].is_complete:
                    yield waiting.popleft().record()
        yield from (left.record() for left in waiting)

    def _batches(
        self, predictor: Predictor, indices: Iterable[int], waiting: "deque[_Waiting]"
    ) -> Iterator[TargetBatch]:
        """All masks of these images in batches; adds the images to those that are waited for."""
        buckets, num_devices = self.buckets(predictor.num_devices), predictor.num_devices
        num_rows, row_length = buckets.rows[0] * num_devices, self._row_length
        images = self._images(indices, waiting)
        encoded = iter(lambda: list(itertools.islice(images, buckets.images[0] * num_devices)), [])
        for together in _groups(encoded, num_rows, row_length):
            yield from make_batches(predictor, together, num_rows=num_rows, row_length=row_length)

    def _images(self, indices: Iterable[int], waiting: "deque[_Waiting]") -> Iterator[EvalImage]:
        samples: dict[str, EvalSamples] = {s.name: eval_samples(s) for s in self._sources}
        for number in indices:
            source, index = self._places[number]
            read = samples[source.name].read(index)
            image = None
            if read.example is not None:
                image = self._prepare(source.name, read.example, number)
            waiting.append(_Waiting(source.name, read.name, image, read.remarked))
            if image is not None:
                yield image

    def _prepare(self, dataset: str, example: EvalExample, number: int) -> EvalImage:
        config = self._config
        file = example.name.rpartition("/")[2]
        chosen = draw(
            len(example.mask_runs), config.max_masks_per_image, f"{config.seed}/{dataset}/{file}"
        )
        return EvalImage(
            dataset=dataset,
            name=example.name,
            pixels=example.image,
            masks=example.decode_masks(chosen),
            mask_indices=tuple(chosen),
            number=number,
        )

    def _scored_baselines(self, target: TargetMask) -> dict[str, float]:
        """IoUs of what else answers the prompts for a mask, by measure."""
        place = (target.image.number, target.mask_index)
        if place not in self._baselines:
            self._baselines[place] = self._run_baselines(target)
        return self._baselines[place]

    def _run_baselines(self, target: TargetMask) -> dict[str, float]:
        ground_truth, ious = target.ground_truth, {}
        for name in self._config.baselines:
            if name in BOX_BASELINES:
                prediction = BOX_BASELINES[name].mask(
                    rgb_view(target.image.pixels), target.box_xyxy
                )
                ious[name] = mask_iou(prediction, ground_truth)
                continue
            for rule in self._first_clicks:
                click = first_click(rule, ground_truth, f"{self._config.seed}/{target.key}")
                for rate, iou in disk_ious(ground_truth, click).items():
                    ious[disk_measure(rule, rate)] = iou
        return ious

    def report(self, records: Sequence[Record], seconds: float) -> EvalReport:
        """Mean IoUs by dataset and measure, with examples and curves; see ``Evaluation``."""
        config = self._config
        report = summarize(
            records,
            {source.name: source.left_out for source in self._sources},
            config.num_clicks,
            settings=dataclasses.asdict(config),
            seconds=seconds,
        )
        if not config.num_examples:
            return report
        measure = self._protocols[0].headline(config.num_clicks)
        pictures = {"examples": sheet(records, measure, config.num_examples, self._read)}
        # Of a box there is a level, which alone makes no diagram.
        if self._first_clicks:
            pictures["curves"] = report.curves()
        return dataclasses.replace(report, pictures=pictures)

    def _read(self, number: int) -> EvalExample:
        source, index = self._places[number]
        read = eval_samples(source).read(index)
        if read.example is None:
            raise ConfigError(f"{read.name}: was damaged while {source.name} was evaluated on")
        return read.example


class _Waiting:
    """An image whose masks are not all answered yet, or one that cannot be used."""

    def __init__(
        self,
        dataset: str,
        name: str,
        image: EvalImage | None,
        remarked: Mapping[str, Sequence[tuple[str, str]]],
    ):
        self.image = image
        self.masks: dict[int, dict[str, Any]] = {}
        self._record: Record = {"dataset": dataset, "image": name}
        if cases := {what: list(found) for what, found in remarked.items() if found}:
            self._record["remarked"] = cases

    @property
    def is_complete(self) -> bool:
        """True if every mask has been answered."""
        return self.image is None or len(self.masks) == len(self.image.masks)

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Adds a mask's outcomes by all protocols."""
        first = outcomes[0]
        ious = {measure: iou for outcome in outcomes for measure, iou in outcome.ious.items()}
        hw = (first.prediction.shape[0], first.prediction.shape[1])
        self.masks[first.target.position] = {
            "mask": first.target.mask_index,
            "ious": ious,
            "clicks": [[int(value) for value in click] for click in first.clicks],
            "counts": rle.encode_part(first.prediction, hw)["counts"].decode(),
        }

    def record(self) -> Record:
        if self.image is None:
            return self._record
        return self._record | {"masks": [self.masks[p] for p in range(len(self.image.masks))]}


class _Drawn:
    """The images of a source that are evaluated on, as a source."""

    def __init__(self, source: Source, config: EvalConfig):
        self.name = source.name
        self.left_out = source.left_out
        self._source = source
        key = f"{config.seed}/{source.name}"
        indices: Sequence[int] = range(len(source))
        if config.target_masks is not None:
            indices = draw_until(source, config.target_masks, key)
        self._indices = [indices[at] for at in draw(len(indices), config.max_images, key)]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._source[self._indices[index]]

    def truth(self, index: int) -> bytes:
        """Content as the source has it."""
        return truth_of(self._source, self._indices[index])


def _groups(
    encoded: Iterable[list[EvalImage]], num_rows: int, row_length: int
) -> Iterator[list[EvalImage]]:
    """Images whose masks are decoded together: of as many calls of the encoder as fill the rows."""
    group: list[EvalImage] = []
    filled = 0
    for images in encoded:
        more = sum(-(-len(image.masks) // row_length) for image in images)
        if group and filled + more > num_rows:
            yield group
            group, filled = [], 0
        group, filled = [*group, *images], filled + more
    if group:
        yield group


def _in_order(
    function: Callable[[TargetBatch], _Result], batches: Iterable[TargetBatch]
) -> Iterator[_Result]:
    """Results for all batches, in order, some being worked on in other threads meanwhile."""
    under_way: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(_BATCHES_UNDER_WAY) as lanes:
        for batch in batches:
            under_way.append(lanes.submit(function, batch))
            if len(under_way) > _BATCHES_UNDER_WAY:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
