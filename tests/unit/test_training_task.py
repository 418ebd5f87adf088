"""Any task trains in the same loop: a toy one, whose model is a number for each channel."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.checkpoint import CheckpointConfig, restore_variables
from sam_jax.run_report import read_run
from sam_jax.sharding import ShardingConfig
from sam_jax.training import loop
from sam_jax.training.compiled_step import CompiledStep, compile_step
from sam_jax.training.experiment import TrainConfig
from sam_jax.training.optimizer import OptimizerConfig
from sam_jax.training.task import Task, task_shapes

COLOR = np.array([0.2, 0.5, 0.9], np.float32)


class MeanColor:
    """Learns the mean colour of images."""

    unit, dtype, remat = "pixels", jnp.float32, "none"

    def init(self, key: Any) -> dict[str, Any]:
        return {"params": {"color": jax.random.normal(key, (3,))}, "constants": {}}

    def load(self, path: str, key: Any) -> dict[str, Any]:
        raise AssertionError("nothing to load")

    def differences(self, run: Path) -> list[str]:
        return []

    def evaluated(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        return dict(variables)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"pixels": jax.ShapeDtypeStruct((batch_size, 4, 4, 3), np.float32)}

    def count(self, batch: Mapping[str, Any]) -> Any:
        return jnp.float32(batch["pixels"].size / 3)

    def loss_sums(self, parallel: Any, param_specs: Any) -> Any:
        def sums(params: Any, constants: Any, batch: Mapping[str, Any], key: Any) -> Any:
            loss = jnp.sum(jnp.square(batch["pixels"] - params["color"]))
            return loss, {"loss": loss}

        return sums

    def headline(self, means: Mapping[str, float]) -> str:
        return f"error {means['loss']:.3f}"

    def flops(self, batch_size: int, trained: Any) -> float:
        return 0.0


class Pixels(grain.DatasetIterator):
    """Images around one colour; its position can be saved and restored."""

    def __init__(self) -> None:
        super().__init__()
        self.position = 0

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.position)
        self.position += 1
        noise = 0.01 * rng.standard_normal((8, 4, 4, 3)).astype(np.float32)
        return {"pixels": COLOR + noise}

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]

    def set_states(self, states: list[Mapping[str, int]]) -> None:
        self.set_state(states[0])


def toy_step(task: Task, num_steps: int) -> CompiledStep:
    return compile_step(
        task,
        num_steps=num_steps,
        seed=0,
        ema_decay=0.0,
        optimizer_config=OptimizerConfig(peak_learning_rate=0.1, warmup_steps=1),
        sharding_config=ShardingConfig(data=1),
        devices=jax.devices()[:1],
    )


def test_a_toy_task_trains_reports_and_continues(tmp_path: Path, capsys: Any) -> None:
    task: Task = MeanColor()
    assert isinstance(task, Task)

    def train(num_steps: int) -> None:
        loop.train(
            workdir=tmp_path / "run",
            compiled_step=toy_step(task, num_steps),
            config=TrainConfig(num_steps, log_every=10, eval_every=0),
            batch_size=8,
            data_iterator=Pixels(),
            checkpoint_config=CheckpointConfig(every_steps=10),
            evaluators={},
            sections={"what": "a toy"},
        )

    train(20)
    (tmp_path / "run" / "checkpoints" / "20" / "model" / "_METADATA").unlink()
    train(100)
    said = " ".join(capsys.readouterr().err.split())
    assert "the checkpoint of step 20 is damaged: model/_METADATA is missing" in said
    assert "continuing from the checkpoint of step 10" in said
    assert "the damaged checkpoint of step 20 is now " in said
    assert (tmp_path / "run" / "checkpoints_damaged" / "20").is_dir()
    assert "error 0.0" in said
    assert "pixels/s" in said
    color = restore_variables(tmp_path / "run")["params"]["color"]
    np.testing.assert_allclose(color, COLOR, atol=0.05)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"what": "a toy"}
    starts = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(start)["after_step"] for start in starts] == [0, 10]
    assert json.loads(starts[0])["versions"]["jax"] == jax.__version__
    assert (tmp_path / "run" / "parameters.txt").read_text().startswith("color  (3,)")
    # Both wrote steps 11 to 20; the later holds.
    found = read_run(tmp_path / "run")
    assert list(found.metrics["train/loss"]) == list(range(10, 101, 10))
    assert found.damaged == ["20"]


@dataclasses.dataclass(frozen=True)
class Sized(MeanColor):
    """A task that says all of itself in its text."""

    size: int = 3

    def init(self, key: Any) -> dict[str, Any]:
        TRACED.append(self.size)
        return {"params": {"color": jnp.zeros(self.size)}, "constants": {}}


TRACED: list[int] = []


def test_a_task_s_variables_are_traced_once() -> None:
    shapes = [task_shapes(Sized(size)) for size in (3, 5, 3)]
    assert TRACED == [3, 5]
    assert [tree["params"]["color"].shape for tree in shapes] == [(3,), (5,), (3,)]
    # Nobody changes another's.
    shapes[0]["params"].clear()
    assert task_shapes(Sized(3)) == shapes[2]
    # What is no dataclass may be another object with the same text.
    assert task_shapes(MeanColor())["params"]["color"].shape == (3,)
