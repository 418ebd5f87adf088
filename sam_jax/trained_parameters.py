"""Trained parameters among all of a model's: named by patterns, taken out of the tree, put back.

The trained ones are a tree of their own, with the same paths: gradients, moments and averages exist
for them alone.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from sam_jax.errors import ConfigError

# Names for what people train most, and the patterns that they stand for.
PATTERNS = {"all": r"", "decoder": r"^mask_decoder/", "lora": r"^lora/"}


def select_trained(params: Any, patterns: Sequence[str]) -> Any:
    """The part of a tree of parameters, or of their shapes, that is trained.

    Args:
      params: of the whole model.
      patterns: names of ``PATTERNS``, or regular expressions searched in paths such as
        ``image_encoder/block_00/attn/qkv/kernel``; a parameter that any of them matches is trained.

    Raises:
      ConfigError: if a pattern matches nothing, or is no regular expression.
    """
    flat = flatten_dict(params, sep="/")
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = {path for path in flat if re.search(PATTERNS.get(pattern, pattern), path)}
        except re.error as error:
            raise ConfigError(
                f"train.trainable: {pattern!r} is no regular expression: {error}"
            ) from error
        if not found:
            hint = "; lora.rank = 0 makes no adapters" if pattern == "lora" else ""
            raise ConfigError(
                f"train.trainable: {pattern!r} matches none of the model's parameters{hint}. "
                f"Expected {', '.join(PATTERNS)}, or a regular expression found in paths such as "
                f"{', '.join(sorted(flat)[:: max(1, len(flat) // 3)][:3])}"
            )
        chosen |= found
    if not chosen:
        raise ConfigError(
            f"train.trainable is empty: nothing would be trained; name {', '.join(PATTERNS)}, or "
            "regular expressions"
        )
    return unflatten_dict({path: leaf for path, leaf in flat.items() if path in chosen}, sep="/")


def part_at(tree: Any, places: Any) -> Any:
    """The leaves of a tree at the places of the leaves of another; None for the whole tree."""
    if places is None or not isinstance(places, Mapping):
        return tree
    return {name: part_at(tree[name], below) for name, below in places.items()}


def with_part(tree: Any, part: Any) -> Any:
    """A tree with the leaves of another in their places, those that it has not as well."""
    if not isinstance(part, Mapping):
        return part
    return {**tree, **{name: with_part(tree.get(name, {}), below) for name, below in part.items()}}
