"""A config's input pipeline against decoding alone, and against copying memory.

python -m benchmarks.input --config configs/demo.py [--repeats 50] [--synthetic]
"""

import io
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import limits, recipe, report
from benchmarks.timing import Timing
from sam_jax.data import DataConfig, Sample, build_source, train_iterator

# Images whose decoding is timed.
NUM_FILES = 64


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Times batches of the training iterator, with nobody else at work, and reports them."""
    parser = report.parser("input", __doc__)
    recipe.add_options(parser)
    parser.set_defaults(repeats=20)
    args = parser.parse_args(argv)
    data = recipe.load(args).data

    iterator = train_iterator(data)
    # What was prefetched while nobody measured must not count as read in no time.
    buffered = data.prefetch_batches + math.ceil(data.prefetch_examples / data.batch_size)
    first = [next(iterator) for _ in range(1 + buffered)][-1]
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        next(iterator)
        seconds.append(time.perf_counter() - start)
    iterator.close()

    # Batches come in bursts, so only their sum says how fast they come.
    images_per_second = args.repeats * data.batch_size / sum(seconds)
    image_bytes = sum(array.nbytes for array in first.values()) / data.batch_size
    files, are_encoded = _image_files(data)
    rates = [
        report.Rate("images/s", images_per_second, limits.jpeg_images_per_second(files)),
        report.Rate(
            "bytes/s", images_per_second * image_bytes, limits.host_copy_bytes_per_second()
        ),
    ]
    facts = {
        "bytes_per_image": image_bytes,
        "num_threads": data.num_threads,
        "num_workers": data.num_workers,
        "sources": recipe.names_of(data.sources),
        # Otherwise the limit is that of the same images, encoded for it.
        "sources_are_encoded": are_encoded,
    }
    return report.publish("input", argv, args, Timing(seconds), rates, facts=facts)


def _image_files(data: DataConfig) -> tuple[list[bytes], bool]:
    """Image files drawn as the pipeline draws them, and whether all were files to begin with."""
    rng = np.random.default_rng(data.seed)
    sources = [build_source(config) for config in data.sources]
    weights = np.array([config.weight for config in data.sources])
    samples = [
        sources[which][int(rng.integers(len(sources[which])))]
        for which in rng.choice(len(sources), NUM_FILES, p=weights / weights.sum())
    ]
    are_encoded = all(isinstance(sample.image, bytes) for sample in samples)
    return [_file(sample) for sample in samples], are_encoded


def _file(sample: Sample) -> bytes:
    if isinstance(sample.image, bytes):
        return sample.image
    buffer = io.BytesIO()
    Image.fromarray(sample.image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
