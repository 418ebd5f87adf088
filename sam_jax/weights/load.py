"""Checkpoints of every form: told apart, loaded, saved, described."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sam_jax import places
from sam_jax.arrays import Array
from sam_jax.buckets import is_url
from sam_jax.checkpoint import (
    CHECKPOINTS,
    checkpoint_path,
    restore_variables,
    save_config,
    save_variables,
)
from sam_jax.model_config import model_config_of
from sam_jax.models.lora import merged_variables
from sam_jax.models.masked_autoencoder import MaskedAutoencoder
from sam_jax.models.sam import Sam, SamConfig, variable_shapes
from sam_jax.models.tiny_vit import TinyViTConfig
from sam_jax.ops.images import RGB, ImageChannels
from sam_jax.ops.resize import resize_positions
from sam_jax.weights.adapters import Adapters, merged_with, read_adapters
from sam_jax.weights.channels import PREPROCESSOR, metadata_of, preprocessor_of, stated_channels
from sam_jax.weights.files import (
    SAFETENSORS,
    SAFETENSORS_SUFFIX,
    TORCH_SUFFIXES,
    WeightsError,
    failing_as_os_error,
    put_safetensors,
    read_tensors,
    write_safetensors,
    write_torch,
    written_whole,
)
from sam_jax.weights.geometry import (
    Hints,
    UnknownChannelsError,
    closest_variant,
    detect_scheme,
    differences,
    hints_of,
    hugging_face_hints,
    infer_config,
    is_tiny_vit,
    to_hugging_face,
    variant_name,
)
from sam_jax.weights.inflation import with_channels
from sam_jax.weights.mae import (
    autoencoder_variables,
    mae_config,
    mae_tensors,
    start_from_mae,
)
from sam_jax.weights.mobile_sam import is_left_out, unused_classifier
from sam_jax.weights.names import NamesError, from_native, to_native
from sam_jax.weights.runs import run_autoencoder, run_config, run_lora

Target = Literal["orbax", "official", "hugging-face", "mae"]
Form = Literal["orbax", "official", "hugging_face", "mae"]

# Forms that are files, all others are folders; their endings, of which the last needs no PyTorch.
FILE_TARGETS: tuple[Target, ...] = ("official", "mae")
OFFICIAL_SUFFIXES = (".pth", ".pt", SAFETENSORS_SUFFIX)
_POSITIONS = re.compile(r"/(pos_embed|rel_pos_[hw])$")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Loaded(NamedTuple):
    """A model and its variables ``{"params": ..., "constants": ...}``, float32."""

    model: Sam
    variables: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights as they were found, before they become a model's.

    Attributes:
      path: where they are.
      form: whose names the tensors have; "orbax" for our own.
      config: the shape of the model.
      tensors: arrays by name; by native path if they are our own.
      left_out: names of further tensors there, on which no mask depends.
      mae_grid: rows and columns of a masked autoencoder's positions, where they are known.
    """

    path: Path
    form: Form
    config: SamConfig
    tensors: Mapping[str, Any]
    left_out: tuple[str, ...] = ()
    mae_grid: tuple[int, int] | None = None


def load(
    path_or_name: str | Path,
    *,
    step: int | None = None,
    ema: bool = True,
    decoder_heads: int | None = None,
    key: Array | None = None,
) -> Loaded:
    """The model and the variables of any checkpoint.

    Args:
      path_or_name: a training run's folder; a ``.pth`` or ``.safetensors`` file with the published
        or Hugging Face's names; a Hugging Face folder; a masked autoencoder; or, where nothing is
        called that, a name on the Hugging Face Hub such as ``facebook/sam-vit-base``.
      step: which checkpoint of a training run; None for the newest.
      ema: whether a training run's averaged parameters are taken, where it keeps them.
      decoder_heads: see ``open_weights``.
      key: for what a masked autoencoder lacks, which is all but the encoder.

    Raises:
      WeightsError: if it cannot be read, or is of no model known here.
      NamesError: if tensors are missing, unexpected or misshapen; it lists all of them.
      CheckpointError: if a training run holds no such checkpoint.
    """
    weights = open_weights(path_or_name, step=step, ema=ema, decoder_heads=decoder_heads)
    return Loaded(Sam(weights.config), jax.tree.map(jax.numpy.asarray, _variables(weights, key)))


def variables_for(
    model: Sam,
    path_or_name: str | Path,
    *,
    step: int | None = None,
    ema: bool = True,
    key: Array | None = None,
) -> dict[str, Any]:
    """The variables of any checkpoint for a model that is given, on the host.

    The model may be for images of another size: positions are interpolated then. Where training
    starts, it may be for images of other channels, too: the patch embedding is inflated then
    (``inflation.inflated``).

    Args:
      model: the model.
      path_or_name: see ``load``.
      step: see ``load``.
      ema: see ``load``.
      key: see ``load``; given where training starts.

    Raises:
      NamesError: if the checkpoint is of a model of another shape; it lists all differences.
      WeightsError, CheckpointError: see ``load``.
    """
    weights = _open(
        path_or_name,
        step,
        ema,
        # What a bare file does not tell is taken to be the model's.
        hints_of(model.config),
        # Of an encoder of any width, which need not be a variant's.
        mae_of=model.config if key is not None else None,
    )
    if weights.form == "mae" and key is not None:
        return start_from_mae(model, weights.tensors, key, grid=weights.mae_grid)
    variables = native_variables(weights)
    num_before, channels = weights.config.channels.count, model.config.channels
    compared = weights.config
    if key is not None:
        compared = dataclasses.replace(compared, channels=channels)
        variables = with_channels(variables, num_before, channels.count, weights.path)
    if found := differences(compared, model.config):
        lines = "\n  ".join(found)
        hint = ""
        if num_before != channels.count:
            hint = "\nOnly training starts from weights of other channels (train.init_from)"
        raise NamesError(
            f"{weights.path} is not of the model that the config describes; {len(found)} "
            f"differences:\n  {lines}{hint}"
        )
    return _with_positions_of(variable_shapes(model.config), variables)


def autoencoder_variables_for(
    model: MaskedAutoencoder,
    path_or_name: str | Path,
    *,
    step: int | None = None,
    ema: bool = True,
    inflates: bool = False,
) -> dict[str, Any]:
    """The variables of a masked autoencoder, decoder and all, for a model that is given.

    Args:
      model: the model, whose images may be of another size.
      path_or_name: a run of pre-training, or a file with the published names.
      step: see ``load``.
      ema: see ``load``.
      inflates: whether it may be of images of other channels, where training starts; see
        ``inflation``.

    Raises:
      NamesError: if the checkpoint lacks the decoder, or is of a model of another shape.
      WeightsError, CheckpointError: see ``load``.
    """
    # Which variant it is of does not matter: names and shapes are compared with the model's.
    weights = _open(
        path_or_name, step, ema, Hints(), mae_of=SamConfig(model.encoder, channels=model.channels)
    )
    if weights.form != "mae":
        raise WeightsError(
            f"{weights.path} is no masked autoencoder, which pre-training goes on from: give a run "
            "of pre-training, or a published file that has the decoder as well"
        )
    try:
        return autoencoder_variables(model, weights.tensors, weights.path, inflates=inflates)
    except NamesError as error:
        raise NamesError(f"{weights.path}: {error}") from None


def _with_positions_of(template: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables, tables of positions at the sizes of a template."""
    expected = flatten_dict(template, sep="/")

    def fitted(path: str, array: Any) -> Any:
        shape = expected[path].shape if path in expected else array.shape
        same_kind = array.ndim == len(shape) and array.shape[-1] == shape[-1]
        if array.shape == shape or not same_kind or not _POSITIONS.search(path):
            return array
        if array.ndim == 3:
            return np.asarray(resize_positions(jax.numpy.asarray(array), shape[:2]))
        return np.asarray(jax.image.resize(array, shape, "linear", antialias=False))

    flat = flatten_dict(variables, sep="/")
    return unflatten_dict({path: fitted(path, leaf) for path, leaf in flat.items()}, sep="/")


def convert(
    source: str | Path,
    target: str | Path,
    to: Target,
    *,
    step: int | None = None,
    ema: bool = True,
    decoder_heads: int | None = None,
    seed: int | None = None,
    adapters: str | Path | None = None,
    on_progress: Callable[[str], None] = lambda message: None,
) -> str:
    """Writes a checkpoint in another form, in float32, and says what it was.

    Args:
      source: see ``load``.
      target: see ``save``.
      to: see ``save``.
      step: which checkpoint of a training run; None for the newest.
      ema: see ``load``.
      decoder_heads: see ``open_weights``.
      seed: for what a masked autoencoder lacks, which is all but the encoder.
      adapters: a file of ``weights.adapters``, to put on top of the source.
      on_progress: told what is being done.

    Raises:
      WeightsError, NamesError, CheckpointError: see ``load`` and ``save``.
    """
    check_target(Path(target), to)
    on_progress(f"reading {source}")
    if to == "mae":
        return _convert_autoencoder(source, Path(target), step, ema, on_progress)
    weights = open_weights(source, step=step, ema=ema, decoder_heads=decoder_heads)
    variables = _variables(weights, None if seed is None else jax.random.key(seed))
    config, form, left_out = weights.config, weights.form, weights.left_out
    if adapters is not None:
        trained = read_adapters(adapters)
        config = _as_trained(config, trained, weights.path)
        variables = _with_positions_of(variable_shapes(config), variables)
        variables = merged_with(variables, trained)
    if to == "orbax":
        # Copies, so that the mapped file is let go of before writing takes memory of its own.
        variables = jax.tree.map(jax.numpy.array, variables)
        del weights
    on_progress(f"writing {target}")
    save(target, config, variables, to)
    height, width = config.image_encoder.image_size
    channels = "" if config.channels == RGB else f"; channels: {config.channels}"
    without = f"; left out: {len(left_out)} tensors that segment nothing" if left_out else ""
    return f"{variant_name(config)} for {height} x {width} pixels, from {form}{channels}{without}"


def _as_trained(config: SamConfig, adapters: Adapters, base: Path) -> SamConfig:
    """The model that a base becomes with adapters, for the images that those were trained on."""
    channels = adapters.channels or config.channels
    if channels.count != config.channels.count:
        raise WeightsError(
            f"{adapters.path} was trained on images of {channels.count} channels, and {base} takes "
            f"{config.channels.count}: convert the whole run"
        )
    size = adapters.image_size or config.image_encoder.image_size
    encoder = dataclasses.replace(config.image_encoder, image_size=size)
    return dataclasses.replace(config, channels=channels, image_encoder=encoder)


def _convert_autoencoder(
    source: str | Path,
    target: Path,
    step: int | None,
    ema: bool,
    on_progress: Callable[[str], None],
) -> str:
    """Writes a run of pre-training under the published names of MAE; see ``convert``."""
    weights = _open(source, step, ema, Hints())
    if weights.form != "mae" or weights.mae_grid is None:
        raise WeightsError(
            f"{weights.path} is no run of pre-training, which alone is written as a masked "
            "autoencoder"
        )
    rows, columns = weights.mae_grid
    if rows != columns:
        raise WeightsError(
            f"{weights.path} was trained on {rows} x {columns} patches; the published code of MAE "
            "has square grids only"
        )
    on_progress(f"writing {target}")
    _write_tensors(target, weights.tensors, weights.config.channels)
    height, width = weights.config.image_encoder.image_size
    return f"a masked autoencoder for {height} x {width} pixels, {len(weights.tensors)} tensors"


def native_variables(weights: Weights) -> dict[str, Any]:
    """Variables by native paths, float32, on the host; views of the file where possible.

    Raises:
      NamesError: if tensors are missing, unexpected or misshapen.
      WeightsError: if they are only an encoder's.
    """
    template = variable_shapes(weights.config)
    if weights.form == "orbax":
        return _checked(weights.tensors, template, weights.path)
    if weights.form == "mae":
        raise WeightsError(
            f"{weights.path} is a masked autoencoder, of which only the encoder serves; training "
            "can start from it (train.init_from; sam-jax convert with --seed; load with a key); "
            "sam-jax convert --to mae writes a run of pre-training under MAE's published names"
        )
    try:
        variables = to_native(weights.tensors, template, weights.form)
    except NamesError as error:
        raise NamesError(f"{weights.path} ({variant_name(weights.config)}): {error}") from None
    for name, array in weights.tensors.items():
        if array.dtype.kind != "f":
            raise WeightsError(f"{weights.path}: {name} is {array.dtype}, expected floating point")
    return jax.tree.map(lambda array: np.asarray(array, np.float32), variables)


def _variables(weights: Weights, key: Array | None) -> dict[str, Any]:
    if weights.form == "mae" and key is not None:
        model = Sam(weights.config)
        return start_from_mae(model, weights.tensors, key, grid=weights.mae_grid)
    return native_variables(weights)


def open_weights(
    path_or_name: str | Path,
    *,
    step: int | None = None,
    ema: bool = True,
    decoder_heads: int | None = None,
) -> Weights:
    """Finds out what a checkpoint is, and maps its tensors.

    Args:
      path_or_name: see ``load``.
      step: which checkpoint of a training run; None for the newest.
      ema: see ``load``.
      decoder_heads: heads of the decoder's attention, which a file of tensors does not tell; None
        for what a config in its folder says, or the published number at the published width.

    Raises:
      WeightsError: if it cannot be read, or is of no model known here.
      CheckpointError: if a training run holds no such checkpoint.
    """
    return _open(path_or_name, step, ema, Hints(decoder_heads=decoder_heads))


def _open(
    path_or_name: str | Path,
    step: int | None,
    ema: bool,
    hints: Hints,
    *,
    mae_of: SamConfig | None = None,
) -> Weights:
    """The weights; of a file of a masked autoencoder's the shape is ``mae_of``, where it is known.

    See ``open_weights``.
    """
    path = Path(path_or_name)
    if not path.exists():
        path = _download(str(path_or_name))
    if (path / CHECKPOINTS).is_dir() or path.name == CHECKPOINTS:
        run = path if (path / CHECKPOINTS).is_dir() else path.parent
        return _open_run(run, step, ema)
    if step is not None:
        raise WeightsError(f"{path} is no training run, so it has no steps to choose from")
    found = read_tensors(path)
    scheme, tensors = detect_scheme(found, path)
    stated = stated_channels(path, is_hugging_face=scheme == "hugging_face")
    if scheme == "mae":
        hints = dataclasses.replace(hints, channels=stated)
        return Weights(path, scheme, mae_of or mae_config(tensors, path, hints), tensors)
    if scheme == "hugging_face":
        # One tensor under two names, of which files have one or both.
        twin = tensors.pop("prompt_encoder.shared_embedding.positional_embedding", None)
        if twin is not None:
            tensors.setdefault("shared_image_embedding.positional_embedding", twin)
        hints = _hints_beside(path, hints)
    hints = dataclasses.replace(hints, channels=stated)
    left_out: tuple[str, ...] = ()
    if scheme == "official" and is_tiny_vit(tensors):
        left_out = tuple(filter(is_left_out, tensors))
        tensors = {name: array for name, array in tensors.items() if name not in left_out}
    try:
        config = infer_config(tensors, scheme, path, hints)
    except UnknownChannelsError:
        raise
    except WeightsError as error:
        # An incomplete file: all that it lacks, beside the first thing that was noticed.
        closest = closest_variant(tensors, scheme)
        if closest is None:
            raise
        try:
            to_native(tensors, variable_shapes(closest), scheme)
        except NamesError as problems:
            raise NamesError(
                f"{error}. Compared with {variant_name(closest)}, {problems}"
            ) from None
        raise
    return Weights(path, scheme, config, tensors, left_out)


def _open_run(run: Path, step: int | None, ema: bool) -> Weights:
    """The weights of a training run; a masked autoencoder's by their published names."""
    variables = restore_variables(run, step, ema=ema)
    autoencoder = run_autoencoder(run)
    if autoencoder is None:
        merged = merged_variables(variables, run_lora(run))
        return Weights(run, "orbax", run_config(run), merged)
    try:
        tensors = mae_tensors(autoencoder, variables)
    except NamesError as error:
        raise NamesError(f"{run}: {error}") from None
    return Weights(run, "mae", run_config(run), tensors, mae_grid=autoencoder.encoder.grid)


def save(path: str | Path, config: SamConfig, variables: Mapping[str, Any], target: Target) -> None:
    """Writes a checkpoint for another program, or for this one; whole or not at all.

    Args:
      path: file (official) or folder to write; a folder must be new or empty.
      config: the shape of the model.
      variables: ``{"params": ..., "constants": ...}``, adapters merged.
      target: "official" (a file, safetensors or PyTorch's, that the published code of Segment
        Anything or of MobileSAM loads strictly), "hugging-face" (a folder for
        ``transformers.SamModel.from_pretrained``), or "orbax" (a folder as ``train.py`` leaves it).

    Raises:
      WeightsError: if the target cannot express the model, or writing fails.
      NamesError: if there are variables that have no name there.
    """
    path = Path(path)
    check_target(path, target)
    if target == "official":
        tensors = from_native(variables, "official", channels=config.channels.count)
        if isinstance(config.image_encoder, TinyViTConfig):
            tensors |= unused_classifier(config.image_encoder)
        _write_tensors(path, tensors, config.channels)
    elif target == "hugging-face":
        settings = to_hugging_face(config)
        with written_whole(path) as folder:
            folder.mkdir()
            _write_json(folder / "config.json", settings)
            _write_json(folder / PREPROCESSOR, preprocessor_of(config))
            tensors = from_native(variables, "hugging_face", channels=config.channels.count)
            put_safetensors(folder / SAFETENSORS, tensors, _about(config.channels))
    else:
        with written_whole(path) as folder:
            save_config(folder, {"model": dataclasses.asdict(model_config_of(config))})
            # Full disks reach Orbax's caller as errors of its storage layer.
            with failing_as_os_error(ValueError, RuntimeError):
                save_variables(folder, variables)


def check_target(path: Path, target: Target | None = None) -> None:
    """Finds what is wrong with a place before the work begins, not after it.

    Args:
      path: what shall be written.
      target: in which form, see ``save``; None for a new folder of another.

    Raises:
      WeightsError: if something is there that must stay.
      PlaceError: if it cannot be written.
      CheckpointError: if a checkpoint there could not be read.
    """
    if target in FILE_TARGETS:
        if path.is_dir():
            raise WeightsError(f"{path} is a folder; name the file to write")
        places.check_file(path)
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise WeightsError(f"{path} is there already; give a new or an empty folder")
    places.check_folder(path)
    if target == "orbax":
        # It is written beside where it will be, and read under the name that was given.
        checkpoint_path(path)
        checkpoint_path(path.resolve())


@dataclasses.dataclass(frozen=True)
class Description:
    """The description of a checkpoint.

    Attributes:
      path: where it is.
      form: whose names the tensors have.
      variant: the published or small variant, or "custom".
      config: the shape of the model.
      tensors: shape and type of each tensor.
      num_parameters: elements of all tensors that are trained.
      num_bytes: size of all tensors.
      left_out: names of further tensors there, on which no mask depends.
      problems: what is missing, unexpected or misshapen; empty if it loads.
    """

    path: Path
    form: Form
    variant: str
    config: SamConfig
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    num_parameters: int
    num_bytes: int
    left_out: tuple[str, ...]
    problems: str

    @property
    def dtypes(self) -> Mapping[str, int]:
        """The number of tensors of each type."""
        return Counter(dtype for _, dtype in self.tensors.values())


def describe(
    path_or_name: str | Path,
    *,
    step: int | None = None,
    ema: bool = True,
    decoder_heads: int | None = None,
) -> Description:
    """Says what a checkpoint is, and whether it would load.

    Raises:
      WeightsError: if it cannot be read, or is of no model known here.
      CheckpointError: if a training run holds no such checkpoint.
    """
    weights = open_weights(path_or_name, step=step, ema=ema, decoder_heads=decoder_heads)
    arrays = flatten_dict(weights.tensors, sep="/") if weights.form == "orbax" else weights.tensors
    problems = ""
    try:
        if weights.form == "mae":
            key = jax.random.key(0)
            jax.eval_shape(lambda: _variables(weights, key))
        else:
            native_variables(weights)
    except NamesError as error:
        problems = str(error)
    return Description(
        path=weights.path,
        form=weights.form,
        variant=variant_name(weights.config),
        config=weights.config,
        tensors={name: (array.shape, str(array.dtype)) for name, array in arrays.items()},
        num_parameters=sum(array.size for name, array in arrays.items() if not _is_constant(name)),
        num_bytes=sum(array.nbytes for array in arrays.values()),
        left_out=weights.left_out,
        problems=problems,
    )


def _is_constant(name: str) -> bool:
    # Running statistics of normalisations are no parameters.
    return name.startswith("constants/") or "positional_e" in name or ".running_" in name


def _checked(variables: Mapping[str, Any], template: Mapping[str, Any], where: Any) -> dict:
    """The variables, if they are those of the model."""
    found, expected = (flatten_dict(tree, sep="/") for tree in (variables, template))
    problems = [f"missing: {path}" for path in expected if path not in found]
    problems += [f"unexpected: {path}" for path in found if path not in expected]
    problems += [
        f"misshapen: {path} is {leaf.shape}, expected {expected[path].shape}"
        for path, leaf in found.items()
        if path in expected and leaf.shape != expected[path].shape
    ]
    if problems:
        lines = "\n  ".join(sorted(problems))
        raise NamesError(
            f"{where} does not hold the model that the config describes; {len(problems)} "
            f"problems:\n  {lines}"
        )
    return dict(variables)


def shape_of(path_or_name: str | Path, *, decoder_heads: int | None = None) -> SamConfig:
    """The shape of the model that any checkpoint is of; reads no more of it than that takes.

    Raises:
      WeightsError: see ``open_weights``.
    """
    path = Path(path_or_name)
    if (path / CHECKPOINTS).is_dir():
        return run_config(path)
    return open_weights(path_or_name, decoder_heads=decoder_heads).config


def _write_tensors(path: Path, tensors: Mapping[str, np.ndarray], channels: ImageChannels) -> None:
    """Writes a file of tensors; a PyTorch file, which is tensors alone, without the channels."""
    if path.suffix == SAFETENSORS_SUFFIX:
        write_safetensors(path, dict(tensors), _about(channels))
    else:
        write_torch(path, dict(tensors))


def _hints_beside(path: Path, hints: Hints) -> Hints:
    """Hints from the ``config.json`` beside Hugging Face's weights; for the rest those given."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        beside = hugging_face_hints(json.loads(config.read_text()))
    except FileNotFoundError:
        return hints
    except (ValueError, AttributeError, TypeError) as error:
        raise WeightsError(f"{config}: expected Hugging Face's config: {error}") from None
    stated = {name: value for name, value in vars(beside).items() if value is not None}
    return dataclasses.replace(hints, **stated)


def _about(channels: ImageChannels) -> dict[str, str]:
    """Metadata that say what images a model takes; none where it takes what published ones do."""
    return {} if channels == RGB else metadata_of(channels)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _download(name: str) -> Path:
    """A folder with the files of a model on the Hugging Face Hub."""
    if is_url(name):
        raise WeightsError(f"{name}: weights are read from disks only; copy them to one")
    is_path = name.startswith(".") or Path(name).suffix in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX)
    if is_path or not _HUB_NAME.fullmatch(name) or Path(name).parent.exists():
        raise WeightsError(f"{name} does not exist")
    try:
        import huggingface_hub
    except ImportError:
        raise WeightsError(
            f"{name} does not exist here; to fetch it from the Hugging Face Hub, "
            "pip install huggingface_hub, or download its config.json and model.safetensors into a "
            "folder and name that"
        ) from None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "pytorch_model.bin"]
            )
        )
    # Whatever goes wrong between here and there, the user needs to know what was tried.
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise WeightsError(
            f"{name} does not exist here, and could not be fetched from the Hugging Face Hub: "
            f"{reason}"
        ) from error
