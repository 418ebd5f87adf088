"""Files of named tensors, PyTorch's and safetensors': read without running them, written whole."""

import argparse
import contextlib
import json
import pickle
import re
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from sam_jax.errors import UserError
from sam_jax.weights.strangers import (
    is_safetensors,
    pickled_objects,
    what_file_is,
    what_folder_is,
)

SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_IN_FOLDER = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

# Where training codes put the tensors in a file that holds more than those.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "sam", "teacher", "net", "params")


class _Beside:
    """A stand-in for a value of numpy's in a PyTorch file, which is no weight; it keeps nothing.

    Numbers such as the best score are pickled as calls of numpy's. In their place this is called,
    so that reading the file still runs nothing that the file names.
    """

    def __init__(self, *arguments: Any) -> None:
        del arguments

    def __setstate__(self, state: Any) -> None:
        del state


# Under the names of numpy 1 and 2.
_BESIDE = (
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    "numpy.dtype",
    "numpy.ndarray",
    "_codecs.encode",
)


class WeightsError(UserError, ValueError):
    """A file of weights that cannot be read, used or written; the message says why."""


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors by name from a file, or from a folder as Hugging Face's libraries write it.

    Nothing in the file is executed. Arrays are views of the mapped file where the format allows
    it, so reading costs no memory until they are used; bfloat16, which numpy lacks, comes as
    float32.

    Args:
      path: ``.safetensors``; ``.pth``, ``.pt``, ``.bin`` or ``.ckpt``, for which PyTorch must be
        installed; or a folder with ``model.safetensors``, its shards and their index, or
        ``pytorch_model.bin``.

    Raises:
      WeightsError: if it is none of these, is damaged, or holds other things than tensors.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise WeightsError(f"{path} does not exist")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if what := what_file_is(path):
        raise WeightsError(f"{path} is {what}")
    if path.suffix == SAFETENSORS_SUFFIX or is_safetensors(path):
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    raise WeightsError(
        f"{path}: expected a file that ends in .safetensors, {', '.join(TORCH_SUFFIXES)}, or a "
        "folder with weights"
    )


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
    for index in (SAFETENSORS_INDEX, TORCH_INDEX):
        if (folder / index).exists():
            return _read_shards(folder / index)
    for name in (SAFETENSORS, TORCH_IN_FOLDER):
        if (folder / name).exists():
            return read_tensors(folder / name)
    raise WeightsError(
        f"{folder} holds no weights: expected {SAFETENSORS}, {SAFETENSORS_INDEX} or "
        f"{TORCH_IN_FOLDER} in it; {what_folder_is(folder)}"
    )


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index}: expected JSON with a map 'weight_map': {error}") from None
    tensors: dict[str, np.ndarray] = {}
    for number, shard in enumerate(shards, 1):
        # A name, not a path: an index must not lead out of its folder.
        file = index.parent / Path(shard).name
        if not file.exists():
            raise WeightsError(f"{file} is missing: shard {number} of {len(shards)} in {index}")
        tensors |= read_tensors(file)
    return tensors


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            bfloat16 = [
                name
                for name in file.keys()  # noqa: SIM118 (not a mapping)
                if file.get_slice(name).get_dtype() == "BF16"
            ]
            if not bfloat16:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # Only JAX's reader knows that type.
        with safe_open(path, framework="flax") as file:
            return {
                name: np.asarray(file.get_tensor(name), np.float32 if name in bfloat16 else None)
                for name in file.keys()  # noqa: SIM118
            }
    except AttributeError as error:
        raise WeightsError(f"{path} holds tensors of a type that numpy has not: {error}") from None
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is damaged, cut short or no safetensors file ({path.stat().st_size:,} bytes): "
            f"{error}"
        ) from None


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file, or of that in a folder; none of any other file."""
    if path.is_dir():
        path = path / SAFETENSORS
    if not path.is_file() or not is_safetensors(path):
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except SafetensorError:
        return {}  # whoever reads the tensors says so


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    torch = import_torch(f"reading {path.name}")
    # What training scripts save beside the tensors: a plain record, whose loading runs no code.
    harmless: list[Any] = [argparse.Namespace, *((_Beside, name) for name in _BESIDE)]
    with torch.serialization.safe_globals(harmless):
        try:
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except pickle.UnpicklingError as error:
            # Not the rest of PyTorch's message, which tells how to run the file all the same.
            objects = [name for name in pickled_objects(path) if name not in _BESIDE]
            named = ", ".join(objects[:3]) or re.sub(r"^.*rror: ", "", str(error).splitlines()[-1])
            raise WeightsError(
                f"{path} is refused: it is damaged, or holds objects besides tensors, whose "
                f"loading could run code ({named}); nothing in it was run. If you trust it, load "
                "it where it was made, and save the tensors alone: "
                "torch.save(model.state_dict(), path)."
            ) from None
        # Damaged bytes end in errors of every kind, IndexError and struct.error among them.
        except Exception as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            raise WeightsError(
                f"{path} is damaged, cut short or no PyTorch file "
                f"({path.stat().st_size:,} bytes): {reason}"
            ) from None
    arrays = {}
    for name, tensor in _tensors_in(content, torch.Tensor, path).items():
        try:
            # numpy has no bfloat16
            is_bfloat16 = tensor.dtype == torch.bfloat16
            arrays[name] = (tensor.float() if is_bfloat16 else tensor).detach().numpy()
        except (TypeError, RuntimeError) as error:
            raise WeightsError(
                f"{path}: {name} is {tensor.layout} {tensor.dtype}, which numpy has not: {error}"
            ) from None
    return arrays


def _tensors_in(content: Any, tensor_type: type, path: Path) -> dict[str, Any]:
    """The mapping from names to tensors in what a file holds, however it is wrapped."""
    if tensors := _wrapped_tensors(content, tensor_type):
        return tensors
    found = (
        f"a mapping with {', '.join(map(repr, list(content)[:8])) or 'nothing'}"
        if isinstance(content, Mapping)
        else f"a {type(content).__name__}"
    )
    raise WeightsError(
        f"{path} holds {found}: expected tensors by name, or those under one of "
        f"{', '.join(map(repr, _WRAPPERS))}"
    )


def _wrapped_tensors(content: Any, tensor_type: type) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        return {}
    # First, since beside a wrapper there may be tensors that are no weights, such as a loss. Under
    # one of these names there may be settings as well.
    for key in _WRAPPERS:
        if tensors := _wrapped_tensors(content.get(key), tensor_type):
            return tensors
    return {str(name): value for name, value in content.items() if isinstance(value, tensor_type)}


def import_torch(purpose: str) -> Any:
    """PyTorch, or a word on how to get it.

    Raises:
      WeightsError: if it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f"{purpose} needs PyTorch: pip install 'sam-jax[torch]' (safetensors need no PyTorch)"
        ) from None
    return torch


def write_torch(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a ``state_dict``, whole or not at all; see ``written_whole``."""
    torch = import_torch(f"writing {path.name}")
    with written_whole(path) as unfinished, failing_as_os_error(RuntimeError):
        torch.save(
            {name: torch.from_numpy(_owned(array)) for name, array in tensors.items()}, unfinished
        )


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, whole or not at all; see ``put_safetensors``."""
    with written_whole(path) as unfinished:
        put_safetensors(unfinished, tensors, about)


def put_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file within a folder that is itself written whole.

    Args:
      path: the file.
      tensors: by name.
      about: further metadata, see ``read_metadata``.

    Raises:
      OSError: if it cannot be written.
    """
    with failing_as_os_error(SafetensorError):
        safetensors.numpy.save_file(
            {name: np.asarray(array, order="C") for name, array in tensors.items()},
            path,
            # Without this entry the ``transformers`` library refuses the file.
            metadata={"format": "pt", **(about or {})},
        )


def _owned(array: np.ndarray) -> np.ndarray:
    """An array that torch accepts without a warning: writable, in order, no negative strides."""
    return np.require(array, requirements=("C", "W"))


@contextlib.contextmanager
def failing_as_os_error(*kinds: type[Exception]) -> Iterator[None]:
    """Libraries say by errors of their own that a file could not be written."""
    try:
        yield
    except kinds as error:
        raise OSError((str(error) or repr(error)).splitlines()[0]) from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write a file or folder at, which takes its name only when all of it is there.

    What stood at ``path`` before stays until then, and for good if writing fails.

    Raises:
      WeightsError: if the disk is full, or the place cannot be written to.
    """
    # Of a link, what it points to.
    path = path.resolve()
    # Without the name that it will have, which may be as long as names can be.
    unfinished = path.with_name(f".{uuid.uuid4().hex[:8]}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        if path.is_dir():
            path.rmdir()  # fails if there is anything in it, which is never ours to delete
        unfinished.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise WeightsError(f"could not write {path}: {reason}; nothing of it is left") from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
