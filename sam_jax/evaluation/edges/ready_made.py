"""Scores of edge maps that are there already, of any method: a picture for each image."""

import dataclasses
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sam_jax.errors import ConfigError
from sam_jax.evaluation.edges.benchmark import import_counts
from sam_jax.evaluation.edges.dataset import files_by_stem, list_examples
from sam_jax.evaluation.edges.pictures import precision_recall
from sam_jax.evaluation.edges.png import read_edge_map
from sam_jax.evaluation.edges.report import EdgeReport, summarize
from sam_jax.evaluation.edges.suppression import NO_SUPPRESSION, SUPPRESSIONS, suppressed
from sam_jax.evaluation.edges.thresholds import even_thresholds
from sam_jax.evaluation.evaluation import Record
from sam_jax.images import PICTURE_SUFFIXES


def score_maps(
    maps: Path,
    data: Path,
    *,
    split: str = "",
    suppression: str = NO_SUPPRESSION,
    num_thresholds: int = 99,
    max_distance_rate: float = 0.0075,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> EdgeReport:
    """The benchmark's scores of a folder of edge maps.

    Args:
      maps: grey pictures, white where edges are, with the names of the images.
      data: see ``dataset.list_examples``.
      split: see there.
      suppression: one of ``SUPPRESSIONS``, which the maps have not gone through, or "none".
      num_thresholds: evenly spaced between 0 and 1.
      max_distance_rate: how far off an edge may be, as a rate of the image's diagonal.
      on_progress: hears how many images are done, and of how many.

    Raises:
      ConfigError: an image has no map or a map no image; an option is not known; Numba is missing.
      AnnotationError: boundaries cannot be read, or are of another size than the map.
      ImageError: a map cannot be read.
    """
    if suppression not in (*SUPPRESSIONS, NO_SUPPRESSION):
        raise ConfigError(
            f"there is no suppression {suppression!r}; there are {', '.join(SUPPRESSIONS)} and "
            f"{NO_SUPPRESSION}"
        )
    if num_thresholds < 1 or not 0 < max_distance_rate < 1:
        raise ConfigError(
            "expected a threshold at least, and a distance between 0 and 1 of the diagonal, got "
            f"{num_thresholds} and {max_distance_rate}"
        )
    start = time.monotonic()
    benchmark = import_counts()
    examples = {example.name: example for example in list_examples(data, split)}
    files = files_by_stem(maps, PICTURE_SUFFIXES)
    for names, others, what in ((examples, files, "no map in"), (files, examples, "a map in")):
        alone = sorted(names.keys() - others.keys())
        if alone:
            raise ConfigError(
                f"{len(alone)} images, as {alone[0]}, have {what} {maps} only: expected a map for "
                f"each image of {data}, by the same name"
            )
    thresholds = even_thresholds(num_thresholds)

    def scored(name: str) -> Record:
        edges = suppressed(read_edge_map(files[name]), suppression)
        boundaries = examples[name].read_boundaries(edges, files[name])
        annotated = benchmark.AnnotatedImage(boundaries, max_distance_rate)
        found = {maps.name: {suppression: edges}}
        return benchmark.image_record(name, annotated, found, thresholds)

    records = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for record in pool.map(scored, examples):
            records.append(record)
            on_progress(len(records), len(examples))
    settings = {
        "maps": str(maps),
        "path": str(data),
        "split": split,
        "suppressions": [suppression],
        "num_thresholds": num_thresholds,
        "max_distance_rate": max_distance_rate,
    }
    report = summarize(records, settings, time.monotonic() - start)
    curves = precision_recall(report.curves, report.scores)
    return dataclasses.replace(report, pictures={"precision_recall": curves})
