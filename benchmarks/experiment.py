"""The experiment that a benchmark's options name."""

import argparse
from collections.abc import Sequence
from typing import Any

from sam_jax.training.experiment import Experiment, read_config


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that ``load`` reads."""
    parser.add_argument("--config", required=True, help="as for train.py: FILE.py or FILE.py:ARG")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change the config; may be given several times",
    )
    parser.add_argument(
        "--synthetic", action="store_true", help="procedural images instead of the config's sources"
    )


def load(args: argparse.Namespace) -> Experiment:
    """The experiment that the options describe.

    Raises:
      ConfigError: if a section does not fit what it describes.
    """
    sections = read_config(args.config, args.set)
    experiment = Experiment.of(sections)
    if not args.synthetic:
        return experiment
    source = {"kind": "synthetic", "image_size": experiment.task.model.image_size}
    return Experiment.of(sections | {"data": {**sections["data"], "sources": (source,)}})


def names_of(sources: Sequence[Any]) -> list[str]:
    """Names of the sources of a data section, without their paths."""
    return [source.name or source.kind for source in sources]
