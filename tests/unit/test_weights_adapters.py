"""Adapters of a run: trained alone, merged on every way out, in a file of their own and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from PIL import Image
from typer.testing import CliRunner

from sam_jax.checkpoint import save_config, save_variables
from sam_jax.cli import app
from sam_jax.errors import ConfigError
from sam_jax.evaluation.run import model_of
from sam_jax.export.onnx import ENCODER
from sam_jax.export.stablehlo import load_stablehlo
from sam_jax.inference.predictor import Predictor, fingerprint_of
from sam_jax.models.lora import merged_variables
from sam_jax.models.sam import Sam
from sam_jax.ops.images import RGB, ImageChannels
from sam_jax.training.experiment import Experiment, read_config
from sam_jax.weights.adapters import read_adapters, write_adapters
from sam_jax.weights.files import WeightsError
from sam_jax.weights.load import _as_trained, convert, load, save
from tests.golden.tiny import random_variables

TINY = str(Path(__file__).parents[1] / "e2e" / "tiny_run.py")
SETTINGS = (
    "lora.rank=2",
    "lora.alpha=4.0",
    "train.trainable=('lora', 'decoder')",
    "model.image_size=(32, 32)",
    "model.encoder.depth=1",
    "model.encoder.global_attention_blocks=()",
)


def sections_of(*settings: str) -> dict[str, Any]:
    return read_config(TINY, [*SETTINGS, *settings])


def experiment_of(*settings: str) -> Experiment:
    return Experiment.of(sections_of(*settings))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to start from, as a run's folder."""
    model = experiment_of().task.model
    folder = tmp_path_factory.mktemp("base") / "run"
    save(folder, model.config, random_variables(model.config), "orbax")
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run whose adapters and decoder have moved, and its variables."""
    sections = sections_of(f"train.init_from={base}")
    variables = Experiment.of(sections).task.load(str(base), jax.random.key(0))

    def moved(path: Any, leaf: Any) -> Any:
        is_trained = path[0].key in ("lora", "mask_decoder")
        return leaf + 0.125 if is_trained else leaf

    params = jax.tree_util.tree_map_with_path(moved, variables["params"])
    variables = {**variables, "params": params}
    folder = tmp_path_factory.mktemp("adapted") / "run"
    save_config(folder, sections)
    save_variables(folder, variables)
    return folder, variables


def assert_same(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_run_starts_as_its_base(base: Path) -> None:
    task = experiment_of().task
    variables = task.load(str(base), jax.random.key(0))
    assert "lora" in variables["params"]
    assert_same(task.evaluated(variables), load(base).variables)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    jax.tree.map(lambda shape, leaf: None, shapes, variables)


def test_a_run_is_read_with_its_adapters_merged(run: tuple[Path, dict], base: Path) -> None:
    folder, variables = run
    loaded = load(folder)
    assert_same(loaded.variables, merged_variables(variables, experiment_of().task.lora))
    before, after = (
        flatten_dict(variables["params"], sep="/")
        for variables in (load(base).variables, loaded.variables)
    )
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    kernels = {f"image_encoder/block_00/attn/{layer}/kernel" for layer in ("qkv", "proj")}
    assert changed == kernels | {path for path in before if path.startswith("mask_decoder/")}


@pytest.mark.parametrize(
    ("target", "to"),
    [
        ("x.safetensors", "official"),
        ("x.pth", "official"),
        ("hugging", "hugging-face"),
        ("orbax", "orbax"),
    ],
)
def test_converted_runs_are_merged(
    target: str, to: Any, run: tuple[Path, dict], tmp_path: Path
) -> None:
    if target.endswith(".pth"):
        pytest.importorskip("torch", reason="needs requirements-torch.lock")
    convert(run[0], tmp_path / target, to)
    # Only files do not say how many heads the decoder has.
    heads = 2 if to == "official" else None
    assert_same(load(tmp_path / target, decoder_heads=heads).variables, merged_of(run))


def merged_of(run: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return merged_variables(run[1], experiment_of().task.lora)


def test_predictions_and_evaluations_are_of_the_merged_model(
    run: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, variables = run
    expected = fingerprint_of(merged_of(run), RGB)
    base = {name: part for name, part in variables["params"].items() if name != "lora"}
    assert fingerprint_of({**variables, "params": base}, RGB) != expected
    assert Predictor.load(folder).fingerprint() == expected
    for sections in (sections_of(), {"evals": {}}):
        model, found, _ = model_of(sections, str(folder), step=None, ema=True)
        assert "lora" not in found["params"]
        assert fingerprint_of(found, model.config.channels) == expected

    def embed(predictor: Predictor, images: Any) -> None:
        raise ConfigError(f"asked of {predictor.fingerprint()}")

    monkeypatch.setattr(Predictor, "embed", embed)
    Image.new("RGB", (48, 32)).save(tmp_path / "picture.png")
    picture, out = str(tmp_path / "picture.png"), str(tmp_path / "out.png")
    for command, options in (("predict", ["--points", "9,9"]), ("masks", [])):
        arguments = [command, picture, "--checkpoint", str(folder), "--out", out, *options]
        result = CliRunner().invoke(app, arguments)
        assert f"asked of {expected}" in str(result.exception), (command, result.output)


@pytest.mark.parametrize("to", ["onnx", "stablehlo"])
def test_exported_runs_are_merged(to: str, run: tuple[Path, dict], tmp_path: Path) -> None:
    for package in {"onnx": ("onnx", "onnxruntime"), "stablehlo": ("flatbuffers",)}[to]:
        pytest.importorskip(package, reason="needs requirements-torch.lock")
    arguments = ["export", str(run[0]), str(tmp_path / "x"), "--to", to]
    arguments += ["--platform", "cpu"] if to == "stablehlo" else []
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    model = experiment_of().task.model
    images = np.random.default_rng(0).normal(size=(1, *model.image_size, 3)).astype(np.float32)
    if to == "stablehlo":
        found = load_stablehlo(tmp_path / "x").encode(jnp.asarray(images))
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "x" / ENCODER)
        (found,) = session.run(None, {"images": images.transpose(0, 3, 1, 2)})
        found = found.transpose(0, 2, 3, 1)
    encode = jax.jit(lambda v, x: model.apply(v, x, method=Sam.encode))
    expected = encode(merged_of(run), images)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # A model without its adapters answers otherwise by more than that.
    bare = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if path[1].key == "lora" else leaf, run[1]
    )
    bare = merged_variables(bare, experiment_of().task.lora)
    assert np.abs(encode(bare, images) - expected).max() > 0.01


def test_adapters_on_their_base_are_the_run(
    run: tuple[Path, dict], base: Path, tmp_path: Path
) -> None:
    folder, variables = run
    file, merged = tmp_path / "adapters.safetensors", tmp_path / "merged.safetensors"
    runner = CliRunner()
    result = runner.invoke(app, ["convert", str(folder), str(file), "--only-adapters"])
    assert result.exit_code == 0, result.output
    assert "adapters of rank 2" in result.output
    assert file.stat().st_size < 0.8 * sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    result = runner.invoke(app, ["convert", str(base), str(merged), "--with-adapters", str(file)])
    assert result.exit_code == 0, result.output
    expected = load(folder).variables
    assert_same(load(merged, decoder_heads=2).variables, expected)

    # As the start of a run: to train them on, or merged.
    options = (f"train.init_from={base}", f"train.adapters_from={file}")
    key = jax.random.key(3)
    assert_same(experiment_of(*options).task.load(str(base), key), variables)
    plain = experiment_of(*options, "lora.rank=0", "train.trainable=('all',)")
    assert_same(plain.task.load(str(base), key), expected)
    with pytest.raises(ConfigError, match=r"rank=2.*the config's section lora is .*rank=3"):
        experiment_of(*options, "lora.rank=3").task.load(str(base), key)


def test_adapters_carry_the_images_that_they_were_trained_on(base: Path, tmp_path: Path) -> None:
    """Statistics of pixels, and a size: the whole is the run, and not the base with its weights."""
    own = ("model.pixel_mean=(10.0, 20.0, 30.0)", "model.image_size=(48, 32)")
    sections = sections_of(f"train.init_from={base}", *own)
    variables = Experiment.of(sections).task.load(str(base), jax.random.key(0))
    save_config(tmp_path / "run", sections)
    save_variables(tmp_path / "run", variables)
    file, whole = tmp_path / "adapters.safetensors", tmp_path / "whole.safetensors"
    write_adapters(tmp_path / "run", file)
    said = convert(base, whole, "official", adapters=file)
    assert "48 x 32 pixels" in said
    assert "mean 10, 20, 30" in said
    (model, found), expected = load(whole, decoder_heads=2), load(tmp_path / "run")
    assert model.config.channels == expected.model.config.channels
    assert model.config.image_encoder.image_size == (48, 32)
    assert_same(found, expected.variables)

    options = (f"train.init_from={base}", f"train.adapters_from={file}")
    with pytest.raises(ConfigError, match=r"images of other channels \(8-bit RGB; mean 10, 20, 30"):
        experiment_of(*options).task.load(str(base), jax.random.key(0))
    adapters = dataclasses.replace(read_adapters(file), channels=ImageChannels(1, (0.5,), (0.5,)))
    with pytest.raises(WeightsError, match="was trained on images of 1 channels"):
        _as_trained(model.config, adapters, base)


def test_another_base_is_refused(run: tuple[Path, dict], base: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapters.safetensors"
    write_adapters(run[0], file)
    task = experiment_of(f"train.init_from={base}", f"train.adapters_from={file}").task
    config = task.model.config
    shifted = jax.tree.map(lambda leaf: leaf + 0.5, random_variables(config))
    save(tmp_path / "other", config, shifted, "orbax")
    with pytest.raises(WeightsError, match="trained on top of other weights"):
        task.load(str(tmp_path / "other"), jax.random.key(0))
    adapters = read_adapters(file)
    wider = {"mask_decoder": {"iou_token": jnp.zeros(3)}}
    with pytest.raises(WeightsError, match=r"mask_decoder/iou_token \(3,\), there nothing"):
        dataclasses.replace(task, adapters_from=str(_rewritten(adapters, wider, tmp_path))).load(
            str(base), jax.random.key(0)
        )


def _rewritten(adapters: Any, params: dict, folder: Path) -> Path:
    path = folder / "rewritten.safetensors"
    about = {
        "form": "sam_jax adapters 1",
        "lora": json.dumps(dataclasses.asdict(adapters.config)),
        "base": adapters.base,
    }
    tensors = {name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep="/").items()}
    safetensors.numpy.save_file(tensors, path, about)
    return path


def test_what_is_no_file_of_adapters_is_refused(
    run: tuple[Path, dict], base: Path, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        read_adapters(tmp_path / "nothing.safetensors")
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(3)}, other)
    with pytest.raises(WeightsError, match="holds no adapters"):
        read_adapters(other)
    write_adapters(run[0], other)
    other.write_bytes(other.read_bytes()[:-9])
    with pytest.raises(WeightsError, match="damaged, cut short"):
        read_adapters(other)
    with pytest.raises(WeightsError, match="has trained all parameters"):
        write_adapters(base, other)
    with pytest.raises(WeightsError, match=r"written as \.safetensors"):
        write_adapters(run[0], tmp_path / "adapters.pth")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("train.trainable=('decoder',)",), "adapters that train.trainable .* does not train"),
        (("train.trainable=('lora', 'attn/qkv')",), "attn/qkv/kernel, which has an adapter"),
        (("lora.rank=0",), "'lora' matches none .* lora.rank = 0 makes no adapters"),
        (("train.embedding_cache=x", "model.drop_path_rate=0.0"), "trains lora: set"),
    ],
)
def test_settings_that_contradict_adapters_are_refused(
    settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment_of(*settings).compiled_step(jax.devices()[:1])
    with pytest.raises(ConfigError, match="adapters_from needs the weights"):
        experiment_of("train.adapters_from=x")


def test_other_adapters_are_another_model(run: tuple[Path, dict]) -> None:
    folder = run[0]
    assert experiment_of().task.differences(folder) == []
    (line,) = experiment_of("lora.alpha=8.0").task.differences(folder)
    assert "alpha=4.0" in line
    assert "alpha=8.0 here" in line.replace(", targets=('attn/qkv', 'attn/proj'))", "")
