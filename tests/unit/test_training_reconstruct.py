"""Pre-training by the same loop, and promptable training that starts from it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import common
from sam_jax.checkpoint import CheckpointConfig, Checkpointer, CheckpointError
from sam_jax.data.pipeline import train_iterator
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError
from sam_jax.evaluation.comparison.checkpoints import compare
from sam_jax.evaluation.reconstruction import (
    MaskedReconstruction,
    ReconstructionConfig,
    ReconstructionReport,
)
from sam_jax.evaluation.results import read_results
from sam_jax.evaluation.run import build_evaluators, model_of
from sam_jax.evaluation.targets import NotFiniteError
from sam_jax.inference.reconstructor import Reconstructor
from sam_jax.models.masked_autoencoder import MaskedAutoencoder
from sam_jax.models.sam import Sam, variable_shapes
from sam_jax.ops.positional import sincos_positions
from sam_jax.training import loop
from sam_jax.training.experiment import Experiment, read_config
from sam_jax.training.optimizer import parameter_groups
from sam_jax.weights.files import WeightsError, read_tensors, write_safetensors
from sam_jax.weights.load import (
    autoencoder_variables_for,
    convert,
    describe,
    load,
    open_weights,
)
from sam_jax.weights.mae import mae_tensors, start_from_mae
from sam_jax.weights.names import NamesError
from sam_jax.weights.runs import run_differences
from tests.golden.tiny import random_autoencoder
from tests.unit.data_fixtures import encode_image, gradient_image

SEGMENT_CONFIG = str(Path(__file__).parents[1] / "e2e" / "tiny_run.py")
BATCH_SIZE = 8


def sections(images: Path, **changes: Any) -> dict[str, Any]:
    """A config of pre-training the encoder of ``tests/e2e/tiny_run.py``."""
    encoder = read_config(SEGMENT_CONFIG)["model"]["encoder"]
    config = common.base_config("reconstruct")
    config.model = {"variant": "vit_ti", "image_size": (32, 32), "encoder": encoder}
    config.autoencoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    source = {"kind": "images", "path": str(images)}
    config.data = {
        "sources": (source,),
        "batch_size": BATCH_SIZE,
        "crop_area_rates": (0.2, 1.0),
        "num_threads": 0,
    }
    config.optimizer = {"warmup_steps": 1, "peak_learning_rate": 1e-2, "schedule": "cosine"}
    config.train = {"num_steps": 2, "log_every": 1}
    config.evals = {
        "val": {"kind": "reconstruction", "sources": (source,), "num_examples": 2, "seed": 4}
    }
    config = common.complete(config)
    config.update_from_flattened_dict(changes)
    found: dict[str, Any] = config.to_dict()
    return found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of any size, of which one is damaged."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(5):
        content = encode_image(gradient_image((20 + 9 * number, 50)))
        (folder / f"{number}.png").write_bytes(content[:70] if number == 3 else content)
    return folder


class Run(NamedTuple):
    folder: Path
    sections: dict[str, Any]
    params: Any
    said: str


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps of pre-training, with an evaluation after them."""
    folder = tmp_path_factory.mktemp("runs") / "mae"
    config = sections(images, **{"data.max_corrupt_rate": 0.5})
    experiment = Experiment.of(config)
    data = train_iterator(experiment.data)
    evaluators = build_evaluators(config["evals"], experiment.task.model)
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("sam_jax.training.report.Reporter.say", lambda self, text: lines.append(text))
        state = loop.train(
            workdir=folder,
            compiled_step=experiment.compiled_step(jax.devices()[:1]),
            config=experiment.train,
            batch_size=BATCH_SIZE,
            data_iterator=data,
            checkpoint_config=CheckpointConfig(),
            evaluators=evaluators,
            sections=config,
        )
    data.close()
    return Run(folder, config, jax.device_get(state.params), "\n".join(lines))


def test_the_loop_trains_and_says_so(run: Run) -> None:
    assert "step 2/2  loss " in run.said
    assert "patches/s" in run.said
    fresh = Experiment.of(run.sections).task.init(jax.random.key(0))["params"]
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), fresh, run.params)
    assert all(jax.tree.leaves(moved))
    assert (run.folder / "tensorboard").is_dir()
    assert json.loads((run.folder / "config.json").read_text())["task"] == "reconstruct"


@pytest.fixture(scope="module")
def segment() -> Any:
    """The task of promptable training with the same encoder, at 4 x 6 patches."""
    return Experiment.of(read_config(SEGMENT_CONFIG)).task


def assert_encoder_continues(encoder: Any, trained: Any) -> None:
    """Checks that all but positions, neck and what pre-training alone has is the trained."""
    for name, of_block in encoder.items():
        if not name.startswith("block_"):
            continue
        for table in ("rel_pos_h", "rel_pos_w"):
            assert not np.any(of_block["attn"][table])
        ours = {**of_block, "attn": {k: v for k, v in of_block["attn"].items() if "rel" not in k}}
        jax.tree.map(np.testing.assert_array_equal, ours, trained[name])
    jax.tree.map(np.testing.assert_array_equal, encoder["patch_embed"], trained["patch_embed"])


def test_promptable_training_starts_from_a_run_by_one_key(run: Run, segment: Any) -> None:
    variables = segment.load(str(run.folder), jax.random.key(1))
    encoder = variables["params"]["image_encoder"]
    assert_encoder_continues(encoder, run.params["image_encoder"])
    assert jax.tree.structure(variables) == jax.tree.structure(
        variable_shapes(segment.model.config)
    )
    # 4 x 4 fixed positions, interpolated to 4 x 6: rows stay, columns move.
    of_rows, fixed = encoder["pos_embed"][:, :, 8:], sincos_positions((4, 4), 16)
    np.testing.assert_allclose(of_rows, fixed[:, [0, 0, 1, 2, 3, 3], 8:], atol=1e-5)
    # What pre-training has not is as fresh as in a run from nothing.
    assert np.std(variables["params"]["mask_decoder"]["output_tokens"]) > 0.1


@pytest.fixture
def quick_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros for what is drawn at random, which would be compiled first."""
    monkeypatch.setattr(
        "sam_jax.weights.mae.init_variables",
        lambda model, key: jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype), variable_shapes(model.config)
        ),
    )


@pytest.mark.usefixtures("quick_init")
def test_written_under_the_published_names_and_read_again(
    run: Run, segment: Any, tmp_path: Path
) -> None:
    path = tmp_path / "mae.safetensors"
    assert "masked autoencoder for 32 x 32" in convert(run.folder, path, "mae")
    tensors = read_tensors(path)
    assert tensors["pos_embed"].shape == (1, 17, 16)
    assert tensors["decoder_pos_embed"].shape == (1, 17, 16)
    assert tensors["cls_token"].shape == tensors["mask_token"].shape == (1, 1, 16)
    assert tensors["decoder_pred.weight"].shape == (192, 16)
    assert tensors["patch_embed.proj.weight"].shape == (16, 3, 8, 8)
    np.testing.assert_array_equal(
        tensors["decoder_blocks.0.mlp.fc1.weight"].T,
        run.params["pixel_decoder"]["block_00"]["mlp"]["dense_0"]["kernel"],
    )
    model = Experiment.of(run.sections).task.model
    again = autoencoder_variables_for(model, path)
    jax.tree.map(np.testing.assert_array_equal, again["params"], run.params)
    # A foreign file serves by the same key as a run.
    encoder = segment.load(str(path), jax.random.key(1))["params"]["image_encoder"]
    assert_encoder_continues(encoder, run.params["image_encoder"])


@pytest.mark.usefixtures("quick_init")
def test_pre_training_goes_on_from_weights_with_a_decoder(
    run: Run, segment: Any, tmp_path: Path
) -> None:
    task = Experiment.of(run.sections).task
    loaded = task.load(str(run.folder), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], run.params)
    tensors = dict(mae_tensors(task.model, {"params": run.params}))
    shifted = tmp_path / "shifted.safetensors"
    write_safetensors(shifted, tensors | {"pos_embed": tensors["pos_embed"] + np.float32(0.1)})
    with pytest.raises(WeightsError, match=r"pos_embed differs by 0\.1 from the fixed sines"):
        task.load(str(shifted), jax.random.key(0))
    alone = tmp_path / "encoder.safetensors"
    write_safetensors(alone, {k: v for k, v in tensors.items() if not k.startswith("decoder")})
    with pytest.raises(NamesError, match=r"missing: decoder_embed\.weight"):
        task.load(str(alone), jax.random.key(0))
    # That is all that promptable training needs.
    encoder = segment.load(str(alone), jax.random.key(1))["params"]["image_encoder"]
    assert_encoder_continues(encoder, run.params["image_encoder"])


@pytest.mark.usefixtures("quick_init")
def test_positions_need_not_be_of_a_square(segment: Any, images: Path) -> None:
    oblong = Experiment.of(sections(images, **{"model.image_size": (16, 24)})).task.model
    trained = random_autoencoder(oblong)
    tensors = mae_tensors(oblong, trained)
    started = start_from_mae(segment.model, tensors, jax.random.key(0), grid=(2, 3))
    assert_encoder_continues(started["params"]["image_encoder"], trained["params"]["image_encoder"])
    with pytest.raises(WeightsError, match=r"pos_embed has shape \(1, 7, 16\)"):
        start_from_mae(segment.model, tensors, jax.random.key(0))


@pytest.mark.usefixtures("quick_init")
def test_what_a_run_of_pre_training_is_not(run: Run, segment: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"only the encoder serves.*--to mae"):
        load(run.folder)
    with pytest.raises(WeightsError, match="only the encoder serves"):
        convert(run.folder, tmp_path / "x.safetensors", "official")
    assert open_weights(run.folder).form == "mae"
    assert describe(run.folder).problems == ""
    assert segment.differences(run.folder) == [
        "it trains a masked autoencoder, expected a promptable model"
    ]
    with pytest.raises(CheckpointError, match=r"trains another model(.|\n)*masked autoencoder"):
        loop._check_workdir(run.folder, Checkpointer(run.folder, CheckpointConfig()), segment)


def test_a_run_of_another_shape_is_not_continued(run: Run) -> None:
    def differences(**changes: Any) -> list[str]:
        other = json.loads(json.dumps(run.sections))
        for section, values in changes.items():
            other[section] |= values
        return Experiment.of(other).task.differences(run.folder)

    assert differences() == []
    assert differences(autoencoder={"mask_rate": 0.5}) == []
    assert differences(autoencoder={"decoder_depth": 3}) == ["decoder_depth is 1, expected 3"]
    assert differences(model={"image_size": [32, 48]}) == [
        "image_size is (32, 32), expected (32, 48)"
    ]


def test_evaluation_on_held_out_images(run: Run, tmp_path: Path) -> None:
    """As eval.py does it: losses, pictures, what was skipped; the same at every time."""
    model, variables, kernels = model_of(run.sections, str(run.folder), step=None, ema=True)
    assert isinstance(model, MaskedAutoencoder)
    reports = []
    for name, options in (("one", {"images_per_call": 3}), ("two", {"images_per_call": 16})):
        evals = {"val": {**run.sections["evals"]["val"], **options}}
        (evaluate,) = build_evaluators(evals, model, kernels=kernels).values()
        reports.append(evaluate(variables, tmp_path / name))
    first, second = (report.as_flat_dict() for report in reports)
    assert first == pytest.approx(second, rel=1e-5)
    assert first.keys() == {"images/loss", "mean/loss"}
    # Little was learnt in two steps: about the patches' means.
    assert 0.5 < first["mean/loss"] < 3
    written = json.loads((tmp_path / "one" / "report.json").read_text())
    assert written["num_images"] == {"images": 4}
    (reason,) = written["skipped"]
    assert reason.startswith("images (")
    assert (tmp_path / "one" / "reconstructions.png").is_file()
    sheet = reports[0].pictures["reconstructions"]
    assert sheet.shape[0] > 2 * 32
    assert sheet.shape[1] > 3 * 32
    results = [read_results(tmp_path / name) for name in ("one", "two")]
    (difference,) = [d for d in compare(*results, num_draws=20).differences if "mean" in d.measure]
    assert difference.a == pytest.approx(difference.b, rel=1e-5)


class Constant(Reconstructor):
    """A reconstructor that gives every image the same loss."""

    model_hw, num_patches, images_per_call = (32, 32), 4, 2  # type: ignore[assignment]

    def __init__(self, loss: float):
        self._loss = loss

    def reconstruct(self, images: np.ndarray, noise: np.ndarray) -> Any:
        losses = np.full(len(images), self._loss, np.float32)
        return SimpleNamespace(losses=losses, seen=images.__getitem__, whole=images.__getitem__)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_losses_that_are_no_numbers_are_an_error(images: Path, loss: float) -> None:
    source = {"kind": "images", "path": str(images)}
    evaluation = MaskedReconstruction(ReconstructionConfig((source,)))
    with pytest.raises(NotFiniteError, match=r"0\.png: the loss is (nan|inf), expected a finite"):
        list(evaluation.records(Constant(loss), range(5)))


def test_pictures_that_changed_are_reconstructed_anew(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "copy")

    def digests() -> Any:
        source = {"kind": "images", "path": str(tmp_path / "copy")}
        return MaskedReconstruction(ReconstructionConfig((source,))).settings["truth_digests"]

    before = digests()
    assert digests() == before
    shutil.copy(images / "0.png", tmp_path / "copy/1.png")
    assert digests() != before


def test_kinds_of_evaluations_belong_to_kinds_of_models(run: Run, segment: Any) -> None:
    model = Experiment.of(run.sections).task.model
    with pytest.raises(ConfigError, match="not for a MaskedAutoencoder: expected reconstruction"):
        build_evaluators({"x": {"sources": ({"kind": "synthetic"},)}}, model)
    with pytest.raises(ConfigError, match="not for a Sam: expected prompts or edges"):
        build_evaluators(run.sections["evals"], segment.model)
    assert isinstance(segment.model, Sam)


def test_devices_that_share_images_and_weights_do_what_one_does(images: Path) -> None:
    """A step of eight devices that divide images, weights, heads and channels."""
    metrics, moved = [], []
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, 32, 32, 3)).astype(np.uint8)
    for devices, axes in ((1, {}), (8, {"sharding.fsdp": 2, "sharding.tensor": 2})):
        experiment = Experiment.of(sections(images, **axes))
        program = experiment.compiled_step(jax.devices()[:devices])
        # Random, so that no kernel has a gradient of zero, which Adam would make a step of.
        state = program.state_from(random_autoencoder(experiment.task.model))
        before = jax.tree.map(np.array, state.params)
        step = program.step.lower(program.placed_state, program.placed_batch(BATCH_SIZE)).compile(
            compiler_options={"xla_backend_optimization_level": 0}
        )
        batch = jax.device_put({"image": pixels}, program.batch_sharding)
        for _ in range(2):
            state, found = step(state, batch)
        metrics.append({name: float(value) for name, value in found.items()})
        moved.append(jax.tree.map(lambda a, b: np.array(a) - b, state.params, before))
    kernel = state.params["pixel_decoder"]["block_00"]["mlp"]["dense_0"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 32)
    for name in ("loss", "gradient_norm"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-5), name
    assert metrics[0]["num_patches"] == metrics[1]["num_patches"] == BATCH_SIZE * 12
    for one, eight in zip(*map(jax.tree.leaves, moved), strict=True):
        # Adam makes whole steps of gradients that are rounding, as those of keys' biases are.
        if one.ndim == 2:
            assert np.abs(one - eight).max() < 0.05 * np.abs(one).max()


def test_tokens_decay_and_biases_and_norms_do_not(run: Run) -> None:
    groups = parameter_groups(run.params, Experiment.of(run.sections).optimizer)
    decayed = {path for path, group in groups.items() if group.decayed}
    assert decayed == {
        path
        for path in groups
        if path.endswith("/kernel") or path.rpartition("/")[2] in ("class_token", "mask_token")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.crop_area_rates": None}, "pre-training takes crops of images"),
        ({"task": "colour"}, "config.task is 'colour'; there are segment, reconstruct"),
        ({"model.variant": "mobile_sam"}, "model.encoder"),
    ],
)
def test_configs_that_make_no_sense_are_refused(
    images: Path, changes: dict[str, Any], message: str
) -> None:
    config = sections(images)
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value
    with pytest.raises(ConfigError, match=message):
        Experiment.of(config)


def test_segmentation_is_not_trained_on_images_without_masks() -> None:
    config = read_config(SEGMENT_CONFIG)
    config["data"]["crop_area_rates"] = (0.2, 1.0)
    with pytest.raises(ConfigError, match="examples without masks"):
        Experiment.of(config)


def test_pre_training_on_two_channels(run: Run, tmp_path: Path) -> None:
    """From weights of RGB, with an evaluation, and back from its own checkpoint."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(3):
        image = rng.normal(500, 100, (2, 40 + number, 50)).astype(np.float32)
        np.save(tmp_path / "images" / f"{number}.npy", image)
    changes = {
        "model.in_channels": 2,
        "model.pixel_mean": (500.0, 500.0),
        "model.pixel_std": (100.0, 100.0),
        "train.num_steps": 2,
        "train.init_from": str(run.folder),
        "data.batch_size": 2,
    }
    config = sections(tmp_path / "images", **changes)
    experiment = Experiment.of(config)
    assert experiment.task.batch_spec(2)["image"].shape == (2, 32, 32, 2)
    data = train_iterator(experiment.data)
    workdir = tmp_path / "two"
    loop.train(
        workdir=workdir,
        compiled_step=experiment.compiled_step(jax.devices()[:1]),
        config=experiment.train,
        batch_size=2,
        data_iterator=data,
        checkpoint_config=CheckpointConfig(),
        evaluators=build_evaluators(config["evals"], experiment.task.model),
        sections=config,
    )
    data.close()
    assert list((workdir / "pictures").rglob("*.png"))
    model, variables, _ = model_of(config, str(workdir), step=None, ema=True)
    assert isinstance(model, MaskedAutoencoder)
    assert model.channels.in_chans == 2
    report = build_evaluators(config["evals"], model)["val"](variables)
    assert 0 < report.as_flat_dict()["mean/loss"] < 10
    other = MaskedAutoencoder(model.encoder, model.config)
    assert run_differences(workdir, other) == ["in_channels is 2, expected None (8-bit RGB)"]
    # Written under MAE's names, it comes back with its channels.
    convert(workdir, tmp_path / "mae.safetensors", "mae")
    assert read_tensors(tmp_path / "mae.safetensors")["patch_embed.proj.weight"].shape[1] == 2
    jax.tree.map(
        np.testing.assert_array_equal,
        autoencoder_variables_for(model, tmp_path / "mae.safetensors")["params"],
        variables["params"],
    )


def test_names_with_brackets_are_printed_as_they_are() -> None:
    losses = {"cells [/old]/loss": 0.5, "cells [a]/loss": 0.25, "mean/loss": 0.375}
    numbers = {"cells [/old]": 2, "cells [a]": 1}
    console = Console(width=100, record=True)
    ReconstructionReport(losses, numbers, Tally(), {}, 0.0).print_table(console)
    text = console.export_text()
    assert "cells [a]" in text
    assert "cells [/old]" in text
