"""Segment Anything in JAX: the model, its training, its evaluation, its weights."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam_jax.inference.automatic import AutomaticOptions, generate_masks
    from sam_jax.inference.predictor import Predictor
    from sam_jax.inference.prompts import Prompt
    from sam_jax.model_config import ModelConfig, build_model
    from sam_jax.models.prompt_encoder import Prompts
    from sam_jax.models.sam import Sam
    from sam_jax.ops.images import normalize_images
    from sam_jax.weights.load import load

__all__ = [
    "AutomaticOptions",
    "ModelConfig",
    "Predictor",
    "Prompt",
    "Prompts",
    "Sam",
    "build_model",
    "generate_masks",
    "load",
    "normalize_images",
]

_HOMES = {
    "AutomaticOptions": "inference.automatic",
    "ModelConfig": "model_config",
    "Predictor": "inference.predictor",
    "Prompt": "inference.prompts",
    "Prompts": "models.prompt_encoder",
    "Sam": "models.sam",
    "build_model": "model_config",
    "generate_masks": "inference.automatic",
    "load": "weights.load",
    "normalize_images": "ops.images",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: the workers that read data import this package, too, and need no JAX.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
