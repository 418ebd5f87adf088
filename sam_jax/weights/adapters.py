"""Files of trained parameters alone, adapters and a decoder, to be put on top of their base."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from sam_jax.checkpoint import restore_variables
from sam_jax.configuration import from_mapping
from sam_jax.errors import ConfigError
from sam_jax.models.lora import ADAPTERS, LoraConfig, adapted_kernels, merged
from sam_jax.ops.images import ImageChannels
from sam_jax.trained_parameters import select_trained, with_part
from sam_jax.weights.channels import channels_in, metadata_of
from sam_jax.weights.files import (
    SAFETENSORS_SUFFIX,
    WeightsError,
    failing_as_os_error,
    written_whole,
)
from sam_jax.weights.runs import run_config, run_lora, run_trainable

# How the file says what it is.
_FORM, _FORM_NAME = "form", "sam_jax adapters 1"
_IMAGE_SIZE = "image_size"
# Tables of positions are interpolated where a base is read for images of another size.
_POSITIONS = re.compile(r"/(pos_embed|rel_pos_[hw])$")


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Trained parameters apart from those that they were trained with.

    Attributes:
      path: of the file.
      config: of the adapters; rank 0 where there are none.
      params: trained parameters, as a part of the model's tree with adapters.
      base: name of the parameters that they were trained with, see ``base_name``.
      channels: of the images that they were trained on; None if the file does not say.
      image_size: height and width of those in pixels, likewise.
    """

    path: Path
    config: LoraConfig
    params: Mapping[str, Any]
    base: str
    channels: ImageChannels | None = None
    image_size: tuple[int, int] | None = None


def base_name(params: Mapping[str, Any], trained: Mapping[str, Any]) -> str:
    """A name of the parameters of a model that are not among the trained ones.

    Tables of positions do not count, which have other values for images of another size.
    """
    own = flatten_dict(trained, sep="/")
    hashed = hashlib.blake2b(digest_size=16)
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        if path in own or path.startswith(f"{ADAPTERS}/") or _POSITIONS.search(path):
            continue
        hashed.update(path.encode())
        hashed.update(np.ascontiguousarray(leaf, np.float32).data)
    return hashed.hexdigest()


def write_adapters(
    run: str | Path, path: str | Path, *, step: int | None = None, ema: bool = True
) -> str:
    """Writes what a run has trained into a file of its own, and says what it is.

    Args:
      run: the folder of a training run that did not train everything.
      path: ``.safetensors`` file to write, whole or not at all.
      step: which checkpoint; None for the newest.
      ema: whether averaged parameters are taken, where the run keeps them.

    Raises:
      WeightsError: if the run has trained everything, its config is missing or damaged, or the
        file cannot be written.
      CheckpointError: if there is no such checkpoint.
    """
    run, path = Path(run), Path(path)
    if path.suffix != SAFETENSORS_SUFFIX:
        raise WeightsError(f"{path}: adapters are written as {SAFETENSORS_SUFFIX}")
    patterns = run_trainable(run)
    if "all" in patterns:
        raise WeightsError(
            f"{run} has trained all parameters, as its train.trainable says: without them nothing "
            "is left; convert the whole model"
        )
    config, model = run_lora(run), run_config(run)
    params = jax.device_get(restore_variables(run, step, ema=ema)["params"])
    trained = select_trained(params, patterns)
    tensors = {name: np.asarray(leaf) for name, leaf in flatten_dict(trained, sep="/").items()}
    about = {
        _FORM: _FORM_NAME,
        ADAPTERS: json.dumps(dataclasses.asdict(config)),
        "base": base_name(params, trained),
        _IMAGE_SIZE: json.dumps(model.image_encoder.image_size),
        **metadata_of(model.channels),
    }
    with written_whole(path) as unfinished, failing_as_os_error(SafetensorError):
        safetensors.numpy.save_file(tensors, unfinished, about)
    size = sum(tensor.size for tensor in tensors.values())
    what = f"adapters of rank {config.rank} and what else" if config.rank else "what"
    return f"{what} was trained of {run}, {size:,} parameters"


def read_adapters(path: str | Path) -> Adapters:
    """Trained parameters from a file that ``write_adapters`` wrote.

    Raises:
      WeightsError: if it is something else, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} does not exist: expected a file of adapters")
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is damaged, cut short or no safetensors file: {error}"
        ) from None
    if about.get(_FORM) != _FORM_NAME:
        raise WeightsError(
            f"{path} holds no adapters, as sam-jax convert RUN FILE --only-adapters writes them"
        )
    try:
        config = from_mapping(LoraConfig, json.loads(about[ADAPTERS]), ADAPTERS)
    except (ConfigError, KeyError, ValueError) as error:
        raise WeightsError(f"{path}: its {ADAPTERS} is damaged: {error}") from None
    return Adapters(
        path,
        config,
        unflatten_dict(tensors, sep="/"),
        about.get("base", ""),
        channels_in(about, path),
        _image_size_in(about, path),
    )


def _image_size_in(about: Mapping[str, str], path: Path) -> tuple[int, int] | None:
    if _IMAGE_SIZE not in about:
        return None
    try:
        height, width = map(int, json.loads(about[_IMAGE_SIZE]))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its {_IMAGE_SIZE} is damaged: {error}") from None
    return height, width


def adapted(params: Mapping[str, Any], adapters: Adapters) -> dict[str, Any]:
    """A base's parameters with trained ones in their places; adapters lie beside them.

    Raises:
      WeightsError: if they were trained on top of another base.
    """
    shapes, own = (
        {name: np.shape(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}
        for tree in (params, adapters.params)
    )
    for path, kernel in adapted_kernels(params, adapters.config).items():
        layer = f"{ADAPTERS}/{path.removesuffix('/kernel')}"
        shapes[f"{layer}/a"] = (kernel.shape[0], adapters.config.rank)
        shapes[f"{layer}/b"] = (adapters.config.rank, kernel.shape[1])
    wrong = [
        f"{name} {shape}, there {shapes.get(name, 'nothing')}"
        for name, shape in own.items()
        if shapes.get(name) != shape
    ]
    if wrong:
        raise WeightsError(
            f"{adapters.path} belongs to another model: it has {'; '.join(wrong[:3])}"
        )
    if base_name(params, adapters.params) != adapters.base:
        raise WeightsError(
            f"{adapters.path} was trained on top of other weights than these, and means nothing "
            "here: take those that its run started from (train.init_from)"
        )
    return with_part(params, adapters.params)


def merged_with(variables: Mapping[str, Any], adapters: Adapters) -> dict[str, Any]:
    """Variables of a base of which trained parameters are a part now, adapters merged.

    Raises:
      WeightsError: see ``adapted``.
    """
    return {
        **variables,
        "params": merged(adapted(variables["params"], adapters), adapters.config),
    }
