"""Batches for training, without end and resumable; samples for evaluation.

The stream of examples is a pure function of (config, process, position):
position i of a source is image i of a reshuffled epoch, transformed with a
generator seeded by i. Threads and worker processes change only how fast it
comes. So the state of the iterator is a position, plus what was counted, and
a run may be resumed with other numbers of threads and workers.
"""

import collections
import dataclasses
import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import grain
import numpy as np
from jaxtyping import Bool

from sam_jax import rle
from sam_jax.data.config import DataConfig, SourceConfig, build_source
from sam_jax.data.corruption import (
    CorruptionLog,
    NoObjectsError,
    TooManyCorruptSamplesError,
    sum_of_states,
)
from sam_jax.data.crops import CropExample, CropTransform
from sam_jax.data.listing_digest import listing_digest
from sam_jax.data.samples import (
    CorruptSampleError,
    NoObjectError,
    Sample,
    SkippedSampleError,
    all_remarks,
    decode_image,
    mask_runs,
)
from sam_jax.data.sources import Source
from sam_jax.data.tally import Tally
from sam_jax.data.transforms import (
    DroppedMask,
    LazyTransform,
    PackedExample,
    TrainTransform,
    dropped_by_source,
    no_valid_mask,
)
from sam_jax.errors import TRY_AGAIN, ConfigError, UserError

_log = logging.getLogger(__name__)

_Transform = TrainTransform | LazyTransform | CropTransform

# What Grain says of it.
_WORKER_DIED = re.compile(r"[Pp]rocess was terminated unexpectedly with exit code (-?\d+)")
# Field of a batch that stays on the host.
SAMPLE_NAMES = "sample_names"

__all__ = [
    "SAMPLE_NAMES",
    "DataConfig",
    "EvalExample",
    "EvalSamples",
    "InputWorkerError",
    "NoObjectsError",
    "SourceConfig",
    "TooManyCorruptSamplesError",
    "TrainIterator",
    "build_source",
    "eval_images",
    "eval_samples",
    "train_iterator",
]


class InputWorkerError(UserError):
    """A worker process of the input pipeline has died."""

    exit_code = TRY_AGAIN

    def __init__(self, code: str):
        killed = " (killed: the system kills what takes the most when memory is short)"
        super().__init__(
            f"a worker process that reads data died with exit code {code}"
            f"{killed if code == '-9' else ''}. Fewer data.num_workers, or a smaller "
            "data.prefetch_examples, take less memory; the same command continues from the newest "
            "checkpoint"
        )


class _Loaded(NamedTuple):
    """Result of loading an index: an example, or the error instead.

    It travels from worker processes to the parent, where all counting is
    done. Errors are passed on, not raised, because an exception would stop
    the worker, and dropping the element there would make the order of
    examples depend on the number of workers.
    """

    example: PackedExample | CropExample | None
    name: str
    source: int
    dropped: tuple[DroppedMask, ...] = ()
    remarks: tuple[tuple[str, str], ...] = ()
    error: SkippedSampleError | None = None


@dataclass(frozen=True)
class _Load(grain.transforms.RandomMap):
    """Index -> _Loaded."""

    source: Source
    number: int
    transform: _Transform

    def random_map(self, index: int, rng: np.random.Generator) -> _Loaded:
        try:
            sample = self.source[index]
            example, dropped = self.transform.packed(sample, rng)
        except SkippedSampleError as error:
            # A copy: the original's traceback holds the image's bytes.
            error = type(error)(error.name, error.reason, error.detail)
            return _Loaded(None, error.name, self.number, error=error)
        return _Loaded(example, sample.name, self.number, dropped, all_remarks(sample))


def train_iterator(
    config: DataConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
    known_images: Container[str] | None = None,
) -> "TrainIterator":
    """An endless iterator over this process's share of the training batches.

    Args:
      config: what to load.
      process_index: which share; `jax.process_index()`.
      process_count: how many shares; `jax.process_count()`.
      known_images: see `LazyTransform`, which then makes the examples. None decodes all images.

    Returns:
      An iterator of dicts of stacked arrays, b = batch_size / process_count: the keys and shapes of
      `zeros` of `TrainTransform`, `LazyTransform` or `CropTransform`, and `sample_names`, the
      images' names [b], which stay on the host.

    Raises:
      ConfigError: the batch does not divide by the processes, or a source cannot be opened.
    """
    if config.batch_size % process_count:
        raise ConfigError(
            f"batch_size {config.batch_size} does not divide by {process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}")
    transform: _Transform = config.transform()
    if known_images is not None:
        assert isinstance(transform, TrainTransform), "crops never come again"
        transform = LazyTransform(transform, known_images)
    streams, sizes = [], []
    described = []
    for number, source_config in enumerate(config.sources):
        source = build_source(source_config, config.in_channels)
        sizes.append(len(source))
        described.append(_description(source_config, source))
        seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
        stream = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        streams.append(stream.random_map(_Load(source, number, transform)))
    examples = streams[0]
    if len(streams) > 1:
        examples = grain.MapDataset.mix(streams, [source.weight for source in config.sources])
    local_batch_size = config.batch_size // process_count
    if process_count > 1:
        examples = _Share(examples, local_batch_size, process_index, process_count)
    dataset = _Batches(examples, config, transform, local_batch_size, tuple(sizes))
    prefetched = grain.experimental.ThreadPrefetchIterDataset(
        dataset, prefetch_buffer_size=config.prefetch_batches
    )
    batches = iter(prefetched)
    return TrainIterator(batches, process_index, process_count, config.sources, described)


def _description(config: SourceConfig, source: Source) -> dict[str, Any]:
    """Description of a source, as values of JSON: options that differ from defaults, and size."""
    options = dataclasses.asdict(config)
    set_options = {key: value for key, value in options.items() if value is not None}
    return {**set_options, "name": source.name, "num_samples": len(source)}


class _Share(grain.MapDataset):
    """A process's part of every batch: together the parts are the batch that one process reads."""

    def __init__(self, parent: grain.MapDataset, size: int, process_index: int, process_count: int):
        super().__init__(parent)
        self._size, self._process_index, self._process_count = size, process_index, process_count

    def __len__(self) -> int:
        return len(self._parent) // self._process_count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, self._size)
        first = (batch * self._process_count + self._process_index) * self._size
        return self._parent[first + place]


class TrainIterator(grain.DatasetIterator):
    """The training batches; see `train_iterator`.

    `get_state` and `set_state` restore the exact sequence, and Orbax saves
    and restores it through `grain.checkpoint.CheckpointSave` and `...Restore`.
    """

    def __init__(
        self,
        batches: grain.DatasetIterator,
        process_index: int = 0,
        process_count: int = 1,
        sources: Sequence[SourceConfig] = (),
        described: Sequence[Mapping[str, Any]] = (),
    ):
        super().__init__(batches)
        self._process_index, self._process_count = process_index, process_count
        self._sources, self._described = sources, described
        self._is_closed = False

    def __next__(self) -> dict[str, np.ndarray]:
        """The next local batch.

        Raises:
          TooManyCorruptSamplesError: more is unusable than the config tolerates.
          NoObjectsError: a source has no sample that can be used.
          InputWorkerError: a worker process has died.
        """
        try:
            return next(self._parent)
        except RuntimeError as error:
            if died := _WORKER_DIED.search(str(error)):
                raise InputWorkerError(died[1]) from error
            raise

    def get_state(self) -> dict[str, Any]:
        """Position after the batches handed out so far; JSON-serialisable."""
        return self._parent.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch at which `get_state` was called."""
        self._parent.set_state(state)

    def set_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continues after the batch at which all processes of a run called `get_state`.

        There may have been more processes then, or fewer: the run goes on with
        the first example that none of them has read. If they skipped different
        numbers of corrupt samples, their shares end at different places, and
        some examples around there are read twice or not at all.

        Args:
          states: of all processes, in their order.
        """
        if len(states) == self._process_count:
            self.set_state(states[self._process_index])
            return
        position = sum(state["position"] for state in states) // self._process_count
        # The first process carries on what all have counted.
        counted = [state["skipped"] for state in states] if self._process_index == 0 else []
        self.set_state({"position": position, "skipped": sum_of_states(counted)})

    def manifest(self, states: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Sources, their files and sizes, what was skipped or decided so far, as values of JSON.

        Args:
          states: of the processes that are counted, as `get_state` gives them; by default of this
            one. Counts are by what it was and why, with an example of each reason.
        """
        state = sum_of_states(each["skipped"] for each in states or [self.get_state()])
        kinds = {
            "samples skipped": "corrupt_counts",
            "samples without an object": "without_object_counts",
            "masks left out": "dropped_mask_counts",
            "decided": "remark_counts",
        }
        counted = {
            what: [
                {"reason": reason, "count": count, "example": examples.get(reason, "")}
                for reason, count in sorted(state[key].items(), key=lambda item: -item[1])
            ]
            for (what, key), examples in zip(
                kinds.items(), state["examples_by_reason"], strict=True
            )
        }
        return {
            "sources": [
                {**described, **files}
                for described, files in zip(self._described, self._source_files, strict=True)
            ],
            "processes": self._process_count,
            "samples_read": state["num_seen"],
            **counted,
        }

    @functools.cached_property
    def _source_files(self) -> list[dict[str, Any]]:
        """The ``files`` of each source's description, looked for once; nothing without any."""
        digests = map(listing_digest, self._sources)
        return [{"files": found._asdict()} if found else {} for found in digests]

    def skipped_samples(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Names of the samples skipped so far, by reason, as values of JSON.

        Args:
          states: see `manifest`.

        Returns:
          Of each reason the count of all, the first names and how often each was skipped, and how
          often others were.
        """
        state = sum_of_states(each["skipped"] for each in states)
        counts = collections.Counter(state["corrupt_counts"])
        counts.update(state["without_object_counts"])
        names = state["skipped_names"]
        return {
            reason: {
                "count": count,
                "samples": names.get(reason, {}),
                "count_of_others": count - sum(names.get(reason, {}).values()),
            }
            for reason, count in counts.most_common()
        }

    @property
    def num_seen(self) -> int:
        """Samples read for the batches so far, good or not."""
        return self.get_state()["skipped"]["num_seen"]

    @property
    def corrupt_counts(self) -> dict[str, int]:
        """Samples skipped so far, by reason."""
        return dict(self.get_state()["skipped"]["corrupt_counts"])

    @property
    def without_object_counts(self) -> dict[str, int]:
        """Samples skipped so far that are in order but have no mask to use, by reason."""
        return dict(self.get_state()["skipped"]["without_object_counts"])

    @property
    def dropped_mask_counts(self) -> dict[str, int]:
        """Masks left out of good samples so far, by reason."""
        return dict(self.get_state()["skipped"]["dropped_mask_counts"])

    @property
    def remark_counts(self) -> dict[str, int]:
        """Counts of what was decided or changed about samples used so far, by reason."""
        return dict(self.get_state()["skipped"]["remark_counts"])

    def close(self) -> None:
        """Ends all reading, and says in the log what has been skipped, once."""
        if self._is_closed:
            return
        self._is_closed = True
        log = CorruptionLog(max_corrupt_rate=1.0, grace=0)
        log.set_state(self.get_state()["skipped"])
        for line in log.lines():
            _log.warning("in %d samples read: %s", log.num_seen, line)
        super().close()


class _Batches(grain.IterDataset):
    """Puts good examples into batches; skips and counts the others."""

    def __init__(
        self,
        examples: grain.MapDataset,
        config: DataConfig,
        transform: _Transform,
        local_batch_size: int,
        source_sizes: tuple[int, ...],
    ):
        super().__init__()
        self._examples = examples
        self._config = config
        self._transform = transform
        self._local_batch_size = local_batch_size
        self._source_sizes = source_sizes

    def __iter__(self) -> grain.DatasetIterator:
        log = CorruptionLog(
            self._config.max_corrupt_rate, self._config.corrupt_grace, self._source_sizes
        )
        return _BatchIterator(
            self._examples, self._config, self._transform, self._local_batch_size, log
        )


class _BatchIterator(grain.DatasetIterator):
    def __init__(
        self,
        examples: grain.MapDataset,
        config: DataConfig,
        transform: _Transform,
        local_batch_size: int,
        log: CorruptionLog,
    ):
        super().__init__()
        self._examples = examples
        self._config = config
        self._transform = transform
        self._local_batch_size = local_batch_size
        self._log = log
        self._position = 0
        self._stream: grain.DatasetIterator | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._stream is None:
            self._stream = self._open()
        batch = self._transform.zeros(self._local_batch_size)
        names: list[str] = []
        row = 0
        while row < self._local_batch_size:
            loaded = next(self._stream)
            self._position += 1
            if loaded.error is not None:
                self._log.record_skipped(loaded.error, loaded.source)
            else:
                self._log.record_good(loaded.name, loaded.dropped, loaded.remarks, loaded.source)
                loaded.example.unpack_into(batch, row)
                names.append(loaded.name)
                row += 1
        return {**batch, SAMPLE_NAMES: np.array(names)}

    def _open(self) -> grain.DatasetIterator:
        config = self._config
        stream = self._examples.slice(slice(self._position, None)).to_iter_dataset(
            grain.ReadOptions(
                num_threads=config.num_threads,
                prefetch_buffer_size=config.prefetch_examples,
            )
        )
        _one_opencv_thread()
        if config.num_workers:
            _let_grain_read_its_flag()
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=config.num_workers),
                worker_init_fn=_start_worker,
            )
        return iter(stream)

    def get_state(self) -> dict[str, Any]:
        return {"position": self._position, "skipped": self._log.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._close_stream()
        self._position = state["position"]
        self._log.set_state(state["skipped"])

    def close(self) -> None:
        self._close_stream()
        super().close()

    def _close_stream(self) -> None:
        if self._stream is None:
            return
        self._stream.close()
        # grain leaves the reads under way to themselves; once this is closed,
        # nothing should touch the data any more.
        executor = getattr(self._stream, "_executor", None)
        if executor is not None:
            executor.shutdown()
        self._stream = None


def _start_worker(*_: int) -> None:
    """Prepares a worker process."""
    _one_opencv_thread()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Ends this worker when its parent has ended.

    Grain's workers outlive a parent that was killed, and keep their memory for good.
    """
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _one_opencv_thread(*_: int) -> None:
    """Samples are worked on in parallel; OpenCV's own threads only get in the way.

    With them, drawing a synthetic image costs half as much processor time again.
    """
    cv2.setNumThreads(1)


def _let_grain_read_its_flag() -> None:
    """Works around grain 0.2.18 (its issue 1355), fixed after that release.

    Starting workers reads a command-line flag of grain's, which raises in any
    program that has not parsed its command line with absl. Marking the flag
    as present makes reading it give its default, or the parsed value.
    """
    try:
        from grain._src.core import profiler

        flag = profiler._GRAIN_ENABLE_MULTIPROCESS_WORKER_PROFILING
    except (ImportError, AttributeError):
        return  # a version that does not have it
    flag._flagvalues[flag.name].present = True


class EvalExample(NamedTuple):
    """A sample at its original size.

    Attributes:
      image: uint8 [h, w, 3], RGB, or float32 [h, w, c] of other channels.
      mask_runs: of each mask (see `rle.run_lengths`), in the order of the annotations; unusable and
        empty ones are left out. At least one; for `eval_images`, none.
      dataset: the source's name.
      name: the file.
    """

    image: np.ndarray
    mask_runs: tuple[np.ndarray, ...]
    dataset: str
    name: str

    @property
    def masks(self) -> Bool[np.ndarray, "k h w"]:
        """All masks, which may be more than memory holds."""
        return self.decode_masks(range(len(self.mask_runs)))

    def decode_masks(self, indices: Sequence[int]) -> Bool[np.ndarray, "k h w"]:
        """Some of the masks."""
        hw = self.image.shape[0], self.image.shape[1]
        masks = np.empty((len(indices), *hw), bool)
        for mask, index in zip(masks, indices, strict=True):
            mask[:] = rle.decode(self.mask_runs[index], hw)
        return masks


class ReadSample(NamedTuple):
    """A sample as it was read for an evaluation.

    Attributes:
      name: the file.
      example: its content; None if it cannot be used.
      remarked: (reason, case) of what was left out or decided, by what it is: `images`, `images
        without an object`, `masks` or `remarks`.
    """

    name: str
    example: EvalExample | None
    remarked: dict[str, list[tuple[str, str]]]


class EvalSamples:
    """The samples of a source once, in order; see `eval_samples`."""

    def __init__(
        self,
        source: Source,
        log: CorruptionLog,
        indices: Sequence[int],
        is_all: bool,
        decode: Callable[[Sample], tuple[EvalExample, list[DroppedMask]]],
    ):
        self._decode = decode
        self._source = source
        self._log = log
        self._indices = indices
        self._is_all = is_all

    def __iter__(self) -> Iterator[EvalExample]:
        num_used = 0
        for index in self._indices:
            example = self.read(index).example
            if example is not None:
                num_used += 1
                yield example
        if self._is_all and not num_used:
            raise NoObjectsError(
                f"{self._source.name}: none of {len(self._indices)} samples has a mask that can "
                "be used. Skipped:" + "".join(f"\n  {line}" for line in self._log.lines())
            )

    def read(self, index: int) -> ReadSample:
        """One sample, whatever becomes of it.

        Raises:
          TooManyCorruptSamplesError: it is corrupt, and one too many.
        """
        try:
            sample = self._source[index]
            example, dropped = self._decode(sample)
        except SkippedSampleError as error:
            self._log.record_skipped(error)
            what = "images without an object" if isinstance(error, NoObjectError) else "images"
            return ReadSample(error.name, None, {what: [(error.reason, str(error))]})
        remarks = all_remarks(sample)
        self._log.record_good(sample.name, dropped, remarks)
        masks = [(mask.reason, f"{sample.name}: {mask.detail}") for mask in dropped]
        others = [
            (reason, f"{sample.name}: {text}" if text else sample.name) for reason, text in remarks
        ]
        return ReadSample(sample.name, example, {"masks": masks, "remarks": others})

    @property
    def corrupt_counts(self) -> dict[str, int]:
        """Samples skipped so far, by reason."""
        return dict(self._log.corrupt.counts)

    @property
    def without_object_counts(self) -> dict[str, int]:
        """Samples skipped so far that are in order but have no mask to use, by reason."""
        return dict(self._log.without_object.counts)

    @property
    def dropped_mask_counts(self) -> dict[str, int]:
        """Masks left out of good samples so far, by reason."""
        return dict(self._log.dropped_masks.counts)

    @property
    def remark_counts(self) -> dict[str, int]:
        """Counts of what was decided or changed about samples used so far, by reason."""
        return dict(self._log.remarks.counts)

    @property
    def counted(self) -> dict[str, Tally]:
        """All that was skipped or remarked so far, with examples, by what it is."""
        return {
            "images": self._log.corrupt,
            "images without an object": self._log.without_object,
            "masks": self._log.dropped_masks,
            "remarks": self._log.remarks,
        }


def eval_samples(
    source: Source,
    *,
    process_index: int = 0,
    process_count: int = 1,
    max_corrupt_rate: float = 0.05,
    corrupt_grace: int = 200,
) -> EvalSamples:
    """The source's samples, decoded, in their fixed order, corrupt ones skipped.

    Args:
      source: what to read.
      process_index: which share of the samples; every process_count-th.
      process_count: how many shares.
      max_corrupt_rate: see `DataConfig`.
      corrupt_grace: see `DataConfig`.

    Returns:
      An iterable of `EvalExample`. It raises `TooManyCorruptSamplesError` on the way, and
      `NoObjectsError` at the end if this is the only share and had nothing to use; it has
      `corrupt_counts`.
    """
    log = CorruptionLog(max_corrupt_rate, corrupt_grace)
    indices = range(process_index, len(source), process_count)
    return EvalSamples(source, log, indices, process_count == 1, _with_masks)


def eval_images(
    source: Source, *, max_corrupt_rate: float = 0.05, corrupt_grace: int = 200
) -> EvalSamples:
    """The images of a source's samples, decoded, whatever their masks are; see `eval_samples`."""
    log = CorruptionLog(max_corrupt_rate, corrupt_grace)
    return EvalSamples(source, log, range(len(source)), True, _without_masks)


def _without_masks(sample: Sample) -> tuple[EvalExample, list[DroppedMask]]:
    return EvalExample(decode_image(sample), (), sample.dataset, sample.name), []


def _with_masks(sample: Sample) -> tuple[EvalExample, list[DroppedMask]]:
    image = decode_image(sample)
    hw = image.shape[:2]
    usable = []
    dropped = dropped_by_source(sample)
    for index in range(len(sample.masks_rle)):
        try:
            runs = mask_runs(sample, index, hw)
        except CorruptSampleError as error:
            dropped.append(DroppedMask(error.reason, error.detail))
            continue
        if rle.area_px(runs):
            usable.append(runs)
        else:
            dropped.append(DroppedMask("empty", f"mask {index}"))
    if not usable:
        raise no_valid_mask(sample, dropped)
    return EvalExample(image, tuple(usable), sample.dataset, sample.name), dropped
