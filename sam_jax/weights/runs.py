"""The model that a training run's folder says it trains."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sam_jax.checkpoint import CONFIG
from sam_jax.configuration import from_mapping
from sam_jax.errors import ConfigError
from sam_jax.model_config import ModelConfig, build_autoencoder, build_model
from sam_jax.models.lora import ADAPTERS, LoraConfig
from sam_jax.models.masked_autoencoder import AutoencoderConfig, MaskedAutoencoder
from sam_jax.models.sam import Sam, SamConfig
from sam_jax.weights.files import WeightsError
from sam_jax.weights.geometry import channel_differences, differences

# What of an encoder, and of what is added to it, makes two masked autoencoders different ones.
_ENCODER_FIELDS = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_rate")
_AUTOENCODER_FIELDS = (
    "normalize_pixels",
    "decoder_dim",
    "decoder_depth",
    "decoder_heads",
    "decoder_mlp_rate",
)
_Read = TypeVar("_Read")


def run_config(run: Path) -> SamConfig:
    """The shape of the promptable model that a run trains, or of the one whose encoder it does.

    Raises:
      WeightsError: if its config is missing or damaged.
    """
    return _from_sections(run, lambda sections: build_model(_model_section(sections)).config)


def run_autoencoder(run: Path) -> MaskedAutoencoder | None:
    """The masked autoencoder that a run trains; None if it trains a promptable model.

    Raises:
      WeightsError: if its config is missing or damaged.
    """

    def autoencoder(sections: Mapping[str, Any]) -> MaskedAutoencoder | None:
        if not is_pretraining(sections):
            return None
        section = from_mapping(AutoencoderConfig, sections["autoencoder"], "autoencoder")
        return build_autoencoder(_model_section(sections), section)

    return _from_sections(run, autoencoder)


def run_lora(run: Path) -> LoraConfig:
    """The adapters that a run trains; of rank 0 for none.

    Raises:
      WeightsError: if its config is missing or damaged.
    """
    return _from_sections(
        run, lambda sections: from_mapping(LoraConfig, sections.get(ADAPTERS, {}), ADAPTERS)
    )


def run_trainable(run: Path) -> tuple[str, ...]:
    """Patterns of the parameters that a run trains, see ``trained_parameters``.

    Raises:
      WeightsError: if its config is missing or damaged.
    """
    return _from_sections(
        run, lambda sections: tuple(sections.get("train", {}).get("trainable", ("all",)))
    )


def is_pretraining(sections: Mapping[str, Any]) -> bool:
    """True if a config's task is to train a masked autoencoder."""
    return sections.get("task") == "reconstruct"


def run_differences(run: Path, model: Sam | MaskedAutoencoder) -> list[str]:
    """Differences of the model that a run trains from this one, a line each.

    Raises:
      WeightsError: if its config is missing or damaged.
    """
    found = run_autoencoder(run)
    if isinstance(model, Sam):
        if found is not None:
            return ["it trains a masked autoencoder, expected a promptable model"]
        return differences(run_config(run), model.config)
    if found is None:
        return ["it trains a promptable model, expected a masked autoencoder"]
    return [
        f"{name} is {ours}, expected {theirs}"
        for name, ours, theirs in (
            (name, getattr(of_run, name), getattr(of_model, name))
            for of_run, of_model, names in (
                (found.encoder, model.encoder, _ENCODER_FIELDS),
                (found.config, model.config, _AUTOENCODER_FIELDS),
            )
            for name in names
        )
        if ours != theirs
    ] + channel_differences(found.channels, model.channels)


def _model_section(sections: Mapping[str, Any]) -> ModelConfig:
    return from_mapping(ModelConfig, dict(sections["model"]), "model")


def _from_sections(run: Path, read: Callable[[Mapping[str, Any]], _Read]) -> _Read:
    """The answer of a function to the sections of a run's config."""
    try:
        return read(json.loads((run / CONFIG).read_text()))
    except FileNotFoundError:
        raise WeightsError(
            f"{run / CONFIG} is missing: it says what model the run trains"
        ) from None
    except ConfigError as error:
        raise WeightsError(f"{run / CONFIG}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{run / CONFIG}: expected JSON with a map 'model': {error!r}") from None
