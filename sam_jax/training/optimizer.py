"""AdamW with layer-wise decay of the learning rate, and its schedule."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

import flax.traverse_util
import jax
import optax

from sam_jax.errors import ConfigError
from sam_jax.models.lora import ADAPTERS
from sam_jax.trained_parameters import part_at


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer; the defaults are what all of the paper's experiments share.

    Attributes:
      peak_learning_rate: the rate after warm-up, of layers that are not scaled down.
      warmup_steps: steps of linear warm-up from 0.
      schedule: "step" multiplies the rate by ``step_rate`` at each of ``step_boundaries``;
        "cosine" lets it fall to 0 at the last step.
      step_boundaries: steps of the step schedule.
      step_rate: factor of the step schedule.
      layer_decay: factor of the rate from each encoder block to the one before it.
      weight_decay: decoupled weight decay, applied to the parameters that ``is_decayed`` names.
      beta1, beta2, epsilon: of Adam.
      clip_norm: gradients of a larger global norm are scaled down to it; None for none, as the
        paper mentions none.
      accumulate_steps: parts in which a batch's gradients are computed, to spare memory; the
        result is that of the whole batch.
    """

    peak_learning_rate: float = 8e-4
    warmup_steps: int = 250
    schedule: Literal["step", "cosine"] = "step"
    step_boundaries: Sequence[int] = (60_000, 86_666)
    step_rate: float = 0.1
    layer_decay: float = 0.8
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float | None = None
    accumulate_steps: int = 1

    def __post_init__(self) -> None:
        if self.schedule not in ("step", "cosine"):
            raise ValueError(f"schedule must be 'step' or 'cosine', got {self.schedule!r}")
        if self.accumulate_steps < 1:
            raise ValueError(f"accumulate_steps must be at least 1, got {self.accumulate_steps}")


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The learning rate at each step, before layer-wise scaling.

    Raises:
      ConfigError: if the warm-up is longer than the run.
    """
    if config.warmup_steps >= num_steps:
        raise ConfigError(
            f"optimizer.warmup_steps = {config.warmup_steps} must be less than "
            f"train.num_steps = {num_steps}"
        )
    if config.schedule == "cosine":
        return optax.schedules.warmup_cosine_decay_schedule(
            0.0, config.peak_learning_rate, config.warmup_steps, num_steps
        )
    after_warmup = {
        boundary - config.warmup_steps: config.step_rate for boundary in config.step_boundaries
    }
    return optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(0.0, config.peak_learning_rate, config.warmup_steps),
            optax.schedules.piecewise_constant_schedule(config.peak_learning_rate, after_warmup),
        ],
        [config.warmup_steps],
    )


# Blocks of a ViT, blocks of a TinyViT's stages, and what comes after the last block of a stage.
_BLOCK = re.compile(r"image_encoder/(?:stage_(\d+)_)?block_(\d+)/")
_MERGE = re.compile(r"image_encoder/stage_(\d+)_merge/")


def block_of(path: str) -> tuple[int, int] | None:
    """Stage and number of the encoder's block that a parameter belongs to; None if to none."""
    match = _BLOCK.match(path)
    return (int(match[1] or 0), int(match[2])) if match else None


def layer_of(path: str, blocks: Sequence[tuple[int, int]]) -> int:
    """The layer that a parameter counts as: 0 for patches and positions, i + 1 for block i.

    The step to the next stage belongs to the block before it. Everything outside the encoder's
    blocks is the layer after the last, which runs at the full rate. An adapter counts as what it
    adapts.

    Args:
      path: of the parameter.
      blocks: all of the encoder's, see ``block_of``, in their order.

    Source: ViTDet's published code; TinyViT's for stages.
    """
    path = path.removeprefix(f"{ADAPTERS}/")
    if block := block_of(path):
        return blocks.index(block) + 1
    if merge := _MERGE.match(path):
        return sum(stage <= int(merge[1]) for stage, _ in blocks)
    if re.match(r"image_encoder/(patch_embed|pos_embed)", path):
        return 0
    return len(blocks) + 1


_SINGLE_TOKENS = ("not_a_point", "no_mask", "class_token", "mask_token")


def is_decayed(path: str, ndim: int) -> bool:
    """True if a parameter has weight decay: not biases, norms and tables of positions.

    Learned tokens decay all alike, those that are a single vector as well: published code keeps
    each as a table with one row, and excludes biases and norms.
    """
    is_token = path.rpartition("/")[2] in _SINGLE_TOKENS
    return is_token or (ndim > 1 and not path.endswith(("pos_embed", "attention_biases")))


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Settings of the optimizer for one parameter.

    Attributes:
      layer: see ``layer_of``.
      rate_scale: factor of the learning rate.
      decayed: whether weight decay applies.
    """

    layer: int
    rate_scale: float
    decayed: bool


def parameter_groups(params: Any, config: OptimizerConfig) -> dict[str, ParameterGroup]:
    """The group of every parameter by its path."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    blocks = sorted({block for path in flat if (block := block_of(path))})

    def group(path, ndim):
        layer = layer_of(path, blocks)
        scale = config.layer_decay ** (len(blocks) + 1 - layer)
        return ParameterGroup(layer, scale, is_decayed(path, ndim))

    return {path: group(path, leaf.ndim) for path, leaf in flat.items()}


def build_optimizer(
    params: Any, config: OptimizerConfig, num_steps: int, *, trained: Any = None
) -> optax.GradientTransformation:
    """The optimizer for parameters of this tree (arrays or their shapes).

    As in AdamW, the layer's factor scales the decay together with the step.

    Args:
      params: of the whole model, by which layers are counted.
      config: the optimizer.
      num_steps: of the run.
      trained: a tree with the paths of those that it updates; None for all.
    """
    groups = parameter_groups(params, config)

    def by_path(value):
        tree = flax.traverse_util.unflatten_dict(
            {tuple(path.split("/")): value(group) for path, group in groups.items()}
        )
        return part_at(tree, trained)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=by_path(lambda g: g.decayed)),
        scale_by_factors(by_path(lambda g: g.rate_scale)),
        optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)),
    )


def scale_by_factors(factors: Any) -> optax.GradientTransformation:
    """Multiplies each update by its own constant."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u, f: u * f, updates, factors), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
