"""Fragments that several recipes share."""

import dataclasses
import re
import typing
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from sam_jax.checkpoint import CheckpointConfig
from sam_jax.data.config import OF_THE_MODEL, DataConfig
from sam_jax.evaluation.kinds import DEFAULT_KIND, KINDS
from sam_jax.losses import LossConfig
from sam_jax.model_config import ModelConfig
from sam_jax.models.lora import LoraConfig
from sam_jax.models.masked_autoencoder import AutoencoderConfig
from sam_jax.sharding import ShardingConfig
from sam_jax.simulated_user import PromptConfig
from sam_jax.training.experiment import TrainConfig
from sam_jax.training.optimizer import OptimizerConfig

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "sharding": ShardingConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
}
# What the model is trained to do, and the sections that describe it.
TASK_SECTIONS: dict[str, dict[str, type]] = {
    "segment": {"prompts": PromptConfig, "losses": LossConfig, "lora": LoraConfig},
    "reconstruct": {"autoencoder": AutoencoderConfig},
}

# Where arrays are split over the devices that share one copy of the state: the input channels of
# the encoder's products, which are 98 % of everything; and over those that share the work on an
# image, the MLP's hidden channels and the heads' outputs. What every round of prompting needs again
# is small and stays whole on every device.
SHARDING_RULES = (
    (r"image_encoder/pos_embed$", (None, None, "fsdp")),
    (r"image_encoder/block_\d+/attn/qkv/kernel$", ("fsdp", None)),
    (r"image_encoder/block_\d+/(attn/proj|mlp/dense_1)/kernel$", (("tensor", "fsdp"), None)),
    (r"image_encoder/block_\d+/mlp/dense_0/kernel$", ("fsdp", "tensor")),
    (r"image_encoder/(patch_embed/proj|neck_conv\d)/kernel$", ()),
    (r"mask_decoder/.*/kernel$", ()),
)


# Of a masked autoencoder: blocks of encoder and decoder alike.
AUTOENCODER_SHARDING_RULES = (
    (r"block_\d+/attn/qkv/kernel$", ("fsdp", None)),
    (r"block_\d+/(attn/proj|mlp/dense_1)/kernel$", (("tensor", "fsdp"), None)),
    (r"block_\d+/mlp/dense_0/kernel$", ("fsdp", "tensor")),
    (r"image_encoder/patch_embed/proj/kernel$", ()),
    (r"pixel_decoder/(embed|prediction)/kernel$", ()),
)
_RULES_OF_TASKS = {"segment": SHARDING_RULES, "reconstruct": AUTOENCODER_SHARDING_RULES}


def split_argument(argument: str) -> tuple[str, str]:
    """The two parts of a config's argument A:B, each of which may be a bucket's URL; "" for none.

    A bucket's colon is none of these, as in ``s3://bucket/data:weights``.
    """
    first, *rest = re.split(r"(?<!\bs3)(?<!\bgs):|:(?!//)", argument, maxsplit=1)
    return first, rest[0] if rest else ""


def base_config(task: str = "segment") -> ConfigDict:
    """Every section of a task, with what no recipe changes; a recipe ends with ``complete``.

    Args:
      task: a name in ``TASK_SECTIONS``.
    """
    config = ConfigDict({"task": task})
    for name in (*SECTIONS, *TASK_SECTIONS[task]):
        config[name] = ConfigDict()
    config.model = ConfigDict({"variant": "vit_b", "dtype": "float32"})
    config.sharding = ConfigDict(
        {
            "data": -1,
            "fsdp": 1,
            "tensor": 1,
            "rules": _RULES_OF_TASKS[task],
            "cpu_devices": None,
        }
    )
    config.evals = ConfigDict()
    return config


def complete(config: ConfigDict) -> ConfigDict:
    """The config with every field of every section, so that the command line can set any of them.

    What a recipe does not mention has the library's default.
    """
    for name, cls in (SECTIONS | TASK_SECTIONS[config.task]).items():
        _complete_section(config[name], cls)
    _complete_evals(config)
    return config


def only_evals(evals: dict[str, dict[str, Any]]) -> ConfigDict:
    """A config for ``eval.py`` alone, which takes the model that the checkpoint is of."""
    config = ConfigDict({"evals": evals})
    _complete_evals(config)
    return config


def _complete_evals(config: ConfigDict) -> None:
    for evaluation in config.evals.values():
        _complete_section(evaluation, KINDS[evaluation.get("kind", DEFAULT_KIND)].config)


def _complete_section(section: ConfigDict, cls: type) -> None:
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.metadata == OF_THE_MODEL:
            continue  # the program sets it
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value = section.get(field.name, default)
        if value is dataclasses.MISSING:
            continue  # the program sets it
        # A bare None would take no value from the command line, for want of a type.
        section[field.name] = _empty(types[field.name]) if value is None else value


def _empty(annotation: Any) -> Any:
    """None, of the type that ``X | None`` allows."""
    (kind,) = (arg for arg in typing.get_args(annotation) if arg is not type(None))
    return placeholder(typing.get_origin(kind) or kind)


def eval_section(kind: str, cls: type, **options: Any) -> ConfigDict:
    """An evaluation of some kind with every field of its dataclass, so that flags can set them.

    Args:
      kind: its name in ``sam_jax.evaluation.kinds``.
      cls: the dataclass of its options.
      **options: that differ from their defaults.
    """
    section = ConfigDict(options)
    _complete_section(section, cls)
    section.kind = kind
    return section
