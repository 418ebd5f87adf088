"""Segment Anything in JAX: the model, its training, its evaluation, its weights."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam_jax.weights.load import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: the workers that read data import this package, too, and need no JAX.
    if name == "load":
        from sam_jax.weights.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
