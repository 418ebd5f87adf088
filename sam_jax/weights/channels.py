"""Channels of the images that a model takes, as files of weights say them."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sam_jax.configuration import from_mapping
from sam_jax.errors import ConfigError
from sam_jax.models.sam import SamConfig
from sam_jax.ops.images import RGB, ImageChannels
from sam_jax.weights.files import WeightsError, read_metadata

# What Hugging Face's programs read it from.
PREPROCESSOR = "preprocessor_config.json"
# The name of it in metadata of safetensors.
_CHANNELS = "image_channels"
# Of statistics that were rounded to be written, in units of 8 bits.
_ROUNDING = 1e-2


def metadata_of(channels: ImageChannels) -> dict[str, str]:
    """Metadata that say what images a model takes."""
    return {_CHANNELS: json.dumps(dataclasses.asdict(channels))}


def channels_in(metadata: Mapping[str, str], path: Path) -> ImageChannels | None:
    """Channels as the metadata of a file say; None if they do not.

    Raises:
      WeightsError: if they say what makes no sense.
    """
    text = metadata.get(_CHANNELS)
    if text is None:
        return None
    try:
        return from_mapping(ImageChannels, json.loads(text), _CHANNELS)
    except (ConfigError, ValueError, TypeError) as error:
        raise WeightsError(f"{path}: its metadata {_CHANNELS} are damaged: {error}") from None


def stated_channels(path: Path, *, is_hugging_face: bool) -> ImageChannels | None:
    """Channels as a file of weights says, or what lies beside one of Hugging Face; None if neither.

    Raises:
      WeightsError: if its metadata say what makes no sense.
    """
    stated = channels_in(read_metadata(path), path)
    return _preprocessed_channels(path) if stated is None and is_hugging_face else stated


def _preprocessed_channels(path: Path) -> ImageChannels | None:
    """Channels as Hugging Face's ``preprocessor_config.json`` has them; None for published ones."""
    file = (path if path.is_dir() else path.parent) / PREPROCESSOR
    try:
        said = json.loads(file.read_text())
        if not said.get("do_normalize", True):
            return None
        mean, std = said["image_mean"], said["image_std"]
        is_rgb = bool(said.get("do_rescale")) and len(mean) == RGB.count
        scale = 1 / said["rescale_factor"] if said.get("do_rescale") else 1.0
        scaled = (tuple(value * scale for value in values) for values in (mean, std))
        found = ImageChannels(None if is_rgb else len(mean), *scaled)
    # It is there for other programs, and may be of any kind.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None
    ours, published = (np.array([c.pixel_mean, c.pixel_std]) for c in (found, RGB))
    is_published = is_rgb and bool(np.abs(ours - published).max() < _ROUNDING)
    return None if is_published else found


def preprocessor_of(config: SamConfig) -> dict[str, Any]:
    """The content of Hugging Face's ``preprocessor_config.json`` for a model."""
    encoder = config.image_encoder
    side = max(encoder.image_size)
    # Hugging Face's name for the size of low-resolution masks; four per image token and side.
    low_res = 4 * encoder.grid[0]
    channels = config.channels
    # 8-bit pixels are brought to [0, 1] first; values as they are stored are not.
    is_rgb = channels.in_chans is None
    mean, std = (
        [round(value / 255, 6) if is_rgb else value for value in values]
        for values in (channels.pixel_mean, channels.pixel_std)
    )
    return {
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
        "do_convert_rgb": is_rgb,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": is_rgb,
        "do_resize": True,
        "image_mean": mean,
        "image_std": std,
        "mask_pad_size": {"height": low_res, "width": low_res},
        "mask_size": {"longest_edge": low_res},
        "pad_size": {"height": side, "width": side},
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": side},
    }
