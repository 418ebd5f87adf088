"""Reading and decoding an SA-1B tar from an S3 server on loopback, against from the local disk.

python -m benchmarks.storage [--images 64] [--threads 8]

Needs the extra `dev`. The server is moto's, written in Python: what it gives is no measure of S3,
but what a connection's delay and its faults cost here is.
"""

import hashlib
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import dead_leaves, object_store
from sam_jax.data import SourceConfig, build_source
from sam_jax.data.samples import decode_image
from sam_jax.data.sources import Source

IMAGE_HW = (1000, 1500)
NUM_DROPS = 10
DELAY_SECONDS = 0.02


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Reads all samples in each of the ways, and prints a table."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64, help="in the tar (%(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="that read (%(default)s)")
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tar = folder / "sa_000000.tar"
        dead_leaves.write_tar(tar, args.images, quality=80, image_hw=IMAGE_HW)
        print(f"{args.images} images, tar of {tar.stat().st_size / 1e6:.1f} MB")
        cache = str(folder / "indices")
        with object_store.serve(folder) as connection:
            object_store.fill("data", {tar.name: tar})
            start = time.perf_counter()
            remote = build_source(SourceConfig("sa1b", path="s3://data", cache_dir=cache))
            print(f"scan of the tar in the bucket: {time.perf_counter() - start:.2f} s")
            local = build_source(SourceConfig("sa1b", path=str(tar), cache_dir=cache))
            expected = _digests(local, args.threads, decode=False)[0]
            for decode in (False, True):
                for what, source, delay, drops in (
                    ("local disk", local, 0.0, 0),
                    ("S3", remote, 0.0, 0),
                    (f"S3, {1e3 * DELAY_SECONDS:.0f} ms for each 64 KiB", remote, DELAY_SECONDS, 0),
                    (f"S3, {NUM_DROPS} connections dropped", remote, 0.0, NUM_DROPS),
                ):
                    dropped = connection.num_dropped
                    connection.delay_seconds, connection.num_drops = delay, drops
                    digests, seconds = _digests(source, args.threads, decode)
                    rows.append(
                        {
                            "source": what,
                            "decoded": decode,
                            "images/s": len(source) / seconds,
                            "dropped": connection.num_dropped - dropped,
                            "every sample once": digests == expected,
                        }
                    )
                    print(rows[-1])
    return rows


def _digests(source: Source, num_threads: int, decode: bool) -> tuple[list[str], float]:
    """A digest of each sample's file and masks, in order, and the seconds that reading took."""

    def read(index: int) -> str:
        sample = source[index]
        if decode:
            decode_image(sample)
        return hashlib.sha256(sample.image + repr(sample.masks_rle).encode()).hexdigest()

    start = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        digests = list(pool.map(read, range(len(source))))
    return digests, time.perf_counter() - start


if __name__ == "__main__":
    main()
