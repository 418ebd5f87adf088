"""Shapes of what functions make, traced once in a process."""

from collections.abc import Callable
from typing import Any

import jax

_SHAPES: dict[str, Any] = {}


def shapes_once(make: Callable[[], Any], text: str) -> Any:
    """Shapes and types of what a function makes, as a tree of ``jax.ShapeDtypeStruct``.

    Args:
      make: the function, which is traced the first time.
      text: all that the shapes depend on, such as the text of a config that may hold lists.
    """
    if text not in _SHAPES:
        _SHAPES[text] = jax.eval_shape(make)
    # The caller's own, to change as it likes.
    return jax.tree.map(lambda leaf: leaf, _SHAPES[text])
