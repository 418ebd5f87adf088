"""What version 30490e0 wrote: its configs' keys, and a run that goes on where it stopped.

`tests/golden/first_run.tar.xz` is the folder of a run of two steps of four, a block and a decoder's
layer, without its TensorBoard files; what its steps 3 and 4 logged there stands below.
"""

import dataclasses
import json
import tarfile
from pathlib import Path

import jax
import pytest

from configs import common
from sam_jax.checkpoint import CheckpointConfig
from sam_jax.training import loop
from sam_jax.training.experiment import Experiment

SECTIONS = common.SECTIONS | common.TASK_SECTIONS["segment"]
GOLDEN = Path(__file__).parents[1] / "golden"
# Losses, and the norm of the gradients, by step.
LOSSES = {3: 3.2959165573120117, 4: 3.097714424133301}
GRADIENT_NORMS = {3: 6.100912570953369, 4: 4.717310428619385}


def test_every_key_of_a_config_is_still_one() -> None:
    """Of what the recipes set; evaluations had names of the user's."""
    sections = common.SECTIONS | common.TASK_SECTIONS["segment"]
    known = {
        f"{name}.{field.name}"
        for name, cls in sections.items()
        for field in dataclasses.fields(cls)
    }
    keys = (GOLDEN / "first_config_keys.txt").read_text().split()
    assert len(keys) > 50
    assert {key for key in keys if not key.startswith("evals.")} <= known


def test_a_run_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    with tarfile.open(GOLDEN / "first_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    workdir = tmp_path / "run"
    # A config file fills in the sections that it says nothing of.
    sections: dict = {name: {} for name in SECTIONS} | json.loads(
        (workdir / "config.json").read_text()
    )
    experiment = Experiment.of(sections)
    data = experiment.data_iterator(0, 1)
    try:
        state = loop.train(
            workdir=workdir,
            compiled_step=experiment.compiled_step(jax.devices()[:1]),
            config=experiment.train,
            batch_size=experiment.data.batch_size,
            data_iterator=data,
            checkpoint_config=CheckpointConfig(every_steps=100),
            evaluators={},
        )
    finally:
        data.close()
    assert int(state.step) == 4
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if "train/loss" in line}
    assert set(found) == set(LOSSES)
    for step, line in found.items():
        assert line["train/loss"] == pytest.approx(LOSSES[step], rel=1e-5)
        assert line["train/gradient_norm"] == pytest.approx(GRADIENT_NORMS[step], rel=1e-4)
