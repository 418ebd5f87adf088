"""The counting of a store's masks, on one processor core or many."""

import hashlib
import heapq
import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor

from sam_jax.data.mask_stores import MaskReader, MaskStore
from sam_jax.data.samples import SkippedSampleError
from sam_jax.dataset_statistics.counts import MaskCounts

# Images that a process counts before it hands over what it has; a process starts in a second, in
# which it could have counted some of these.
_IMAGES_PER_PART = 256
# Parts that wait for each process, so that none waits for work.
_PARTS_AHEAD = 2


def count_masks(
    store: MaskStore,
    *,
    max_images: int | None = None,
    seed: int = 0,
    num_workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> MaskCounts:
    """Counts of all masks of a store; the same for any number of processes.

    Args:
      store: the masks.
      max_images: most images, drawn by ``seed``; None takes all.
      seed: of the draw, which also depends on the number of images, and on nothing else.
      num_workers: processes; None is one for each core that this one may use. Few images are
        counted in this process. Others are spawned: the program's own code must be under
        ``if __name__ == "__main__"``.
      on_progress: called with the numbers of images done and in all.

    Raises:
      ValueError: max_images is not positive.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images is {max_images}; expected at least 1, or None for all")
    indices = drawn(len(store), max_images, seed)
    counts, done = MaskCounts(), 0
    num_workers = num_workers or _usable_cores()
    for part in _counted_parts(store, indices, num_workers):
        counts.update(part)
        done += part.masks_per_image.total() + part.skipped_images.total()
        on_progress(done, len(indices))
    return counts


def drawn(number: int, limit: int | None, seed: int) -> Sequence[int]:
    """At most ``limit`` of the first ``number`` integers, rising: those whose hashes are lowest."""
    if limit is None or number <= limit:
        return range(number)

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=16).digest()

    return sorted(heapq.nsmallest(limit, range(number), key=rank))


def _counted_parts(
    store: MaskStore, indices: Sequence[int], num_workers: int
) -> Iterator[MaskCounts]:
    parts = [
        indices[start : start + _IMAGES_PER_PART]
        for start in range(0, len(indices), _IMAGES_PER_PART)
    ]
    num_workers = min(num_workers, len(parts))
    tasks = ([store.reader(index) for index in part] for part in parts)
    if num_workers <= 1:
        yield from map(count_part, tasks)
        return
    # Forking would copy the threads' locks of a process that runs several.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=spawn) as pool:
        ahead = _PARTS_AHEAD * num_workers
        waiting: deque[Future[MaskCounts]] = deque(
            pool.submit(count_part, task) for task in itertools.islice(tasks, ahead)
        )
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(count_part, task) for task in itertools.islice(tasks, 1))


def count_part(readers: Sequence[MaskReader]) -> MaskCounts:
    """Counts of the masks of some images."""
    counts = MaskCounts()
    for read in readers:
        try:
            counts.add(read())
        except SkippedSampleError as error:
            counts.skipped_images.add(error.reason, str(error))
    return counts


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
