"""The evaluation of a model on datasets: one object for training and for ``eval.py``."""

import dataclasses
import heapq
import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sam_jax.configuration import from_mapping
from sam_jax.data.config import SourceConfig, build_source
from sam_jax.data.corruption import NoObjectsError
from sam_jax.data.pipeline import EvalExample, eval_samples
from sam_jax.data.samples import Sample
from sam_jax.data.sources import Source
from sam_jax.errors import ConfigError
from sam_jax.evaluation.baselines import (
    BOX_BASELINES,
    DISK_BASELINE,
    DISK_RADIUS_RATES,
    best_disk,
    disk_ious,
)
from sam_jax.evaluation.clicks import FirstClick, first_click, keyed_number
from sam_jax.evaluation.gallery import Gallery
from sam_jax.evaluation.metrics import IouTotals, gather_totals, mask_iou, mean_over_datasets
from sam_jax.evaluation.protocols import PROTOCOLS
from sam_jax.evaluation.protocols.protocol import Outcome, ProtocolContext
from sam_jax.evaluation.report import DatasetReport, EvalReport
from sam_jax.evaluation.targets import EvalImage, TargetBatch, TargetMask, make_batches
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.models.sam import Sam
from sam_jax.ops.dispatch import Kernels

BASELINES = (DISK_BASELINE, *BOX_BASELINES)
# Batches that are under way at once: while the host scores one, the device decodes another.
_BATCHES_UNDER_WAY = 2
# What is counted besides the reasons for leaving something out.
_IMAGES, _MASKS = "images", "masks"

_Result = TypeVar("_Result")
# A dataset's name and the IoUs of one of its masks, by measure.
_Scored: TypeAlias = tuple[str, dict[str, float]]


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
      max_images: most images of each dataset, drawn by ``seed``; None takes all.
      max_masks_per_image: most masks of each image, drawn by ``seed``; None takes all.
      images_per_call: images that are encoded together, and rows that are decoded together.
      prompts_per_call: masks in a row, all of one image; an image with more takes several rows.
      seed: of the draws and of random first clicks.
      num_examples: masks of each sort (worst, typical, best) in the picture of examples; 0 makes
        no pictures at all.
    """

    sources: tuple[Any, ...]
    protocols: tuple[str, ...] = ("center", "random", "box")
    num_clicks: tuple[int, ...] = (1, 2, 3, 5, 9)
    baselines: tuple[str, ...] = ()
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
        limits = (self.max_images, self.max_masks_per_image)
        if any(limit is not None and limit < 1 for limit in limits):
            raise ValueError("max_images and max_masks_per_image must be at least 1, or None")


class Evaluator:
    """Evaluates variables of one model on fixed datasets.

    Built once: datasets are opened, and every later call reuses what the first one compiled. A
    call depends on nothing but the variables. With several hosts, each evaluates its own share of
    the images, all must call together, and all get the same numbers; pictures show the host's own
    share.

    Args:
      model: the model.
      config: datasets and protocols.
      devices: of this host; by default all.
      kernels: see ``ops.dispatch.Target``.
      show_progress: whether to draw a bar on the terminal, if there is one.
      predictor: which answers in place of the model's own, for comparisons.

    Raises:
      FileNotFoundError: a dataset is not where the config says.
      ConfigError: a source lacks an option or has one too many.
    """

    def __init__(
        self,
        model: Sam,
        config: EvalConfig,
        *,
        devices: Sequence[jax.Device] | None = None,
        kernels: Kernels = "auto",
        show_progress: bool = False,
        predictor: Any = None,
    ):
        self._config = config
        self._shows_progress = show_progress and jax.process_index() == 0 and sys.stderr.isatty()
        try:
            self._sources = [_Drawn(build_source(s), config) for s in config.sources]
        except ValueError as error:
            raise ConfigError(f"a dataset of the evaluation: {error}") from error
        devices = devices or jax.local_devices()
        rows_per_device = -(-config.images_per_call // len(devices))
        self._num_rows = rows_per_device * len(devices)
        # One size of each kind, so that the model compiles once per kind of prompt: a first click
        # or a box, and any number of clicks more.
        buckets = Buckets(
            images=(rows_per_device,),
            rows=(rows_per_device,),
            prompts=(config.prompts_per_call,),
            points=sorted({1, max(config.num_clicks)}),
        )
        # Each call brings its variables.
        self._predictor = predictor or Predictor(
            model, {}, buckets, devices=devices, kernels=kernels
        )
        self._protocols = [PROTOCOLS[name] for name in config.protocols]
        first_clicks = dict.fromkeys(protocol.first_click for protocol in self._protocols)
        self._first_clicks = [rule for rule in first_clicks if rule is not None]
        # One case of all that was skipped, by dataset and reason; of this host's share.
        self._examples: dict[str, dict[str, str]] = {s.name: {} for s in self._sources}
        # Baselines do not depend on the variables: the first call scores them for all.
        self._baseline_totals: IouTotals | None = None

    def __call__(self, variables: Mapping[str, Any]) -> EvalReport:
        """Scores of a model with these variables.

        Args:
          variables: ``{"params": ..., "constants": ...}``; with several hosts, shards of global
            arrays are gathered onto each device.

        Raises:
          TooManyCorruptSamplesError: more of a dataset is unusable than is tolerated.
          NoObjectsError: a dataset has no mask to evaluate on.
          NotFiniteError: the model answers with logits that are no numbers.
        """
        start = time.monotonic()
        predictor = self._predictor.with_variables(variables)
        totals, baseline_totals = IouTotals(), IouTotals()
        headline = self._protocols[0].headline(self._config.num_clicks)
        gallery = Gallery(headline, self._config.num_examples)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            context = ProtocolContext(predictor, self._config.num_clicks, self._config.seed, pool)

            def evaluate(batch: TargetBatch) -> tuple[list[Outcome], list[_Scored]]:
                needs_baselines = self._baseline_totals is None
                scored = self._run_baselines(batch, pool) if needs_baselines else []
                outcomes = [o for p in self._protocols for o in p.run(batch, context)]
                return outcomes, scored

            for outcomes, scored in _in_order(evaluate, self._batches(predictor, totals)):
                for dataset, ious in scored:
                    baseline_totals.add(dataset, ious)
                for outcome in outcomes:
                    totals.add(outcome.target.image.dataset, outcome.ious)
                    gallery.offer(outcome)
        if self._baseline_totals is None:
            self._baseline_totals = baseline_totals
        totals.merge(self._baseline_totals)
        return self._report(gather_totals(totals), gallery, start)

    def _batches(self, predictor: Predictor, totals: IouTotals) -> Iterator[TargetBatch]:
        images = self._images(totals)
        while together := list(itertools.islice(images, self._num_rows)):
            yield from make_batches(
                predictor,
                together,
                num_rows=self._num_rows,
                row_length=self._config.prompts_per_call,
            )

    def _images(self, totals: IouTotals) -> Iterator[EvalImage]:
        """This host's share of the images; counts what it meets."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns,
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not self._shows_progress,
            transient=True,
        ) as progress:
            for source in self._sources:
                share = range(jax.process_index(), len(source), jax.process_count())
                samples = eval_samples(
                    source, process_index=jax.process_index(), process_count=jax.process_count()
                )
                task = progress.add_task(source.name, total=len(share))
                for example in samples:
                    image = self._prepare(source.name, example)
                    totals.count(source.name, _IMAGES)
                    totals.count(source.name, _MASKS, len(image.masks))
                    yield image
                    progress.advance(task)
                for what, tally in samples.counted.items():
                    for reason, number in tally.counts.items():
                        totals.count(source.name, f"{what} ({reason})", number)
                    for reason, example in tally.examples.items():
                        self._examples[source.name][f"{what} ({reason})"] = example
                # Every process has opened the whole source.
                if jax.process_index() == 0:
                    for reason, number in source.left_out.counts.items():
                        totals.count(source.name, reason, number)
                self._examples[source.name] |= source.left_out.examples

    def _prepare(self, dataset: str, example: EvalExample) -> EvalImage:
        config = self._config
        file = example.name.rpartition("/")[2]
        chosen = _draw(
            len(example.masks), config.max_masks_per_image, f"{config.seed}/{dataset}/{file}"
        )
        return EvalImage(
            dataset=dataset,
            name=example.name,
            pixels=example.image,
            masks=example.masks[chosen],
            mask_indices=tuple(chosen),
        )

    def _run_baselines(self, batch: TargetBatch, pool: Executor) -> list[_Scored]:
        def score(target: TargetMask) -> _Scored:
            ground_truth, pixels = target.ground_truth, target.image.pixels
            ious = {}
            for name in self._config.baselines:
                if name in BOX_BASELINES:
                    prediction = BOX_BASELINES[name].mask(pixels, target.box_xyxy)
                    ious[name] = mask_iou(prediction, ground_truth)
                    continue
                for rule in self._first_clicks:
                    click = first_click(rule, ground_truth, f"{self._config.seed}/{target.key}")
                    for rate, iou in disk_ious(ground_truth, click).items():
                        ious[_disk_measure(rule, rate)] = iou
            return target.image.dataset, ious

        return list(pool.map(score, batch.targets))

    def _report(self, totals: IouTotals, gallery: Gallery, start: float) -> EvalReport:
        found, counts = totals.means(), totals.counts()
        means = {s.name: found[s.name] for s in self._sources if s.name in found}
        disk_radius_rates = {}
        if DISK_BASELINE in self._config.baselines and means:
            for rule in self._first_clicks:
                by_rate = [
                    {rate: m.pop(_disk_measure(rule, rate)) for rate in DISK_RADIUS_RATES}
                    for m in means.values()
                ]
                rate = best_disk(by_rate)
                disk_radius_rates[f"{DISK_BASELINE}_{rule}"] = rate
                for miou, ious in zip(means.values(), by_rate, strict=True):
                    miou[f"{DISK_BASELINE}_{rule}"] = ious[rate]
        datasets = []
        for source in self._sources:
            events = counts.get(source.name, {})
            num_images, num_masks = events.pop(_IMAGES, 0), events.pop(_MASKS, 0)
            if not num_masks:
                raise NoObjectsError(
                    f"{source.name}: none of {len(source)} samples has a mask to evaluate on; "
                    f"skipped: {events}"
                )
            miou = means.get(source.name, {})
            examples = dict(self._examples[source.name])
            datasets.append(
                DatasetReport(source.name, num_images, num_masks, events, miou, examples)
            )
        report = EvalReport(
            datasets=tuple(datasets),
            mean=mean_over_datasets(means),
            num_clicks=self._config.num_clicks,
            disk_radius_rates=disk_radius_rates,
            settings=dataclasses.asdict(self._config),
            seconds=time.monotonic() - start,
        )
        pictures = {}
        if self._config.num_examples and means:
            examples = gallery.picture()
            if examples is not None:
                pictures["examples"] = examples
            # Of a box there is a level, which alone makes no diagram.
            if self._first_clicks:
                pictures["curves"] = report.curves()
        return dataclasses.replace(report, pictures=pictures)


def build_evaluators(
    sections: Mapping[str, Mapping[str, Any]],
    model: Sam,
    *,
    kernels: Kernels = "auto",
    show_progress: bool = False,
) -> dict[str, Evaluator]:
    """The evaluators that a config's section ``evals`` describes, by name.

    Raises:
      ConfigError: if a section does not fit ``EvalConfig``, before any dataset is opened; and what
        ``Evaluator`` raises.
    """
    configs = {name: from_mapping(EvalConfig, s, f"evals.{name}") for name, s in sections.items()}
    return {
        name: Evaluator(model, config, kernels=kernels, show_progress=show_progress)
        for name, config in configs.items()
    }


class _Drawn:
    """The images of a source that are evaluated on, as a source."""

    def __init__(self, source: Source, config: EvalConfig):
        self.name = source.name
        self.left_out = source.left_out
        self._source = source
        self._indices = _draw(len(source), config.max_images, f"{config.seed}/{source.name}")

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._source[self._indices[index]]


def _draw(number: int, limit: int | None, key: str) -> Sequence[int]:
    """At most ``limit`` of the first ``number`` integers, rising; the key decides which."""
    if limit is None or number <= limit:
        return range(number)
    return sorted(heapq.nsmallest(limit, range(number), lambda i: keyed_number(f"{key}/{i}")))


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


def _disk_measure(rule: FirstClick, rate: float) -> str:
    return f"{DISK_BASELINE}_{rule}@{rate}"
