"""Names, to ``jax.checkpoint``, of results that a backward pass may keep instead of making again.

Source: ``jax.ad_checkpoint.checkpoint_name`` and ``jax.checkpoint_policies``.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

T = TypeVar("T")

# Name of results of large matrix products.
PRODUCT = "product"
# Name of results that are slow to recompute and small to keep: clicks, a few sums of each mask,
# results of kernels.
WORTH_KEEPING = "worth keeping"


def product_of(x: T) -> T:
    """``x``, named ``PRODUCT``: the result of a large matrix product."""
    return checkpoint_name(x, PRODUCT)


def worth_keeping(x: T) -> T:
    """``x``, named ``WORTH_KEEPING``."""
    return checkpoint_name(x, WORTH_KEEPING)


def keeping(*names: str) -> Callable[..., Any]:
    """A policy of ``jax.checkpoint`` that keeps what has one of these names, and nothing else."""
    return jax.checkpoint_policies.save_only_these_names(*names)
