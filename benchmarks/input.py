"""A config's input pipeline against decoding alone, and against copying memory.

python -m benchmarks.input --config configs/demo.py [--repeats 50] [--synthetic]
python -m benchmarks.input --config configs/sam_vit_b.py --sa1b 64 [--accelerator-rate 4]
"""

import contextlib
import dataclasses
import io
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from benchmarks import dead_leaves, experiment, limits, report
from benchmarks.timing import Timing
from sam_jax import rle
from sam_jax.data import DataConfig, Sample, SourceConfig, build_source, train_iterator, windows
from sam_jax.data import transforms as data_transforms
from sam_jax.data.sources import Source
from sam_jax.data.transforms import TrainTransform

# Images whose decoding is timed, and whose stages are.
NUM_FILES = 64
NUM_PASSES = 3
# What the transform calls for each stage of its work.
STAGES = {
    "decode": (windows, "open_reduced"),
    "resize": (windows, "resize_reduced"),
    "RLE": (data_transforms, "mask_runs"),
    "grid": (rle.Grid, "__init__"),
    "resample": (rle.Grid, "resample_part"),
    "pack": (data_transforms, "pack_mask"),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Times batches of the training iterator, with nobody else at work, and reports them."""
    parser = report.parser("input", __doc__)
    experiment.add_options(parser)
    parser.add_argument(
        "--sa1b",
        type=int,
        metavar="N",
        help="N made-up pictures of SA-1B's size and layout instead of the config's sources",
    )
    parser.add_argument("--quality", type=int, default=80, help="of their JPEGs (%(default)s)")
    parser.add_argument(
        "--accelerator-rate",
        type=float,
        help="images/s that one accelerator trains on, for the cores that feed it",
    )
    parser.set_defaults(repeats=20)
    args = parser.parse_args(argv)
    data = experiment.load(args).data
    with tempfile.TemporaryDirectory() as folder:
        if args.sa1b:
            tar = Path(folder) / "sa_000000.tar"
            dead_leaves.write_tar(
                tar, args.sa1b, quality=args.quality, image_hw=dead_leaves.IMAGE_HW
            )
            data = dataclasses.replace(data, sources=(SourceConfig("sa1b", path=str(tar)),))
        return _measure(data, argv, args)


def _measure(data: DataConfig, argv: Sequence[str] | None, args: Any) -> dict[str, Any]:
    iterator = train_iterator(data)
    # What was prefetched while nobody measured must not count as read in no time.
    examples = data.prefetch_examples * max(data.num_workers, 1)
    buffered = data.prefetch_batches + math.ceil(examples / data.batch_size)
    first = [next(iterator) for _ in range(1 + buffered)][-1]
    seconds = []
    main_before, workers_before = time.process_time(), _workers_seconds()
    for _ in range(args.repeats):
        start = time.perf_counter()
        next(iterator)
        seconds.append(time.perf_counter() - start)
    main_seconds = time.process_time() - main_before
    workers_seconds = _workers_seconds() - workers_before
    iterator.close()

    num_images = args.repeats * data.batch_size
    # Batches come in bursts, so only their sum says how fast they come.
    images_per_second = num_images / sum(seconds)
    per_core = num_images / (main_seconds + workers_seconds)
    image_bytes = sum(array.nbytes for array in first.values()) / data.batch_size
    samples = _samples(data)
    files = [_file(sample) for sample in samples]
    rates = [
        report.Rate("images/s", images_per_second, limits.jpeg_images_per_second(files)),
        report.Rate("images/s of a core", per_core, _per_second(_decode_by_pillow, files)),
        report.Rate(
            "bytes/s", images_per_second * image_bytes, limits.host_copy_bytes_per_second()
        ),
    ]
    facts = {
        "bytes_per_image": image_bytes,
        "bytes_per_file": sum(map(len, files)) / len(files),
        "masks_per_image": float(first["mask_valid"].sum(axis=1).mean()),
        "num_threads": data.num_threads,
        "num_workers": data.num_workers,
        "sources": experiment.names_of(data.sources),
        # Otherwise the limit is that of the same images, encoded for it.
        "sources_are_encoded": all(isinstance(sample.image, bytes) for sample in samples),
        # The rest of a core's time is the workers'.
        "main_process_rate": main_seconds / (main_seconds + workers_seconds),
        "cv2_decoded_images_per_second": _per_second(_decode_by_cv2, files),
        **_reduced_decoding_errors(data, samples),
        **{f"ms_{stage}": 1e3 * value for stage, value in _stages(data).items()},
    }
    if args.accelerator_rate:
        facts["cores_per_accelerator"] = args.accelerator_rate / per_core
    return report.publish("input", argv, args, Timing(seconds), rates, facts=facts)


def _workers_seconds() -> float:
    """Processor time of the running workers so far, in seconds; 0 without any.

    Raises:
      OSError: there are workers, and this is not Linux.
    """
    workers = multiprocessing.active_children()
    if workers and sys.platform != "linux":
        raise OSError("the time of other processes is known on Linux only")
    # What clock_getcpuclockid(3) makes of a process.
    return sum(time.clock_gettime((~worker.pid << 3) | 2) for worker in workers if worker.pid)


def _samples(data: DataConfig) -> list[Sample]:
    """Samples drawn as the pipeline draws them."""
    rng = np.random.default_rng(data.seed)
    sources = [build_source(config) for config in data.sources]
    weights = np.array([config.weight for config in data.sources])
    return [
        sources[which][int(rng.integers(len(sources[which])))]
        for which in rng.choice(len(sources), NUM_FILES, p=weights / weights.sum())
    ]


def _file(sample: Sample) -> bytes:
    if isinstance(sample.image, bytes):
        return sample.image
    buffer = io.BytesIO()
    Image.fromarray(sample.image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _decode_by_pillow(content: bytes) -> None:
    Image.open(io.BytesIO(content)).convert("RGB")


def _decode_by_cv2(content: bytes) -> None:
    cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)


def _per_second(function: Callable[[Any], Any], items: Sequence[Any]) -> float:
    """Calls a second of processor time, in the best pass over the items."""
    best = math.inf
    for _ in range(NUM_PASSES):
        start = time.process_time()
        for item in items:
            function(item)
        best = min(best, time.process_time() - start)
    return len(items) / best


def _reduced_decoding_errors(data: DataConfig, samples: Sequence[Sample]) -> dict[str, float]:
    """Errors of images decoded at reduced size against those decoded in full, in grey values."""
    full = TrainTransform(data.image_size, max_masks=1, reduced_decoding=False)
    reduced = dataclasses.replace(full, reduced_decoding=True)
    differences = []
    for sample in samples:
        images = [
            np.asarray(transform.packed(sample, np.random.default_rng(0))[0].image, np.float32)
            for transform in (full, reduced)
        ]
        differences.append(np.abs(images[1] - images[0]))
    return {
        "reduced_decoding_mean_error": float(np.mean([d.mean() for d in differences])),
        "reduced_decoding_rms_error": float(np.mean([(d**2).mean() for d in differences]) ** 0.5),
        "reduced_decoding_max_error": float(max(d.max() for d in differences)),
    }


def _stages(data: DataConfig) -> dict[str, float]:
    """Processor seconds of each stage of one image, in one thread; the best of some passes.

    `read` is the source's work, `rest` what the transform does besides the other stages, `batch`
    writing the example into a batch.
    """
    transform = data.transform()
    sources: list[Source] = [build_source(config) for config in data.sources]
    passes = []
    for _ in range(NUM_PASSES):
        seconds = dict.fromkeys(["read", *STAGES, "rest", "batch"], 0.0)
        rng = np.random.default_rng(data.seed)
        for number in range(NUM_FILES):
            source = sources[number % len(sources)]
            start = time.thread_time()
            sample = source[int(rng.integers(len(source)))]
            seconds["read"] += time.thread_time() - start
            start = time.thread_time()
            with contextlib.ExitStack() as stack:
                for stage, (owner, name) in STAGES.items():
                    stack.enter_context(_timed(owner, name, stage, seconds))
                packed, _ = transform.packed(sample, rng)
            seconds["rest"] += time.thread_time() - start
            # In batches, as the pipeline does it: fresh memory costs as much as writing to it.
            row = number % data.batch_size
            start = time.thread_time()
            if row == 0:
                batch = transform.zeros(data.batch_size)
            packed.unpack_into(batch, row)
            seconds["batch"] += time.thread_time() - start
        seconds["rest"] -= sum(seconds[stage] for stage in STAGES)
        passes.append({stage: value / NUM_FILES for stage, value in seconds.items()})
    return min(passes, key=lambda seconds: sum(seconds.values()))


@contextlib.contextmanager
def _timed(owner: Any, name: str, stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Adds the time of every call of a function to that of a stage."""
    function = getattr(owner, name)

    def call(*args: Any) -> Any:
        start = time.thread_time()
        try:
            return function(*args)
        finally:
            seconds[stage] += time.thread_time() - start

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, function)


if __name__ == "__main__":
    main()
