"""Zero-shot edge detection as an evaluation: a model's edge maps, scored against annotators."""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sam_jax import places
from sam_jax.data.truth_digest import files_digest
from sam_jax.errors import ConfigError, UserError
from sam_jax.evaluation.edges import png
from sam_jax.evaluation.edges.benchmark import import_counts
from sam_jax.evaluation.edges.dataset import EdgeExample, list_examples
from sam_jax.evaluation.edges.detector import Detection, detect_edges
from sam_jax.evaluation.edges.edge_maps import (
    EdgeMapOptions,
    quantized,
    sobel_edges,
    strengths_of,
)
from sam_jax.evaluation.edges.pictures import map_sheet, precision_recall
from sam_jax.evaluation.edges.report import EdgeReport, f_by_image, summarize
from sam_jax.evaluation.edges.suppression import NO_SUPPRESSION, SUPPRESSIONS, suppressed
from sam_jax.evaluation.edges.thresholds import even_thresholds
from sam_jax.evaluation.evaluation import Record
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.weights.files import written_whole

MODEL, SOBEL = "model", "sobel"
# Options that change how fast records are made, or what else is written, but not what they say.
_WITHOUT_INFLUENCE = ("points_per_batch", "images_per_call", "maps", "num_examples")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeEvalConfig(EdgeMapOptions):
    """Images, edge maps and the benchmark's settings.

    Attributes:
      path: folder with ``images/`` and ``groundTruth/`` in it.
      split: a folder in each of these, such as "test"; none if empty.
      suppressions: what is done to edge maps before they are scored, of "canny", "structured",
        "opencv" and "none"; pictures are of the first. See ``SUPPRESSIONS``.
      baselines: what else is scored, of "sobel", the gradient of the image itself.
      num_thresholds: evenly spaced between 0 and 1.
      max_distance_rate: how far off an edge may be, as a rate of the image's diagonal.
      is_quantized: whether maps are rounded to 8 bits first, as the benchmark's files are.
      max_images: the first so many by their names; None takes all.
      images_per_call: images that are embedded and prompted together.
      maps: folder to write every edge map to, as ``SOURCE/SUPPRESSION/NAME.png``; None for none.
      num_examples: images of each sort (best, worst) in the picture of edge maps; 0 makes no
        pictures at all.
    """

    path: str
    split: str = ""
    suppressions: tuple[str, ...] = (*SUPPRESSIONS, NO_SUPPRESSION)
    baselines: tuple[str, ...] = (SOBEL,)
    num_thresholds: int = 99
    max_distance_rate: float = 0.0075
    is_quantized: bool = True
    max_images: int | None = None
    images_per_call: int = 1
    maps: str | None = None
    num_examples: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, known in (
            ("suppressions", (*SUPPRESSIONS, NO_SUPPRESSION)),
            ("baselines", (SOBEL,)),
        ):
            unknown = sorted(set(getattr(self, field)) - set(known))
            if unknown:
                raise ConfigError(f"{field} {unknown} do not exist; there are {list(known)}")
        if not self.suppressions:
            raise ConfigError(f"suppressions must name one at least, {NO_SUPPRESSION!r} for none")
        if self.num_thresholds < 1 or self.images_per_call < 1 or self.num_examples < 0:
            raise ConfigError(
                "num_thresholds and images_per_call must be at least 1, num_examples at least 0"
            )
        if not 0 < self.max_distance_rate < 1:
            raise ConfigError(f"max_distance_rate must be in (0, 1), got {self.max_distance_rate}")
        if self.max_images is not None and self.max_images < 1:
            raise ConfigError("max_images must be at least 1, or None")


@dataclasses.dataclass(frozen=True, eq=False)
class _Opened:
    """An image with its annotators' boundaries, or what is wrong with them."""

    example: EdgeExample
    pixels: np.ndarray
    boundaries: Sequence[np.ndarray]
    problem: UserError | None = None
    detection: Detection | None = None


class EdgeEvaluation:
    """Images in which people marked boundaries; see ``evaluation.Evaluation``.

    Args:
      config: options.
      in_channels: of the images that the model takes, which must be 8-bit RGB: None.

    Raises:
      ConfigError: the data are not where the config says, or incomplete; the model takes other
        channels; or the benchmark's solver is not installed.
      PlaceError: edge maps cannot be written where they shall be.
    """

    def __init__(self, config: EdgeEvalConfig, in_channels: int | None = None):
        if in_channels is not None:
            raise ConfigError(
                f"the evaluation of edges reads 8-bit RGB, and the model takes {in_channels} "
                "channels as they are stored (model.in_channels): leave it out"
            )
        self._config = config
        self._benchmark = import_counts()
        self._examples = list_examples(Path(config.path), config.split)[: config.max_images]
        self._thresholds = even_thresholds(config.num_thresholds)
        if config.maps is not None:
            places.check_folder(config.maps)
        # Edge maps as PNG by the image's name, of what this process has seen.
        self._pngs: dict[str, bytes] = {}

    @property
    def settings(self) -> Mapping[str, Any]:
        """The options that records depend on, and a digest of the annotators' files."""
        options = dataclasses.asdict(self._config)
        kept = {name: v for name, v in options.items() if name not in _WITHOUT_INFLUENCE}
        return kept | {"truth_digest": self._truth_digest}

    @functools.cached_property
    def _truth_digest(self) -> str:
        return files_digest([example.annotations for example in self._examples])

    def __len__(self) -> int:
        return len(self._examples)

    def buckets(self, num_devices: int) -> Buckets:
        """See ``Evaluation``."""
        rows = -(-self._config.images_per_call // num_devices)
        return Buckets(images=(rows,), rows=(rows,), prompts=(1,), points=(1,))

    def records(self, predictor: Predictor, indices: Iterable[int]) -> Iterator[Record]:
        """Records as ``counts.image_record`` makes them; see ``Evaluation``.

        While the device answers for one image, the host scores those before it.
        """
        workers = os.cpu_count() or 1
        # Two pools, or an image's masks would wait in line behind the scoring of another.
        with _threads(workers) as masks, _threads(workers) as scorers:
            opened = _in_order(self._open, indices, masks, 2 * self._config.images_per_call)
            detected = self._detect(predictor, opened, masks)
            yield from _in_order(self._score, detected, scorers, workers)

    def report(self, records: Sequence[Record], seconds: float) -> EdgeReport:
        """The report; see ``Evaluation``. Edge maps are shown of what this process has scored."""
        report = summarize(records, self.settings, seconds)
        if not self._config.num_examples:
            return report
        pictures = {"precision_recall": precision_recall(report.curves, report.scores)}
        f = f_by_image(records, MODEL, self._config.suppressions[0])
        shown = sorted((name for name in f if name in self._pngs), key=lambda n: (f[n], n))
        if shown:
            pictures["edge_maps"] = self._sheet(shown, f)
        return dataclasses.replace(report, pictures=pictures)

    def _open(self, index: int) -> _Opened:
        example = self._examples[index]
        try:
            pixels = example.read_image()
            boundaries = example.read_boundaries(pixels, example.image)
        except UserError as error:
            return _Opened(example, np.zeros((0, 0, 3), np.uint8), (), problem=error)
        return _Opened(example, pixels, boundaries)

    def _detect(
        self, predictor: Predictor, opened: Iterator[_Opened], pool: Executor
    ) -> Iterator[_Opened]:
        """The images with their edges, those that are detected together at a time."""
        number = self.buckets(predictor.num_devices).images[0] * predictor.num_devices
        while together := list(itertools.islice(opened, number)):
            usable = {str(o.example.image): o.pixels for o in together if o.problem is None}
            detections = iter(detect_edges(predictor, usable, self._config, pool) if usable else ())
            for image in together:
                if image.problem is not None:
                    yield image
                else:
                    yield dataclasses.replace(image, detection=next(detections))

    def _score(self, image: _Opened) -> Record:
        name = image.example.name
        if image.detection is None:
            return self._benchmark.unusable_record(name, image.problem)
        sources = {MODEL: image.detection.edges}
        if SOBEL in self._config.baselines:
            sources[SOBEL] = sobel_edges(image.pixels)
        maps: dict[str, dict[str, np.ndarray]] = {source: {} for source in sources}
        for source, edges in sources.items():
            for suppression in self._config.suppressions:
                kept = suppressed(edges, suppression)
                levels = quantized(kept)
                self._keep(source, suppression, name, levels)
                maps[source][suppression] = (
                    strengths_of(levels) if self._config.is_quantized else kept
                )
        annotated = self._benchmark.AnnotatedImage(image.boundaries, self._config.max_distance_rate)
        record = self._benchmark.image_record(name, annotated, maps, self._thresholds)
        return record | {"masks": image.detection.num_masks}

    def _keep(self, source: str, suppression: str, name: str, levels: np.ndarray) -> None:
        """Keeps a map for the picture, and writes it if maps are to be written."""
        is_shown = source == MODEL and suppression == self._config.suppressions[0]
        if self._config.maps is None and not is_shown:
            return
        content = png.encode(levels)
        if is_shown:
            self._pngs[name] = content
        if self._config.maps is not None:
            path = Path(self._config.maps) / source / suppression / f"{name}.png"
            with written_whole(path) as unfinished:
                unfinished.write_bytes(content)

    def _sheet(self, ranked: Sequence[str], f: Mapping[str, float]) -> np.ndarray:
        number = self._config.num_examples
        best = ranked[::-1][:number]
        worst = [name for name in ranked if name not in best][:number]
        examples = {example.name: example for example in self._examples}
        rows = []
        for sort, names in (("best", best), ("worst", worst)):
            for name in names:
                pixels = examples[name].read_image()
                boundaries = examples[name].read_boundaries(pixels, examples[name].image)
                caption = f"{sort}: {name}, F {f[name]:.3f}"
                rows.append((caption, pixels, png.decode(self._pngs[name]), boundaries))
        return map_sheet(rows)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that do not start on what is still in line when all is over, as after Ctrl-C."""
    pool = ThreadPoolExecutor(number)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], pool: Executor, num_ahead: int
) -> Iterator[_Result]:
    """Results for all items, in order, as they are there, while so many more are worked on."""
    under_way: deque[Future[_Result]] = deque()
    for item in items:
        under_way.append(pool.submit(function, item))
        while under_way and (len(under_way) > num_ahead or under_way[0].done()):
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()
