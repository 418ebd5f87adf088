"""What a step is found to suffer from, of the real tasks."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.training.compiled_step import CompiledStep
from sam_jax.training.diagnosis import diagnose
from sam_jax.training.experiment import Experiment, read_config
from sam_jax.training.task import ItemizedTask
from tests.e2e.tiny_run import ONE_LAYER, ONE_ROUND
from tests.unit.test_training_task import MeanColor, Pixels, toy_step

CONFIGS = Path(__file__).parents[1] / "e2e"
# Values as they are stored, which may be infinite.
FLOATS = (
    "model.in_channels=3",
    "model.pixel_mean=(0.0,0.0,0.0)",
    "model.pixel_std=(1.0,1.0,1.0)",
    "data.batch_size=4",
)
SEGMENT = (*ONE_ROUND, *ONE_LAYER, "prompts.num_corrections=1", "train.remat_rounds=False")
NAMES = [f"photo_{number}.jpg" for number in range(4)]


def program_of(config: str, *settings: str) -> CompiledStep:
    experiment = Experiment.of(read_config(str(CONFIGS / config), [*FLOATS, *settings]))
    assert isinstance(experiment.task, ItemizedTask)
    return experiment.compiled_step(jax.devices()[:2])


def found(program: CompiledStep, batch: dict[str, np.ndarray]) -> list[str]:
    shapes = {"params": program.state_shapes.params, "constants": program.state_shapes.constants}
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: np.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), shapes
    )
    return diagnose(program, program.state_from(variables), 1, batch, NAMES)


def spoiled(program: CompiledStep) -> dict[str, np.ndarray]:
    """A batch with one pixel that is infinite, in its third image."""
    rng = np.random.default_rng(0)
    batch = {
        name: np.ones((4, *field.shape[1:]), field.dtype)
        for name, field in program.task.batch_spec(4).items()
    }
    batch["image"] = rng.standard_normal(batch["image"].shape).astype(np.float32)
    batch["image"][2, 5, 9, 1] = np.inf
    return batch


def test_a_bad_image_of_pre_training_is_named() -> None:
    program = program_of("tiny_pretraining.py", *ONE_LAYER)
    assert found(program, spoiled(program)) == [
        "the loss of 1 of 4 images is not finite:",
        "  photo_2.jpg: loss",
    ]


def test_a_bad_image_of_segmentation_is_named_with_rounds_and_parts() -> None:
    program = program_of("tiny_run.py", *SEGMENT)
    batch = spoiled(program)
    batch["image_hw"][:] = batch["image"].shape[1:3]
    assert found(program, batch) == [
        "the loss of 1 of 4 images is not finite (2 rounds):",
        "  photo_2.jpg: dice in round 1 to 2, focal in round 1 to 2, iou_mse in round 1 to 2",
    ]


class Told(MeanColor):
    """A task whose sums are what a function makes of the loss."""

    def __init__(self, change: Callable[[Any], Any]):
        self.change = change

    def loss_sums(self, parallel: Any, param_specs: Any) -> Any:
        of_parts = super().loss_sums(parallel, param_specs)

        def sums(*arguments: Any) -> Any:
            loss, _ = of_parts(*arguments)
            return self.change(loss), {"loss": self.change(loss)}

        return sums


class Itemized(Told):
    """One that can tell its parts, which are finite."""

    def loss_parts(self, parallel: Any, param_specs: Any) -> Any:
        return lambda params, constants, batch, key: {"loss": jnp.zeros((1, 8, 1))}


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (
            Told(lambda x: x * jnp.nan),
            r"this task does not tell .*; nor is its gradient, by color: 3 of 3",
        ),
        (Itemized(lambda x: x + jnp.inf), "the loss is not finite, though .*; its gradient is$"),
        (Told(lambda x: x * 1e35), "the loss and each gradient are finite; the gradients' norm"),
        (Told(lambda x: x), "computed again, all of it is finite"),
    ],
)
def test_what_is_not_finite_is_not_said_to_be(task: Any, expected: str) -> None:
    program = toy_step(task, 3)
    lines = diagnose(program, program.new_state(jax.random.key(0)), 1, next(Pixels()), ["a"] * 8)
    assert re.search(expected, " ".join(" ".join(lines).split()))
