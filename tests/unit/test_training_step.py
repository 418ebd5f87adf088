"""One step of a run of one round, without chance: in parts, and on parts that do not divide."""

from pathlib import Path

import jax
import numpy as np
import pytest

from sam_jax.configuration import from_mapping
from sam_jax.data.pipeline import train_iterator
from sam_jax.errors import ConfigError
from sam_jax.parallel import Parallel
from sam_jax.training.compiled_step import CompiledStep
from sam_jax.training.experiment import Experiment, read_config
from sam_jax.training.optimizer import OptimizerConfig
from sam_jax.training.state import TrainState
from tests.e2e.tiny_run import ONE_LAYER, ONE_ROUND
from tests.golden.tiny import random_variables

CONFIG = str(Path(__file__).parents[1] / "e2e" / "tiny_run.py")
# A box without noise is the only prompt, nothing is dropped, and one step moves the parameters.
WITHOUT_CHANCE = (
    "prompts.box_rate=1.0",
    "prompts.box_noise_rate=0.0",
    *ONE_ROUND,
    *ONE_LAYER,
    "model.drop_path_rate=0.0",
    "model.decoder.dropout_rate=0.0",
    "optimizer.warmup_steps=0",
    "train.remat_rounds=False",
)


def recipe_of(*settings: str) -> Experiment:
    return Experiment.of(read_config(CONFIG, [*WITHOUT_CHANCE, *settings]))


def one_step(num_parts: int, num_devices: int) -> tuple[TrainState, dict[str, float]]:
    recipe = recipe_of(f"optimizer.accumulate_steps={num_parts}")
    program = recipe.compiled_step(jax.devices()[:num_devices])
    data = train_iterator(recipe.data)
    fields = next(data)
    data.close()
    fields = {name: np.array(fields[name]) for name in program.task.batch_spec(1)}
    # Images with two masks, one and none, so that a mean of the parts' means would be another.
    fields["mask_valid"] = (
        np.array([[1, 1], [1, 1], [1, 1], [0, 0], [1, 0], [0, 0], [1, 0], [0, 0]]) > 0
    )
    state = program.state_from(random_variables(program.task.model.config))
    state, metrics = program.step(state, jax.device_put(fields, program.batch_sharding))
    return state, {name: float(value) for name, value in metrics.items()}


def test_parts_sum_to_the_whole() -> None:
    state, metrics = one_step(num_parts=1, num_devices=1)
    in_parts, found = one_step(num_parts=2, num_devices=2)
    assert found == pytest.approx(metrics, rel=1e-4)
    assert found["num_masks"] == 8
    # First moments are the gradients, up to a factor; some are zero but for rounding.
    ours, theirs = (
        [np.asarray(moments) for moments in jax.tree.leaves(of.opt_state[1].mu)]
        for of in (in_parts, state)
    )
    largest = max(float(abs(moments).max()) for moments in theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * largest)


def test_losses_by_part_sum_to_what_is_reported() -> None:
    recipe = recipe_of("prompts.num_corrections=1")
    task, data = recipe.task, train_iterator(recipe.data)
    batch = {name: np.array(value) for name, value in next(data).items()}
    data.close()
    fields = {name: batch[name] for name in task.batch_spec(1)}
    fields["mask_valid"][3] = False
    variables = random_variables(task.model.config)
    arguments = (variables["params"], variables["constants"], fields, jax.random.key(0))
    both = jax.jit(
        lambda *a: (task.loss_parts(Parallel(), None)(*a), task.loss_sums(Parallel(), None)(*a))
    )
    parts, (loss, sums) = both(*arguments)
    assert parts.keys() == {"focal", "dice", "iou_mse"}
    for name, part in parts.items():
        assert part.shape == (2, 8, 2)
        assert not np.any(part[:, 3])
        np.testing.assert_allclose(part.sum(), sums[name], rtol=1e-5)
    weighted = 20 * parts["focal"] + parts["dice"] + parts["iou_mse"]
    np.testing.assert_allclose(weighted.sum(), loss, rtol=1e-5)


@pytest.mark.parametrize(("num_parts", "num_devices"), [(3, 1), (2, 8), (16, 1)])
def test_parts_that_do_not_divide_a_device_s_images_are_refused(
    num_parts: int, num_devices: int
) -> None:
    recipe = recipe_of(f"optimizer.accumulate_steps={num_parts}")
    program: CompiledStep = recipe.compiled_step(jax.devices()[:num_devices])
    with pytest.raises(
        ConfigError,
        match=rf"accumulate_steps = {num_parts} does not divide .* {8 // num_devices} images",
    ):
        program.step.lower(program.placed_state, program.placed_batch(8))


@pytest.mark.parametrize("num_parts", [0, -2])
def test_a_number_of_parts_that_is_none_is_refused(num_parts: int) -> None:
    with pytest.raises(ConfigError, match="accumulate_steps must be at least 1, got"):
        from_mapping(OptimizerConfig, {"accumulate_steps": num_parts}, "optimizer")
