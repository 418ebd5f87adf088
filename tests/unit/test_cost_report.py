"""Plans: exact where they can be, and honest about the rest."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jax.experimental import topologies
from typer.testing import CliRunner

from sam_jax import cost_report as planning
from sam_jax import hlo
from sam_jax.cli import app
from sam_jax.errors import ConfigError
from sam_jax.sharding import ShardingConfig, make_mesh
from sam_jax.training.experiment import Experiment, read_config
from tests.e2e.tiny_run import ONE_LAYER, ONE_ROUND

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "tests" / "e2e" / "tiny_run.py")
SMALL = (*ONE_ROUND, *ONE_LAYER)

needs_compiler = pytest.mark.usefixtures("tpu_compiler")


def example(**changes: Any) -> planning.Plan:
    memory = planning.Memory(
        params=100,
        ema=0,
        optimizer=200,
        constants=0,
        batch=10,
        working=490,
        program=0,
        available=1000.0,
    )
    made = planning.Plan(
        topology="v5e:4x4",
        num_devices=16,
        mesh={"data": 4, "fsdp": 4, "tensor": 1},
        batch_size=16,
        remat="none",
        memory=memory,
        work_flops=2e12,
        moved_bytes=1e9,
        collectives=(),
        part_seconds={"image encoder": 0.3, "mask decoder": 0.1},
        roofline_seconds=0.2,
        transfer_seconds=0.1,
        num_steps=9000,
        compile_seconds=1.0,
    )
    return dataclasses.replace(made, **changes)


def test_what_follows_from_the_numbers() -> None:
    made = example()
    assert made.memory.total == 800
    assert made.memory.fits
    assert made.step_seconds == pytest.approx((0.4, 0.5))
    assert made.run_hours == pytest.approx((1.0, 1.25))
    assert made.mfu == pytest.approx((0.4, 0.5))
    # 300 bytes of state and 500 for an image; a second image has 200 left, and wants 500.
    assert planning.largest_batch(made) == 16
    # All 1,200 bytes of the state beside 500 need 1,700; in three quarters less it is 1,000.
    assert planning.fewest_devices(made) == 4


def test_more_memory_takes_more_images_and_fewer_devices() -> None:
    roomy = example(memory=dataclasses.replace(example().memory, available=2000.0))
    assert planning.largest_batch(roomy) == 16 * 3
    assert planning.fewest_devices(roomy) == 1


def test_an_average_is_divided_with_the_parameters() -> None:
    made = example(memory=dataclasses.replace(example().memory, params=50, ema=50))
    assert made.memory.total == 800
    assert planning.fewest_devices(made) == 4


def test_a_kernel_takes_what_its_instructions_take_or_its_memory() -> None:
    """Loops by their trips, beside what the compiler counts; a v6e's cores are others."""

    def kernel(moved_bytes: int) -> hlo.Instruction:
        return hlo.Instruction(
            kind="custom-call",
            result="",
            source="jit(step)/rounds/mask_decoder/jvp(predict_masks)/pallas_call",
            trips=11,
            cycles=0,
            moved_bytes=moved_bytes,
            text='"tpu_custom_call", {"cost_estimate":{"flops":"1000000000"}}',
        )

    fusion = hlo.Instruction(
        "fusion", "", "jit(step)/image_encoder/add", 2, 1_500_000, 10**12, "fusion"
    )
    v5e, v6e = planning.CHIPS["v5e"], planning.CHIPS["v6e"]
    found = planning.part_seconds([kernel(0), fusion], v5e)
    assert found is not None
    assert found["image encoder"] == pytest.approx(2 * 1e-3)
    assert found.keys() == {"image encoder", "mask decoder"}
    rates = planning.KERNEL_PEAK_RATES["predict_masks"]
    assert found["mask decoder"] == pytest.approx(11 * 1e9 / (rates[0] * 197e12))
    newer = planning.part_seconds([kernel(0)], v6e)
    assert newer is not None
    assert newer["mask decoder"] == pytest.approx(11 * 1e9 / (rates[1] * 918e12))
    bound = planning.part_seconds([kernel(819 * 10**6)], v5e)
    assert bound is not None
    assert bound["mask decoder"] == pytest.approx(11 * 1e-3)


def test_what_is_not_known_is_not_made_up() -> None:
    memory = dataclasses.replace(example().memory, available=None)
    made = example(memory=memory, part_seconds=None, transfer_seconds=None)
    assert made.memory.fits is None
    assert planning.largest_batch(made) is None
    assert planning.fewest_devices(made) is None
    assert made.as_dict()["run_hours"] is None


def test_a_plan_for_this_machine(tmp_path: Path) -> None:
    """Parameters, moments and batch to the byte, through the command line."""
    out = tmp_path / "plan.json"
    averaged = (*SMALL, "train.ema_decay=0.99")
    settings = [part for text in averaged for part in ("--set", text)]
    result = CliRunner().invoke(app, ["plan", "--config", CONFIG, *settings, "--json", str(out)])
    assert result.exit_code == 0, result.output
    (made,) = json.loads(out.read_text())
    program = Experiment.of(read_config(CONFIG, SMALL)).compiled_step()
    num_params = sum(leaf.size for leaf in _leaves(program.state_shapes.params))
    memory = made["memory"]
    # Devices that split nothing hold everything.
    assert memory["params"] == memory["ema"] == 4 * num_params
    # Two moments and two counters of steps.
    assert memory["optimizer"] == 8 * num_params + 8
    image, masks = 32 * 48 * 3, 2 * 32 * 48 // 8
    assert memory["batch"] == 8 // made["mesh"]["data"] * (image + masks + 8 + 2)
    assert memory["working"] > 0
    assert made["num_steps"] == 10
    assert "parameters, per device" in result.output


def _leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    experiment = Experiment.of(read_config(CONFIG, ["sharding.data=8"]))
    with pytest.raises(ConfigError, match="a batch of 12 images does not divide by 8 devices"):
        planning.plan(experiment, batch_size=12)


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "gpu:8"])
def test_a_topology_that_does_not_exist_is_named(topology: str) -> None:
    with pytest.raises(planning.TopologyError, match=rf"{topology}: expected 'local'"):
        planning.devices_of(topology)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is installed"
)
def test_without_the_compiler_it_says_what_to_install() -> None:
    # By itself: other tests of this process may have found a compiler that is not installed.
    program = "from sam_jax.cost_report import devices_of; devices_of('v5e:4x4')"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "TopologyError" in ended.stderr
    assert "pip install 'sam-jax[tpu]'" in ended.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("topology", "fsdp"), [("v5e:16x16", 16), ("v5p:4x4x4", 8), ("v5p:4x4x4", 16), ("v6e:4x4", 2)]
)
def test_groups_of_any_size_fit_into_a_slice(topology: str, fsdp: int) -> None:
    devices, _ = planning.devices_of(topology)
    mesh = make_mesh(ShardingConfig(fsdp=fsdp), devices)
    assert mesh.shape == {"data": len(devices) // fsdp, "fsdp": fsdp, "tensor": 1}


@needs_compiler
def test_slices_share_no_weights() -> None:
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:4x4", num_slices=2
    ).devices
    mesh = make_mesh(ShardingConfig(fsdp=4), devices)
    assert mesh.shape == {"data": 8, "fsdp": 4, "tensor": 1}
    for group in mesh.devices.reshape(8, 4):
        assert len({device.slice_index for device in group}) == 1
    with pytest.raises(ConfigError, match="2 slices"):
        make_mesh(ShardingConfig(fsdp=32), devices)


@needs_compiler
@pytest.mark.slow
def test_a_plan_for_a_tpu() -> None:
    """A tiny model, but the real compiler, kernels and slices."""
    settings = [
        *SMALL,
        "model.dtype=bfloat16",
        "model.image_size=(128, 128)",
        "model.encoder.embed_dim=128",
        "sharding.fsdp=4",
        "data.batch_size=16",
    ]
    made = planning.plan(Experiment.of(read_config(CONFIG, settings)), "v5e:4x4")
    assert made.mesh == {"data": 4, "fsdp": 4, "tensor": 1}
    assert made.memory.fits
    assert made.compute_seconds is not None
    assert made.compute_seconds > made.roofline_seconds > 0
    assert all(seconds > 0 for seconds in made.part_seconds.values())
    assert {c.kind for c in made.collectives} >= {"all-gather", "all-reduce"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.py"], "nowhere.py: there is no such file"),
        (["--config", CONFIG, "--set", "model.varian=vit_b"], "varian"),
        (["--config", CONFIG, "--set", "model.remat"], "expected SECTION.KEY=VALUE"),
        (["--config", CONFIG, "--remat", "some"], "remat"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code != 0
    assert message in str(result.exception) + result.output
