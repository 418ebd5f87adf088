"""The images of a data set that an evaluation is on, where the whole would take too long."""

import heapq
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sam_jax.data.samples import SkippedSampleError
from sam_jax.data.sources import ListingSource, Source
from sam_jax.evaluation.clicks import keyed_number

# A data set with no more masks than so many times the target is taken whole: the paper draws about
# 10,000 masks of those that have more than 15,000.
MOST_PER_TARGET = 1.5
# Images whose masks are counted together.
_BLOCK = 64


def draw(number: int, limit: int | None, key: str) -> Sequence[int]:
    """At most ``limit`` of the first ``number`` integers, rising; the key decides which."""
    if limit is None or number <= limit:
        return range(number)
    return sorted(heapq.nsmallest(limit, range(number), lambda i: keyed_number(f"{key}/{i}")))


def drawn_examples(records: Sequence[Mapping[str, Any]], key: str, limit: int) -> list[int]:
    """At most ``limit`` records with something under a key, by a hash of their images' ids."""
    able = [number for number, record in enumerate(records) if record.get(key)]
    return sorted(able, key=lambda i: keyed_number(f"example/{records[i]['image_id']}"))[:limit]


def draw_until(source: Source, target_masks: int, key: str) -> Sequence[int]:
    """Images drawn at random until they have so many masks together, or all of a small data set.

    Images come in the order of a hash of the key and their file's name below the data set's folder,
    up to the first with which the number of masks reaches the target. If all images have no more
    than ``MOST_PER_TARGET`` times the target, all are taken. So what is drawn follows from the key
    and the data set alone: it is the same on every host, in whatever order and wherever the files
    lie, and a larger target draws the same images and more.

    Masks are counted as the source does without decoding (``ListingSource``); sources that list
    nothing are told apart by the number of the sample, and read. Only as many images are counted as
    are needed to know. One that cannot be read counts no mask and is drawn like others, so that the
    evaluation meets it and says so.

    Args:
      source: the data set.
      target_masks: the number of masks, at least 1.
      key: names the data set and the seed, e.g. ``"0/LVIS"``.

    Returns:
      Numbers of the samples, rising.

    Source: Kirillov et al. 2023, appendix D.1.
    Differs: the paper's own draw was not published, so the images are others than its.
    """
    name = source.file_name if isinstance(source, ListingSource) else str
    order = sorted(
        range(len(source)), key=lambda index: (keyed_number(f"{key}/{name(index)}"), name(index))
    )
    num_masks = 0
    num_drawn = None
    for position, count in enumerate(_counts(source, order), start=1):
        num_masks += count
        if num_drawn is None and num_masks >= target_masks:
            num_drawn = position
        if num_masks > MOST_PER_TARGET * target_masks:
            return sorted(order[:num_drawn])
    return range(len(source))


def _counts(source: Source, order: Sequence[int]) -> Iterator[int]:
    """Numbers of masks of these samples, of which some are counted at once."""
    listing = source if isinstance(source, ListingSource) else None

    def count(index: int) -> int:
        try:
            if listing is not None:
                return listing.num_masks(index)
            return len(source[index].masks_rle)
        except SkippedSampleError:
            return 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(order), _BLOCK):
            yield from pool.map(count, order[start : start + _BLOCK])
