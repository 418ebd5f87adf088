"""Whole runs on images of several channels: training, going on, evaluation and prediction."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image
from typer.testing import CliRunner

from sam_jax.checkpoint import CheckpointConfig
from sam_jax.cli import app
from sam_jax.data.pipeline import train_iterator
from sam_jax.errors import ConfigError
from sam_jax.evaluation.run import build_evaluators, model_of
from sam_jax.inference.predictor import Predictor
from sam_jax.models.sam import Sam
from sam_jax.ops.images import ImageChannels
from sam_jax.resizing import fit_longest_side, resize_image
from sam_jax.training import loop
from sam_jax.training.experiment import Experiment, read_config
from sam_jax.weights.inflation import inflated
from sam_jax.weights.load import load, save
from sam_jax.weights.names import NamesError
from sam_jax.weights.runs import run_config
from tests.e2e.tiny_run import ONE_LAYER, ONE_ROUND
from tests.golden.tiny import random_variables

TINY = str(Path(__file__).parents[1] / "e2e" / "tiny_run.py")
# As little to compile as there can be.
SETTINGS = (
    *ONE_ROUND,
    *ONE_LAYER,
    "model.drop_path_rate=0.0",
    "optimizer.warmup_steps=0",
    "train.log_every=1",
    "train.remat_rounds=False",
    "data.max_masks=1",
    "train.ema_decay=0.0",
    "data.batch_size=2",
    "data.num_threads=0",
    "checkpoint.every_steps=1",
)
# Of near infrared and others: not 8 bits, and not from 0.
LOW, HIGH, MEAN, STD = 300, 4000, (2000.0, 2100.0, 1900.0, 2050.0), (1000.0, 900.0, 1100.0, 950.0)
PATCHES = "image_encoder/patch_embed/proj/kernel"
STEPS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images [h, w, 4] of uint16, one of which is [4, h, w], with a mask each."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number in range(5):
        image = rng.integers(LOW, HIGH, (30 + number, 44, 4)).astype(np.uint16)
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[5:20, 8:30] = 255
        image[mask > 0, 3] = HIGH
        stored = np.moveaxis(image, -1, 0) if number == 1 else image
        np.save(folder / "images" / f"{number}.npy", stored)
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def rgb_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny model for 8-bit RGB."""
    config = Experiment.of(read_config(TINY, SETTINGS)).task.model.config
    path = tmp_path_factory.mktemp("weights") / "rgb.safetensors"
    save(path, config, random_variables(config), "official")
    return path


def sections_of(data: Path, weights: Path, **changes: Any) -> dict[str, Any]:
    source = {"kind": "mask_folder", "path": str(data / "images"), "masks": str(data / "masks")}
    sections = read_config(TINY, SETTINGS)
    sections["model"] |= {"in_channels": 4, "pixel_mean": MEAN, "pixel_std": STD}
    sections["data"] |= {"sources": (source,), "hflip_rate": 0.5}
    sections["train"] |= {"num_steps": STEPS, "eval_every": STEPS, "watch": "val/mean/box"}
    sections["train"] |= {"init_from": str(weights)}
    sections["evals"] = {
        "val": {"sources": (source,), "protocols": ("box",), "num_clicks": (1,), "num_examples": 1}
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        sections[section][name] = value
    return sections


def train(sections: dict[str, Any], program: Any, workdir: Path, **changes: Any) -> Any:
    experiment = Experiment.of(sections)
    return loop.train(
        workdir=str(workdir),
        compiled_step=program,
        config=dataclasses.replace(experiment.train, **changes),
        batch_size=experiment.data.batch_size,
        data_iterator=train_iterator(experiment.data),
        checkpoint_config=CheckpointConfig(**sections["checkpoint"]),
        evaluators=build_evaluators(sections["evals"], experiment.task.model),
        sections=sections,
        stage=experiment.stage(),
    )


class Run(NamedTuple):
    folder: Path
    sections: dict[str, Any]


@pytest.fixture(scope="module")
def run(data: Path, rgb_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    sections = sections_of(data, rgb_weights)
    # Compiled once, for both.
    program = Experiment.of(sections).compiled_step(jax.devices()[:1])
    train(sections, program, folder, num_steps=1, eval_every=0)
    train(sections, program, folder)
    return Run(folder, sections)


def test_training_starts_from_weights_of_rgb_and_goes_on(run: Run, rgb_weights: Path) -> None:
    assert sorted(int(path.name) for path in (run.folder / "checkpoints").iterdir()) == [1, 2]
    experiment = Experiment.of(run.sections)
    start = experiment.task.load(str(rgb_weights), jax.random.key(0))
    before = flatten_dict(load(rgb_weights, decoder_heads=2).variables["params"], sep="/")[PATCHES]
    after = flatten_dict(start["params"], sep="/")[PATCHES]
    side = experiment.task.model.config.image_encoder.patch_size
    filters = np.asarray(before).reshape(side**2, 3, -1)
    np.testing.assert_array_equal(
        np.asarray(after).reshape(side**2, 4, -1), inflated(filters, 4, axis=1)
    )
    assert run_config(run.folder).channels.in_chans == 4
    # It learns that there is a fourth channel.
    trained = flatten_dict(load(run.folder).variables["params"], sep="/")[PATCHES]
    assert np.abs(np.asarray(trained) - after).max() > 0


def test_batches_hold_the_values_as_they_are_stored(run: Run) -> None:
    iterator = train_iterator(Experiment.of(run.sections).data)
    batch = next(iterator)
    iterator.close()
    assert batch["image"].dtype == np.float32
    assert batch["image"].shape == (2, 32, 48, 4)
    height, width = batch["image_hw"][0]
    inside = batch["image"][0, :height, :width]
    assert LOW <= inside.min() < inside.max() <= HIGH
    assert not batch["image"][0, height:].any()
    spec = Experiment.of(run.sections).task.batch_spec(2)["image"]
    assert (spec.shape, spec.dtype) == (batch["image"].shape, batch["image"].dtype)


def test_evaluation_reads_the_same_files(run: Run, rgb_weights: Path, tmp_path: Path) -> None:
    model, variables, kernels = model_of(run.sections, str(run.folder), step=None, ema=True)
    evaluators = build_evaluators(run.sections["evals"], model, kernels=kernels)
    report = evaluators["val"](variables, tmp_path)
    (in_loop,) = json.loads((run.folder / "evaluations.json").read_text())["evaluations"]
    assert report.as_flat_dict()["mean/box"] == pytest.approx(in_loop["value"], abs=1e-6)
    with Image.open(tmp_path / "examples.png") as examples:
        assert examples.mode == "RGB"
    with pytest.raises(NamesError, match=r"in_channels is None \(8-bit RGB\), expected 4"):
        model_of(run.sections, str(rgb_weights), step=None, ema=True)
    other = {**run.sections, "model": run.sections["model"] | {"pixel_mean": (1.0,) * 4}}
    with pytest.raises(NamesError, match="pixel_mean is"):
        model_of(other, str(run.folder), step=None, ema=True)


def test_a_run_does_not_go_on_with_other_statistics(run: Run, tmp_path: Path) -> None:
    other = {**run.sections, "model": run.sections["model"] | {"pixel_std": (1.0,) * 4}}
    assert Experiment.of(other).task.differences(run.folder) == [
        f"pixel_std is {STD}, expected (1.0, 1.0, 1.0, 1.0)"
    ]


def test_prediction_takes_arrays_and_files_of_its_channels(run: Run, data: Path) -> None:
    predictor = Predictor.load(run.folder)
    assert predictor.in_channels == 4
    image = np.load(data / "images" / "0.npy")
    one, two = predictor.embed([image, image.astype(np.float64)]).features
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(predictor.embed(image).features[0], one, atol=1e-5)
    model, variables = load(run.folder)
    resized_hw = fit_longest_side(image.shape[:2], model.image_size)
    pixels = np.zeros((1, *model.image_size, 4), np.float32)
    resized = resize_image(image.astype(np.float32), resized_hw)
    normalized = (resized - np.float32(MEAN)) / np.float32(STD)
    pixels[0, : resized_hw[0], : resized_hw[1]] = normalized
    expected = jax.jit(lambda v, x: model.apply(v, x, method="encode"))(variables, pixels)
    np.testing.assert_allclose(one, expected[0], atol=1e-4)
    for wrong in (image[..., :3], np.moveaxis(image, -1, 0), image[..., 0]):
        with pytest.raises(ValueError, match=r"expected \[h, w, 4\]"):
            predictor.embed([wrong])
    with pytest.raises(ValueError, match="not finite"):
        predictor.embed([np.full((8, 8, 4), np.nan)])


def test_the_same_weights_with_other_statistics_have_another_name(run: Run) -> None:
    """So that records of an evaluation, and masks of a folder, are not taken for each other's."""
    model, variables = load(run.folder)
    channels = [model.config.channels, ImageChannels(4, MEAN, (1.0,) * 4)]
    names = [
        Predictor(Sam(dataclasses.replace(model.config, channels=one)), variables).fingerprint()
        for one in (*channels, channels[0])
    ]
    assert names[0] == names[2] != names[1]


def test_the_command_line_predicts_and_annotates(run: Run, data: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    out = tmp_path / "seen.png"
    arguments = ("--checkpoint", str(run.folder), "--out", str(out), "--box", "8,5,30,20")
    result = runner.invoke(app, ["predict", str(data / "images" / "0.npy"), *arguments])
    assert result.exit_code == 0, result.output
    with Image.open(out) as picture:
        assert (picture.mode, picture.size) == ("RGB", (44, 30))
    out = tmp_path / "masks"
    options = ("--points-per-side", "1", "--pred-iou-thresh", "-9", "--stability-score-thresh", "0")
    arguments = ("--checkpoint", str(run.folder), "--out", str(out), *options)
    result = runner.invoke(app, ["masks", str(data / "images"), *arguments])
    assert result.exit_code == 0, result.output
    assert len(list((out / "annotations").glob("*.json"))) == 5
    result = runner.invoke(app, ["inspect", str(run.folder)])
    assert "4, values as stored; mean 2000, 2100, 1900, 2050" in " ".join(result.output.split())


def test_what_cannot_be_is_said_before_the_data_are_read(data: Path, rgb_weights: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.pixel_std is None.*sam-jax channels"):
        Experiment.of(sections_of(data, rgb_weights, model__pixel_std=None))
    with pytest.raises(ConfigError, match=r"color_jitter = 0\.1 changes red, green and blue"):
        Experiment.of(sections_of(data, rgb_weights, data__color_jitter=0.1))
    synthetic = read_config(TINY)["data"]["sources"]
    experiment = Experiment.of(sections_of(data, rgb_weights, data__sources=synthetic))
    with pytest.raises(ConfigError, match=r"'synthetic' has 8-bit RGB.*model\.in_channels"):
        train_iterator(experiment.data)


def test_cached_embeddings_are_of_other_statistics_others(
    data: Path, rgb_weights: Path, tmp_path: Path
) -> None:
    def stage(**changes: Any) -> Any:
        changes = {"train__trainable": ("decoder",), "model__drop_path_rate": 0.0, **changes}
        changes |= {"train__embedding_cache": str(tmp_path)}
        experiment = Experiment.of(sections_of(data, rgb_weights, **changes))
        variables = experiment.task.load(str(rgb_weights), jax.random.key(0))
        batches = experiment.stage()(experiment.data_iterator(), variables)
        return next(batches)["image_embeddings"]

    first, again, other = stage(), stage(), stage(model__pixel_std=(500.0,) * 4)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(np.float32) - other).max() > 1e-2
    assert len(list(tmp_path.iterdir())) == 2
