"""A stream of images that are read ahead, answered by the model, and scored by threads."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

from sam_jax.data.samples import SkippedSampleError
from sam_jax.evaluation.evaluation import Record

_Image = TypeVar("_Image")
_Answer = TypeVar("_Answer")
# Images that are read before the model asks for them, and answers that are scored at once.
_READ_AHEAD = 2
_SCORED_AT_ONCE = 4


def records_of_stream(
    indices: Iterable[int],
    read: Callable[[int], _Image],
    answer: Callable[[Iterator[_Image]], Iterator[_Answer]],
    score: Callable[[_Image, _Answer], Record],
    skip: Callable[[int, SkippedSampleError], Record],
) -> Iterator[Record]:
    """The record of each image, in order; reading and scoring overlap with the model's work.

    Args:
      indices: of the images.
      read: an image by its index, in a thread.
      answer: the model's answers to a stream of images, one for each, in their order.
      score: the record of an image and its answer, in a thread.
      skip: the record of an image that cannot be used.
    """
    waiting: deque[Any] = deque()
    scored: deque[Future[Record]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def usable() -> Iterator[_Image]:
            for index, image in _read_ahead(indices, read, pool):
                if isinstance(image, SkippedSampleError):
                    waiting.append(_done(skip(index, image)))
                else:
                    waiting.append(image)
                    yield image

        for answered in answer(usable()):
            while isinstance(waiting[0], Future):
                scored.append(waiting.popleft())
            scored.append(pool.submit(score, waiting.popleft(), answered))
            # As soon as they are ready, since what is recorded is not lost.
            while scored and (len(scored) > _SCORED_AT_ONCE or scored[0].done()):
                yield scored.popleft().result()
        # What is left cannot be used, or it would have been answered.
        for future in itertools.chain(scored, waiting):
            yield future.result()


def _read_ahead(
    indices: Iterable[int], read: Callable[[int], _Image], pool: Executor
) -> Iterator[tuple[int, _Image | SkippedSampleError]]:
    def attempt(index: int) -> tuple[int, _Image | SkippedSampleError]:
        try:
            return index, read(index)
        except SkippedSampleError as error:
            return index, error

    left = iter(indices)
    reading = deque(pool.submit(attempt, index) for index in itertools.islice(left, _READ_AHEAD))
    while reading:
        ready = reading.popleft().result()
        reading.extend(pool.submit(attempt, index) for index in itertools.islice(left, 1))
        yield ready


def _done(record: Record) -> Future[Record]:
    future: Future[Record] = Future()
    future.set_result(record)
    return future
