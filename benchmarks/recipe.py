"""A config file and what train.py makes of it, without train.py's flags."""

import argparse
import ast
import dataclasses
import runpy
from collections.abc import Sequence
from typing import Any

from sam_jax.configuration import from_mapping
from sam_jax.data import DataConfig
from sam_jax.losses import LossConfig
from sam_jax.models.sam import Sam
from sam_jax.models.variants import ModelConfig, build_model
from sam_jax.prompts import PromptConfig
from sam_jax.sharding import ShardingConfig
from sam_jax.training.loop import TrainConfig
from sam_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The sections of a config that a benchmark needs, built."""

    model: Sam
    data: DataConfig
    prompts: PromptConfig
    losses: LossConfig
    optimizer: OptimizerConfig
    sharding: ShardingConfig
    train: TrainConfig


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


def load(args: argparse.Namespace) -> Recipe:
    """The recipe that the options describe.

    Raises:
      ConfigError: if a section does not fit what it describes.
    """
    path, _, argument = args.config.partition(":")
    get_config = runpy.run_path(path)["get_config"]
    config = get_config(argument) if argument else get_config()
    config.update_from_flattened_dict(dict(_setting(text) for text in args.set))
    sections: dict[str, Any] = config.to_dict()
    model = build_model(from_mapping(ModelConfig, sections["model"], "model"))
    data = {**sections["data"], "image_size": model.image_size}
    if args.synthetic:
        data["sources"] = ({"kind": "synthetic", "image_size": model.image_size},)
    return Recipe(
        model=model,
        data=from_mapping(DataConfig, data, "data"),
        prompts=from_mapping(PromptConfig, sections["prompts"], "prompts"),
        losses=from_mapping(LossConfig, sections["losses"], "losses"),
        optimizer=from_mapping(OptimizerConfig, sections["optimizer"], "optimizer"),
        sharding=from_mapping(ShardingConfig, sections["sharding"], "sharding"),
        train=from_mapping(TrainConfig, sections["train"], "train"),
    )


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


def names_of(sources: Sequence[Any]) -> list[str]:
    """What the sources of a data section are called, without their paths."""
    return [source.name or source.kind for source in sources]
