"""Low-rank adapters (LoRA) of dense layers, as functions of a tree of parameters.

Models know nothing of them. A tree that has adapters keeps them beside the model's parts, under
``lora``, with the paths of what they change; merged, it is an ordinary tree of the model.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from sam_jax.arrays import Array
from sam_jax.errors import ConfigError
from sam_jax.ops.full_precision import EXACT

ADAPTERS = "lora"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the image encoder's dense layers.

    An adapted kernel W [inputs, outputs] becomes ``W + alpha / rank * a @ b`` with a
    [inputs, rank] and b [rank, outputs].

    Attributes:
      rank: of the change; 0 for no adapters. Queries, keys and values are one layer here, and
        share its rank.
      alpha: factor of the change, over the rank: with it fixed, another rank needs no other
        learning rate.
      targets: layers that are adapted, by the end of their path: "attn/qkv" and "attn/proj" of both
        kinds of encoders' blocks, also "mlp/dense_0" and "mlp/dense_1". Regular expressions.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attn/qkv", "attn/proj")

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank must be at least 0, got {self.rank}")

    @property
    def scale(self) -> float:
        """Factor of ``a @ b``."""
        return self.alpha / self.rank


def adapted_kernels(params: Any, config: LoraConfig) -> dict[str, Any]:
    """The kernels of a model, or their shapes, that a config adapts, by path.

    Raises:
      ConfigError: if a target is no dense layer of the image encoder, or no regular expression.
    """
    flat = flatten_dict(params, sep="/")
    kernels = {path: leaf for path, leaf in flat.items() if path.endswith("/kernel")}
    found: dict[str, Any] = {}
    for target in config.targets if config.rank else ():
        try:
            pattern = re.compile(rf"image_encoder/(.+/)?({target})/kernel")
        except re.error as error:
            raise ConfigError(
                f"lora.targets: {target!r} is no regular expression: {error}"
            ) from error
        matches = {path: leaf for path, leaf in kernels.items() if pattern.fullmatch(path)}
        if not matches:
            raise ConfigError(
                f"lora.targets: {target!r} is the end of no layer's path in the image encoder; its "
                f"layers end in {', '.join(_ends(kernels))}"
            )
        if other := [path for path, leaf in matches.items() if leaf.ndim != 2]:
            raise ConfigError(
                f"lora.targets: {target!r} is {other[0]} as well, which is a convolution; expected "
                "dense layers only"
            )
        found |= matches
    return {path: found[path] for path in sorted(found)}


def _ends(kernels: Mapping[str, Any]) -> list[str]:
    """Last two parts of the paths of the image encoder's dense layers."""
    return sorted(
        {
            "/".join(path.split("/")[-3:-1])
            for path, leaf in kernels.items()
            if path.startswith("image_encoder/") and leaf.ndim == 2
        }
    )


def with_adapters(params: Mapping[str, Any], config: LoraConfig, key: Array) -> dict[str, Any]:
    """Parameters with fresh adapters, under which the model is what it was without; float32.

    The first factor is uniform within ``1 / sqrt(inputs)``, the second one zero.

    Raises:
      ConfigError: see ``adapted_kernels``.
    """
    adapters = {}
    for index, (path, kernel) in enumerate(adapted_kernels(params, config).items()):
        inputs, outputs = kernel.shape
        bound = inputs**-0.5
        layer = path.removesuffix("/kernel")
        adapters[f"{layer}/a"] = jax.random.uniform(
            jax.random.fold_in(key, index), (inputs, config.rank), jnp.float32, -bound, bound
        )
        adapters[f"{layer}/b"] = jnp.zeros((config.rank, outputs), jnp.float32)
    if not adapters:
        return dict(params)
    return {**params, ADAPTERS: unflatten_dict(adapters, sep="/")}


def merged(params: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """Parameters of the model itself, to which adapters have been added.

    Args:
      params: with or without adapters.
      config: that they were made with; of rank 0, parameters stay as they are.
    """
    if not config.rank:
        return dict(params)
    adapters = flatten_dict(params.get(ADAPTERS, {}), sep="/")
    flat = flatten_dict({name: part for name, part in params.items() if name != ADAPTERS}, sep="/")
    for layer in {path.rpartition("/")[0] for path in adapters}:
        change = jnp.matmul(adapters[f"{layer}/a"], adapters[f"{layer}/b"], precision=EXACT)
        flat[f"{layer}/kernel"] = flat[f"{layer}/kernel"] + config.scale * change
    return unflatten_dict(flat, sep="/")


def merged_variables(variables: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """Variables of the model itself, see ``merged``."""
    return {**variables, "params": merged(variables["params"], config)}
