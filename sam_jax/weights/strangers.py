"""Files and tensors that people take for a checkpoint, told by what they are.

Nothing is unpickled here: pickles are walked, never run.
"""

import io
import json
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

_ZIP = b"PK\x03\x04"
# First bytes, and what begins with them.
_BEGINNINGS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, no weights: fetch them with git lfs pull",
    ),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"\xfd7zXZ\x00", "an xz archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\x89HDF", "an HDF5 file, as Keras writes them, of which none of this model is known"),
    (b"\x93NUMPY", "a single array of numpy's (.npy)"),
    (b"GGUF", "a GGUF file, of quantised weights"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"GIF8", "a picture"),
    (b"%PDF", "a PDF document"),
)
_PAGE = re.compile(rb"(?is)\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body)")
# A protocol buffer: a version, then who made it.
_ONNX = re.compile(rb"(?s)\x08.(\x12.)(pytorch|onnx|keras|tf2onnx|skl2onnx|sam_jax)")
_TRUSTED = "give the weights themselves, a .pth or .safetensors file"


def what_file_is(path: Path) -> str | None:
    """The nature of a file that holds no weights, and what to do; None if it may hold some."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        return "damaged, or never arrived: it is empty (0 bytes)"
    for beginning, what in _BEGINNINGS:
        if head.startswith(beginning):
            return what
    if _PAGE.match(head):
        return f"an HTML page, not the file that its address promised: {_TRUSTED}"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if head[4:8] == b"TFL3":
        return f"a TensorFlow Lite model, made for running: {_TRUSTED}"
    if path.suffix == ".onnx" or _ONNX.match(head):
        return f"an ONNX graph, made for running: {_TRUSTED} that it was exported from"
    if head.startswith(_ZIP):
        return _what_archive_is(path, size)
    return _what_text_is(path, head, size)


def _what_archive_is(path: Path, size: int) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    # Damaged ones end in errors of every kind.
    except Exception as error:
        is_cut = isinstance(error, zipfile.BadZipFile) and "not a zip file" in str(error)
        reason = "the end of its zip archive is missing" if is_cut else f"its zip archive: {error}"
        return f"damaged or cut short: {reason} ({size:,} bytes)"
    parts = [name.split("/") for name in names]
    if any(part[-1] == "constants.pkl" or "code" in part[:-1] for part in parts):
        return (
            "a TorchScript archive, which is a program: load it with torch.jit.load where it was "
            "made, and save torch.save(model.state_dict(), path)"
        )
    if any(part[-1] == "data.pkl" for part in parts):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return (
            "an archive of numpy arrays (.npz): if they have the published names, "
            "safetensors.numpy.save_file(dict(numpy.load(path)), 'x.safetensors') makes it a file "
            "that is read"
        )
    shown = ", ".join(names[:4]) or "nothing"
    return f"a zip archive of {shown}: unpack it, and name the file of weights in it"


def _what_text_is(path: Path, head: bytes, size: int) -> str | None:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        # A letter that the end of what was read cuts in two.
        if error.start < len(head) - 4 or size <= len(head):
            return None
        text = head[: error.start].decode()
    if not all(letter.isprintable() or letter.isspace() for letter in text):
        return None
    shown = repr(text.strip()[:80])
    if text.lstrip().startswith("<"):
        return f"an XML document that begins with {shown}: {_TRUSTED}"
    if text.lstrip()[:1] in "{[":
        if '"weight_map"' in text:
            return "the index of weights in several files: name its folder"
        try:
            is_json = size > len(head) or json.loads(text) is not None
        except ValueError:
            is_json = False
        if is_json:
            return f"a JSON document, not weights; it begins with {shown}: {_TRUSTED}"
    return f"a text file that begins with {shown}: {_TRUSTED}"


def is_safetensors(path: Path) -> bool:
    """True if a file begins as safetensors do, whatever it is called."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < size


def what_folder_is(folder: Path) -> str:
    """The content of a folder without weights, and what to name instead."""
    names = sorted(entry.name for entry in folder.iterdir())
    if {"_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA", "_sharding"} & set(names):
        return (
            "it is an Orbax checkpoint; name the run's folder, which holds config.json and "
            "checkpoints, and the step with --step"
        )
    if "saved_model.pb" in names:
        return "it is a TensorFlow model, of which none of this model is known"
    endings = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
    files = [name for name in names if name.endswith(endings)]
    if files:
        return f"it holds {', '.join(files[:4])}: name the file"
    return f"it holds {', '.join(names[:6]) or 'nothing'}"


# What PyTorch's files are made of.
_HARMLESS = re.compile(
    r"torch\.(_utils\._rebuild\w+|_tensor\._rebuild\w+|\w*Storage|Size|device|dtype|\w+\d+)|"
    r"torch\.storage\.\w+|collections\.(OrderedDict|defaultdict)|argparse\.Namespace"
)


def pickled_objects(path: Path) -> list[str]:
    """Classes and functions that loading a PyTorch file would call, besides those of tensors."""
    found: dict[str, None] = {}
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith("data.pkl")]
                for name in names:
                    found |= dict.fromkeys(_globals(io.BytesIO(archive.read(name)), 1))
        else:
            with path.open("rb") as file:
                # Before what was saved: a magic number, a version, and facts of the system.
                found |= dict.fromkeys(_globals(file, 4))
    # What was found up to the damage will do.
    except Exception:
        pass
    return [name for name in found if not _HARMLESS.fullmatch(name)]


def _globals(file: BinaryIO | io.BytesIO, num_pickles: int) -> Iterator[str]:
    """Names in a stream of pickles, ``module.qualname``."""
    for _ in range(num_pickles):
        strings: list[str] = []
        memo: dict[int, str] = {}
        try:
            for operation, argument, _ in pickletools.genops(file):
                if operation.name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", ".")
                elif operation.name == "STACK_GLOBAL" and len(strings) > 1:
                    yield f"{strings[-2]}.{strings[-1]}"
                elif operation.name == "MEMOIZE":
                    memo[len(memo)] = strings[-1] if strings else ""
                elif operation.name in ("BINGET", "LONG_BINGET", "GET"):
                    strings.append(memo.get(int(str(argument)), ""))
                elif isinstance(argument, str):
                    strings.append(argument)
        except (ValueError, pickle.UnpicklingError, EOFError):
            return


# What tells other models' tensors, a pattern of names each; all of these have names of this model's
# besides, and most would be found to lack some of them or to have others.
_OTHERS = (
    (
        r"(^|\.)(lora_[AB]|lora_embedding_[AB]|base_layer)\.",
        (
            "LoRA adapters of PEFT's, not merged: merge them where they were trained, "
            "torch.save(model.merge_and_unload().state_dict(), path)"
        ),
    ),
    (
        r"qkv\.(qkv|linear_[ab]_[qkv])\.|(^|\.)w_[ab]_\d+$|(^|\.)lora_\w+",
        (
            "LoRA adapters, not merged: add the product of each pair to the rows of "
            "the weight that it adapts, and save that under the published name"
        ),
    ),
    (
        r"(?i)(^|\.)(\w*_)?adapter(_\w+)?\.|(^|\.)prompt_generator\.",
        (
            "a model with adapters between its layers (as Medical SAM Adapter has), which this "
            "model has not: they cannot be merged; take the weights that it was trained from"
        ),
    ),
    (
        (
            r"(^|\.)(image_encoder\.trunk|memory_attention|memory_encoder|sam_mask_decoder|"
            r"vision_encoder\.backbone|maskmem_tpos_enc)(\.|$)"
        ),
        (
            "SAM 2, another model than Segment Anything's first, which is the one here: take "
            "sam_vit_b, sam_vit_l or sam_vit_h"
        ),
    ),
    (
        (
            r"(^|\.)mask_decoder\.(hf_token|hf_mlp|compress_vit_feat|embedding_encoder|"
            r"embedding_maskfeature)(\.|$)"
        ),
        (
            "HQ-SAM, whose decoder has a token and layers of its own: take the weights of Segment "
            "Anything that it was trained from"
        ),
    ),
    (
        r"(^|\.)mask_decoder\.final_output_upscaling_layers\.",
        "EfficientSAM, whose encoder and decoder are others: take sam_vit_b",
    ),
    (
        r"(^|\.)image_encoder\.(model|backbone|stages)\.",
        "a model of the Segment Anything family with another encoder than a ViT: take sam_vit_b",
    ),
    (r"(^|\.)model\.\d+\.(conv|cv\d)\.", "a YOLO network (as FastSAM is), no Segment Anything"),
)
_PARTS = (
    (
        (
            r"(.*\.)?(iou_token|mask_tokens|output_upscaling|output_hypernetworks_mlps|"
            r"iou_prediction_head|transformer)(\..*)?"
        ),
        "a mask decoder alone",
    ),
    (
        r"(.*\.)?(pe_layer|point_embeddings|not_a_point_embed|mask_downscaling|no_mask_embed)(\..*)?",
        "a prompt encoder alone",
    ),
    (r"(.*\.)?(patch_embed|pos_embed|blocks|layers|neck)(\..*)?", "an image encoder alone"),
)


# Other vision transformers have blocks, and other transformers layers, too.
_TELLING = r"(neck|rel_pos_h|iou_token|mask_tokens|pe_layer|point_embeddings|mask_downscaling)"


def which_model(names: Iterable[str]) -> str | None:
    """The other model whose tensors have these names, and what to do; None if not known."""
    names = list(names)
    for pattern, what in _OTHERS:
        if sum(1 for name in names if re.search(pattern, name)) > 1:
            return what
    return None


def which_part(names: Iterable[str]) -> str | None:
    """The part of the model that all these tensors are of, and what to do; None if none."""
    names = list(names)
    for pattern, what in _PARTS:
        all_fit = all(re.fullmatch(pattern, name) for name in names)
        if all_fit and any(re.search(_TELLING, name) for name in names):
            return (
                f"{what}: put its tensors, under the published names, into a copy of the whole "
                "checkpoint that it belongs to"
            )
    return None


# Layers that wrap others in training, by the name they give to what they wrap.
_WRAPPING = re.compile(
    r"(^|(?<=\.))(module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def without_wrapping(name: str) -> str:
    """A tensor's name without the layers that wrap others, wherever they stand in it."""
    return _WRAPPING.sub("", name)
