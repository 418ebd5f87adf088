"""Reading an SA-1B tar from an S3 server on loopback, against from the local disk.

python -m benchmarks.storage [--images 64] [--threads 8] [--decode]

Needs the extra `dev`. The server is moto's, written in Python and on the same cores: its rates are
no measure of S3, but show what a delay of the connection and its faults cost. Every pass is
compared with the local files, sample by sample.
"""

import hashlib
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import dead_leaves, object_store, report
from benchmarks.timing import Timing
from sam_jax.data import SourceConfig, build_source
from sam_jax.data.samples import decode_image
from sam_jax.data.sources import Source

IMAGE_HW = (1000, 1500)
NUM_DROPS = 10
# From each 64 KiB of an answer to the next.
DELAY_SECONDS = 0.02


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Times passes over all samples, in each of the ways, and reports them."""
    parser = report.parser("storage", __doc__)
    parser.add_argument("--images", type=int, default=64, help="in the tar (%(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="that read (%(default)s)")
    parser.add_argument("--decode", action="store_true", help="images, and not only read files")
    parser.set_defaults(repeats=3)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name, object_store.serve(Path(name)) as connection:
        tar = Path(name) / "sa_000000.tar"
        dead_leaves.write_tar(tar, args.images, quality=80, image_hw=IMAGE_HW)
        object_store.fill("storage", {tar.name: tar})
        cache = str(Path(name) / "indices")
        start = time.perf_counter()
        remote = build_source(SourceConfig("sa1b", path="s3://storage", cache_dir=cache))
        scan_seconds = time.perf_counter() - start
        local = build_source(SourceConfig("sa1b", path=str(tar), cache_dir=cache))
        ways = {
            "local disk": (local, 0.0, 0),
            "S3": (remote, 0.0, 0),
            "S3, slow": (remote, DELAY_SECONDS, 0),
            f"S3, {NUM_DROPS} connections dropped": (remote, 0.0, NUM_DROPS),
        }
        expected = _pass(local, args.threads, decode=False)[0]
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way, (source, delay, drops) in ways.items():
                connection.delay_seconds, connection.num_drops = delay, drops
                found, taken = _pass(source, args.threads, args.decode)
                seconds[way].append(taken)
                assert found == expected, f"{way}: other samples than on the disk"
        num_bytes = tar.stat().st_size
    local_rate = len(expected) / min(seconds["local disk"])
    rates = [
        report.Rate(f"images/s, {way}", len(expected) / min(taken), local_rate)
        for way, taken in seconds.items()
    ]
    facts = {
        "bytes_per_image": num_bytes / args.images,
        "num_threads": args.threads,
        "seconds_to_scan": scan_seconds,
        "connections_dropped": connection.num_dropped,
        "samples_compared": len(expected) * len(ways) * args.repeats,
    }
    return report.publish("storage", argv, args, Timing(seconds["S3"]), rates, facts=facts)


def _pass(source: Source, num_threads: int, decode: bool) -> tuple[list[str], float]:
    """A digest of each sample's file and masks, in order, and the seconds that reading took."""

    def read(index: int) -> str:
        sample = source[index]
        if decode:
            decode_image(sample)
        return hashlib.sha256(bytes(sample.image) + repr(sample.masks_rle).encode()).hexdigest()

    start = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        digests = list(pool.map(read, range(len(source))))
    return digests, time.perf_counter() - start


if __name__ == "__main__":
    main()
