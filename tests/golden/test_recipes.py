"""Every config builds, and the paper's recipes are pinned down to each parameter.

``SAM_JAX_UPDATE_GOLDEN=1 python -m pytest tests/golden/test_recipes.py`` writes the file again.
"""

import importlib
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from sam_jax.configuration import from_mapping
from sam_jax.evaluation.kinds import DEFAULT_KIND, KINDS
from sam_jax.model_config import ModelConfig
from sam_jax.models.masked_autoencoder import AutoencoderConfig, MaskedAutoencoder
from sam_jax.parallel import Parallel
from sam_jax.sharding import MESH_AXES, ShardingConfig, tree_shardings
from sam_jax.simulated_user import PromptConfig
from sam_jax.training.experiment import Experiment
from sam_jax.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    learning_rate_schedule,
    parameter_groups,
)
from sam_jax.training.state import init_state
from sam_jax.training.step import build_train_step
from tests.golden.tables import assert_unchanged, folded

FOLDER = Path(__file__).parent
CONFIGS = FOLDER.parents[1] / "configs"
FRAGMENTS = {"command_line", "common", "mae_recipe", "sam_recipe", "small_recipe"}
# What trains from nothing: configs of evaluations and of fine-tuning have tests of their own.
RECIPES = sorted(
    path.stem
    for path in CONFIGS.glob("*.py")
    if path.stem not in FRAGMENTS and not path.stem.startswith(("eval_", "finetune_"))
)
# One of each encoder and task: the others' programs differ from theirs in sizes and numbers alone.
DIFFERENTIATED = {
    "sam_vit_h",
    "mobile_sam",
    "small_coco",
    "mae_vit_h",
    "mae_tiny",
}
# Variants of ViT-H's recipes: sizes that the models' own tests have, the same options.
OTHER_SIZES = {"sam_vit_b", "sam_vit_l", "mae_vit_b", "mae_vit_l"}
PAPER = ("sam_vit_b", "sam_vit_l", "sam_vit_h", "mae_vit_b", "mae_vit_l", "mae_vit_h")


@pytest.fixture
def config(request: pytest.FixtureRequest, tmp_path: Path) -> ConfigDict:
    name = request.param
    get_config = importlib.import_module(f"configs.{name}").get_config
    if name == "mae_tiny":
        return get_config("train:val")
    if name not in ("small_coco", "small_folder", "mobile_sam"):
        return get_config()
    (tmp_path / "birds").mkdir()
    for split in ("train", "val"):
        (tmp_path / "birds" / f"{split}.json").write_text("{}")
    return get_config(str(tmp_path))


def abstract_state(sections: dict[str, Any]) -> tuple[Experiment, Any, Any]:
    experiment = Experiment.of(sections)
    variables = jax.eval_shape(lambda: experiment.task.init(jax.random.key(0)))
    optimizer = build_optimizer(
        variables["params"], experiment.optimizer, experiment.train.num_steps
    )
    return experiment, optimizer, jax.eval_shape(lambda v: init_state(v, optimizer), variables)


def axes_text(axes: Any) -> str:
    return "+".join(axes) if isinstance(axes, tuple) else str(axes)


@pytest.mark.parametrize("config", RECIPES, indirect=True)
def test_every_recipe_builds_its_train_step(
    config: ConfigDict, request: pytest.FixtureRequest
) -> None:
    """Its evaluations and its update; loss and gradient of one recipe of each kind."""
    sections = config.to_dict()
    # Blocks are of two kinds, with windows and without; two hold both, and are traced sooner.
    if sections["model"]["variant"] != "mobile_sam":
        sections["model"]["encoder"] |= {"depth": 2, "global_attention_blocks": (1,)}
    experiment, optimizer, state = abstract_state(sections)
    for name, section in sections["evals"].items():
        options = dict(section)
        kind = KINDS[options.pop("kind", DEFAULT_KIND)]
        from_mapping(kind.config, options, f"evals.{name}")
        assert isinstance(experiment.task.model, kind.model)
    task, batch = experiment.task, experiment.task.batch_spec(2)
    if request.node.callspec.params["config"] in DIFFERENTIATED:
        step = build_train_step(task, optimizer, seed=experiment.train.seed)
        new_state, metrics = jax.eval_shape(step, state, batch)
        assert shapes(new_state) == shapes(state)
        assert metrics["loss"].dtype == np.float32
        return
    if request.node.callspec.params["config"] not in OTHER_SIZES:
        loss_sums = task.loss_sums(Parallel(), None)
        key = jax.eval_shape(lambda: jax.random.key(0))
        loss, sums = jax.eval_shape(loss_sums, state.params, state.constants, batch, key)
        assert (loss.shape, loss.dtype) == ((), np.float32)
        assert "loss" in sums
    # Gradients have the parameters' shapes.
    updates, opt_state = jax.eval_shape(
        optimizer.update, state.params, state.opt_state, state.params
    )
    assert shapes(updates) == shapes(state.params)
    assert shapes(opt_state) == shapes(state.opt_state)


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_sharding_and_optimizer_group_of_every_parameter() -> None:
    """A line for each kind of parameter: path, shape, mesh axes, layer, decay; then the rates.

    The layer of a block's parameters counts from the block's own number n, that of others from the
    one after all blocks.
    """
    tables = {}
    for name in PAPER:
        sections = importlib.import_module(f"configs.{name}").get_config().to_dict()
        sharding = from_mapping(ShardingConfig, sections["sharding"], "sharding")
        _, _, state = abstract_state(sections)
        mesh = AbstractMesh((16, sharding.fsdp, sharding.tensor), MESH_AXES)
        shardings = tree_shardings(state, mesh, sharding)
        groups = parameter_groups(
            state.params, from_mapping(OptimizerConfig, sections["optimizer"], "optimizer")
        )
        # The optimizer's moments lie where their parameters do.
        moments = shardings.opt_state[1]
        assert moments.mu == shardings.params == moments.nu

        leaves, specs = flatten_dict(state.params, sep="/"), flatten_dict(shardings.params, sep="/")
        last_layer = max(group.layer for group in groups.values())
        facts = {}
        for path, group in groups.items():
            axes = ",".join(axes_text(axis) for axis in specs[path].spec) or "-"
            shape = "x".join(map(str, leaves[path].shape))
            # Those of a masked autoencoder's decoder come after all of the encoder.
            block = re.search(r"image_encoder/block_(\d+)", path)
            start, origin = ("n", int(block[1])) if block else ("last", last_layer)
            layer = f"{start}{group.layer - origin:+d}"
            decay = "decayed" if group.decayed else "not decayed"
            facts[path] = f"{shape} {axes} {layer} {decay}"
        rates = {(group.layer, f"{group.rate_scale:.4g}") for group in groups.values()}
        tables[name] = folded(facts) + [f"layer {layer} {rate}" for layer, rate in sorted(rates)]
    assert_unchanged(FOLDER / "recipes.txt", tables)


@pytest.mark.parametrize("config", ["sam_vit_h_stage3"], indirect=True)
def test_the_model_of_automatic_masks_is_the_paper_s(config: ConfigDict) -> None:
    model = from_mapping(ModelConfig, config.model.to_dict(), "model").sam
    assert (model.mask_decoder.depth, model.image_encoder.depth) == (3, 32)
    prompts = from_mapping(PromptConfig, config.prompts.to_dict(), "prompts")
    assert (prompts.box_rate, prompts.num_points) == (0.0, 4)
    assert (config.train.num_steps, config.data.scale_jitter) == (177_656, (0.1, 2.0))


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ("sam_vit_b", (128, 180_000, 8e-4, 0.6, 0.6, (120_000, 173_332))),
        ("sam_vit_l", (128, 180_000, 4e-4, 0.8, 0.4, (120_000, 173_332))),
        ("sam_vit_h", (256, 90_000, 8e-4, 0.8, 0.4, (60_000, 86_666))),
    ],
    indirect=["config"],
)
def test_the_recipes_of_the_three_sizes(config: ConfigDict, facts: tuple) -> None:
    """The paper's figures, but for where the rates of ViT-B and ViT-L fall: scaled from ViT-H's."""
    batch_size, num_steps, rate, layer_decay, drop_path, boundaries = facts
    assert config.data.batch_size == batch_size
    assert config.train.num_steps == num_steps
    assert config.optimizer.layer_decay == layer_decay
    assert config.model.drop_path_rate == drop_path
    optimizer = from_mapping(OptimizerConfig, config.optimizer.to_dict(), "optimizer")
    assert tuple(optimizer.step_boundaries) == boundaries
    schedule = learning_rate_schedule(optimizer, num_steps)
    assert schedule(boundaries[0] - 1) == pytest.approx(rate)
    assert schedule(num_steps - 1) == pytest.approx(rate / 100)
    prompts = from_mapping(PromptConfig, config.prompts.to_dict(), "prompts")
    assert prompts == PromptConfig()
    assert prompts.num_rounds == 11
    assert config.data.max_masks == 64


@pytest.mark.parametrize("config", ["mae_vit_b", "mae_vit_l", "mae_vit_h"], indirect=True)
def test_pre_training_says_what_its_paper_says(config: ConfigDict) -> None:
    """Table 8 of He et al. 2022, and the published command."""
    steps_per_epoch = 1_281_167 // 4096
    assert config.data.batch_size == 4096
    assert tuple(config.data.crop_area_rates) == (0.2, 1.0)
    assert (config.data.color_jitter, config.data.hflip_rate) == (0.0, 0.5)
    assert config.train.num_steps == 800 * steps_per_epoch
    optimizer = from_mapping(OptimizerConfig, config.optimizer.to_dict(), "optimizer")
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.05)
    assert (optimizer.layer_decay, optimizer.clip_norm) == (1.0, None)
    schedule = learning_rate_schedule(optimizer, config.train.num_steps)
    warmup, peak = 40 * steps_per_epoch, 1.5e-4 * 4096 / 256
    # Half of a cosine, down to nothing.
    middle = (warmup + config.train.num_steps) // 2
    expected = {warmup // 2: peak / 2, warmup: peak, middle: peak / 2, config.train.num_steps: 0}
    assert {step: float(schedule(step)) for step in expected} == pytest.approx(expected, abs=1e-7)
    model = Experiment.of(config.to_dict()).task.model
    assert isinstance(model, MaskedAutoencoder)
    assert model.config == AutoencoderConfig(0.75, True, 512, 8, 16)
    assert (model.encoder.grid, model.num_dropped) == ((14, 14), 147)
