"""Files mistaken for checkpoints are told by what they are, and nothing in them is run."""

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_jax.weights.files import SAFETENSORS, WeightsError, read_tensors, write_safetensors
from sam_jax.weights.geometry import detect_scheme
from sam_jax.weights.load import load
from sam_jax.weights.names import from_native
from sam_jax.weights.strangers import pickled_objects, without_wrapping
from tests.golden.tiny import TINY, random_variables


def _zip(**files: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), data)
    return content.getvalue()


def _tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return content.getvalue()


def _npz() -> bytes:
    content = io.BytesIO()
    np.savez(content, a=np.zeros(3))
    return content.getvalue()


FILES = [
    (b"", r"damaged, or never arrived: it is empty \(0 bytes\)"),
    (b"<!DOCTYPE html>\n<html><head>", "an HTML page"),
    (b"\n  <HTML lang=de>", "an HTML page"),
    (b"<!-- 404 -->\n<html>", "an HTML page"),
    (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "an XML document.*AccessDenied"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "a Git LFS pointer"),
    (b'{"error": "Repository not found"}', "a JSON document.*Repository not found"),
    (b'[{"a": 1}]', "a JSON document"),
    (json.dumps({"a": ["\u00e4" * 5000]}, ensure_ascii=False).encode(), "a JSON document"),
    (b'{"weight_map": {"a": "b"}}', "the index of weights in several files: name its folder"),
    (b"Access denied\n", "a text file that begins with 'Access denied'"),
    (gzip.compress(b"weights"), "a gzip archive: unpack it"),
    (b"BZh91AY", "a bzip2 archive: unpack it"),
    (b"\xfd7zXZ\x00\x00", "an xz archive: unpack it"),
    (b"\x28\xb5\x2f\xfd\x00", "a Zstandard archive: unpack it"),
    (_tar(), "a tar archive: unpack it"),
    (_zip(readme_dot_md=b"x", sam_dot_pth=b"y"), r"a zip archive of readme\.md, sam\.pth: unpack"),
    (_zip(m__constants_dot_pkl=b"x", m__data_dot_pkl=b"y", m__code__a_dot_py=b""), "a TorchScript"),
    (_npz(), r"an archive of numpy arrays \(\.npz\)"),
    (_npz()[:-40], "damaged or cut short: the end of its zip archive is missing"),
    (b"\x93NUMPY\x01\x00", "a single array of numpy"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras"),
    (b"\x08\x07\x12\x07pytorch\x1a\x05", "an ONNX graph"),
    (b"\x1c\x00\x00\x00TFL3", "a TensorFlow Lite model"),
    (b"GGUF\x03", "a GGUF file"),
    (b"\x89PNG\r\n", "a picture"),
    (b"\xff\xd8\xff\xe0", "a picture"),
]


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".bin", ".zip", ""])
@pytest.mark.parametrize(("content", "words"), FILES, ids=[words[:24] for _, words in FILES])
def test_a_file_of_something_else_is_named(
    tmp_path: Path, content: bytes, words: str, suffix: str
) -> None:
    path = tmp_path / f"sam{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"(?s)/sam{suffix} is {words}"):
        read_tensors(path)


def test_an_onnx_graph_is_known_by_its_name_too(tmp_path: Path) -> None:
    (tmp_path / "sam.onnx").write_bytes(b"\x08\x08")
    with pytest.raises(WeightsError, match="an ONNX graph"):
        read_tensors(tmp_path / "sam.onnx")


@pytest.mark.parametrize("name", ["x.pth", "x.bin", "x"])
def test_safetensors_are_read_whatever_they_are_called(tmp_path: Path, name: str) -> None:
    write_safetensors(tmp_path / name, {"a": np.ones(3, np.float32)})
    assert read_tensors(tmp_path / name)["a"].tolist() == [1, 1, 1]


def test_an_index_stands_for_its_folder(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one.safetensors", {"a": np.ones(3, np.float32)})
    index = tmp_path / "other.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert read_tensors(index)["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["_METADATA", "manifest.ocdbt"], r"an Orbax checkpoint; name the run's folder"),
        (["saved_model.pb"], "a TensorFlow model"),
        (["sam.pth", "notes.txt"], r"it holds sam\.pth: name the file"),
        (["a.jpg", "b.jpg"], r"it holds a\.jpg, b\.jpg"),
        ([], "it holds nothing"),
    ],
)
def test_a_folder_says_what_it_holds(tmp_path: Path, files: list[str], words: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(WeightsError, match=f"holds no weights: .*{SAFETENSORS}.*{words}"):
        read_tensors(tmp_path)


class Malice:
    """An object that would leave a trace if it were unpickled."""

    def __init__(self, loot: Path) -> None:
        self.loot = loot

    def __reduce__(self) -> Any:
        return Path.touch, (self.loot,)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_objects_of_a_bare_pickle_are_named(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "x.pth").write_bytes(pickle.dumps([Malice(tmp_path / "loot")] * 2, protocol))
    found = pickled_objects(tmp_path / "x.pth")
    assert any(name.endswith("getattr") or "Path" in name for name in found), found
    assert not (tmp_path / "loot").exists()


class TestTorch:
    """PyTorch's files."""

    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch", reason="needs requirements-torch.lock")

    @pytest.mark.parametrize("legacy", [False, True])
    def test_numpy_beside_tensors_is_let_in(self, torch, tmp_path: Path, legacy: bool) -> None:
        content = {
            "model": {"a": torch.ones(3)},
            "best": np.float64(0.9),
            "epoch": np.int64(3),
            "is_best": np.bool_(True),
            "history": np.arange(4.0),
            "dtype": np.dtype("float32"),
            "name": np.str_("run"),
            "nested": [{"iou": np.float32(0.5)}],
        }
        path = tmp_path / "x.pth"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        assert {k: v.tolist() for k, v in read_tensors(path).items()} == {"a": [1, 1, 1]}
        # As numpy 1 wrote them: the same length, so that the archive stays whole.
        raw = path.read_bytes()
        if legacy:
            path.write_bytes(raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
            assert list(read_tensors(path)) == ["a"]

    @pytest.mark.parametrize("legacy", [False, True])
    def test_refused_objects_are_named(self, torch, tmp_path: Path, legacy: bool) -> None:
        path = tmp_path / "x.pth"
        content = {"model": {"a": torch.ones(3)}, "at": Malice(tmp_path / "loot"), "b": np.int8(1)}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(WeightsError, match=r"could run code \([^)]*(getattr|Path)") as error:
            read_tensors(path)
        assert "GLOBAL" not in str(error.value)
        assert "numpy" not in str(error.value)
        assert not (tmp_path / "loot").exists()

    def test_a_whole_pickled_model_is_named(self, torch, tmp_path: Path) -> None:
        torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
        with pytest.raises(WeightsError, match=r"\(torch\.nn\.modules\.linear\.Linear") as error:
            read_tensors(tmp_path / "x.pth")
        assert "model.state_dict()" in str(error.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("module.image_encoder.pos_embed", "image_encoder.pos_embed"),
        ("image_encoder.module.pos_embed", "image_encoder.pos_embed"),
        ("_orig_mod.module.mask_decoder.a", "mask_decoder.a"),
        ("image_encoder.blocks.0._orig_mod.norm1.weight", "image_encoder.blocks.0.norm1.weight"),
        ("a._checkpoint_wrapped_module._fsdp_wrapped_module.b", "a.b"),
        ("my_module.a", "my_module.a"),
        ("a.modules.b", "a.modules.b"),
        ("a.module", "a.module"),
    ],
)
def test_wrapping_layers_are_left_out(name: str, expected: str) -> None:
    assert without_wrapping(name) == expected


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    return from_native(random_variables(TINY))


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"model.module._orig_mod.{name}",
        lambda name: name.replace(".", ".module.", 1),
        lambda name: name.replace("blocks.0.", "blocks.0._orig_mod."),
        lambda name: name.replace("image_encoder.", "image_encoder.module.", 1),
    ],
)
def test_wrapped_weights_are_the_same_weights(
    tmp_path: Path, published: dict[str, np.ndarray], renamed: Any
) -> None:
    scheme, found = detect_scheme({renamed(name): array for name, array in published.items()}, "x")
    assert scheme == "official"
    assert found.keys() == published.keys()


def test_two_models_in_one_file_are_not_mixed(published: dict[str, np.ndarray]) -> None:
    both = published | {f"module.{name}": array for name, array in published.items()}
    with pytest.raises(WeightsError, match="several models in one file"):
        detect_scheme(both, "x")


def _add(*names: str) -> Any:
    return lambda tensors: tensors | dict.fromkeys(names, np.zeros(3, np.float32))


def _rename(old: str, new: str) -> Any:
    return lambda tensors: {name.replace(old, new): array for name, array in tensors.items()}


def _keep(start: str, *, cut: bool = False) -> Any:
    return lambda tensors: {
        name.removeprefix(start) if cut else name: array
        for name, array in tensors.items()
        if name.startswith(start)
    }


MODELS = [
    (_rename("attn.qkv.", "attn.qkv.qkv."), "LoRA adapters, not merged"),
    (
        _add(*(f"image_encoder.blocks.0.attn.qkv.linear_{x}.weight" for x in ("a_q", "b_q"))),
        "LoRA adapters, not merged",
    ),
    (_add("w_a_000", "w_b_000"), "LoRA adapters, not merged"),
    (_rename("attn.qkv.", "attn.qkv.base_layer."), r"LoRA adapters of PEFT.*merge_and_unload"),
    (
        lambda t: {
            f"base_model.model.image_encoder.blocks.0.attn.qkv.lora_{x}.weight": np.zeros(3)
            for x in "AB"
        },
        "LoRA adapters of PEFT",
    ),
    (
        _add(*(f"image_encoder.blocks.0.MLP_Adapter.D_fc{x}.weight" for x in (1, 2))),
        "adapters between its layers",
    ),
    (_rename("image_encoder.", "image_encoder.trunk."), "SAM 2, another model"),
    (_add("memory_attention.norm.weight", "memory_encoder.out_proj.bias"), "SAM 2"),
    (_rename("mask_decoder.", "sam_mask_decoder."), "SAM 2"),
    (_add("mask_decoder.hf_token.weight", "mask_decoder.hf_mlp.layers.0.bias"), "HQ-SAM"),
    (
        _add(*(f"mask_decoder.final_output_upscaling_layers.{x}.0.bias" for x in (0, 1))),
        "EfficientSAM",
    ),
    (_rename("image_encoder.", "image_encoder.backbone."), "another encoder than a ViT"),
    (lambda t: {f"model.{i}.conv.weight": np.zeros(3) for i in range(3)}, "YOLO"),
    (_keep("mask_decoder."), "a mask decoder alone"),
    (_keep("mask_decoder.", cut=True), "a mask decoder alone"),
    (_keep("prompt_encoder."), "a prompt encoder alone"),
    (_keep("image_encoder.", cut=True), "an image encoder alone"),
    (_keep("image_encoder."), "lacks a mask decoder: it holds an image encoder alone"),
    (lambda t: {"fc.weight": np.zeros(3)}, "no checkpoint of Segment Anything"),
]


@pytest.mark.parametrize(("changed", "words"), MODELS, ids=[words[:24] for _, words in MODELS])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_another_models_tensors_are_named(
    tmp_path: Path, published: dict[str, np.ndarray], changed: Any, words: str, prefix: str
) -> None:
    tensors = {f"{prefix}{name}": array for name, array in changed(published).items()}
    write_safetensors(tmp_path / SAFETENSORS, tensors)
    with pytest.raises((WeightsError, ValueError), match=rf"{SAFETENSORS}( holds)? .*{words}"):
        load(tmp_path / SAFETENSORS, decoder_heads=4)
