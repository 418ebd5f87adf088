"""Hand-counted work against other counts, and every benchmark once at a tiny size."""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    attention,
    checkpoint,
    dead_leaves,
    decoder,
    encoder,
    experiment,
    input,
    kernels,
    limits,
    published,
    step,
    table,
)
from benchmarks.random_inputs import random_prompts
from sam_jax import flop_counts
from sam_jax.cost_report import KERNEL_PEAK_RATES
from sam_jax.data import decode_masks
from sam_jax.data.sources.sa1b import Sa1bSource
from sam_jax.losses import LossConfig
from sam_jax.models.image_encoder import ImageEncoderConfig, ImageEncoderViT
from sam_jax.models.lora import LoraConfig
from sam_jax.models.mask_decoder import MaskDecoderConfig
from sam_jax.models.sam import Sam, SamConfig, init_variables
from sam_jax.models.variants import VARIANTS
from sam_jax.simulated_user import PromptConfig
from sam_jax.trained_parameters import select_trained
from sam_jax.training.tasks.segment import SegmentTask
from tests.e2e.tiny_run import ONE_LAYER, ONE_ROUND
from tests.golden.tiny import TINY

CONFIG = Path(__file__).parents[1] / "e2e" / "tiny_run.py"
PRETRAINING = CONFIG.with_name("tiny_pretraining.py")

# Wide enough that products are nearly all of it; its windows need padding, and it is not square.
WIDE = SamConfig(
    ImageEncoderConfig(
        image_size=(128, 96),
        embed_dim=512,
        depth=2,
        num_heads=2,
        global_attention_blocks=(1,),
        window_size=5,
        output_dim=256,
    ),
    MaskDecoderConfig(),
)


@pytest.mark.parametrize(
    ("variant", "tera"), [("vit_b", 0.972), ("vit_l", 2.986), ("vit_h", 5.961)]
)
def test_encoders_at_their_published_sizes(variant: str, tera: float) -> None:
    """Against a count made independently, matrix by matrix, from the published model's shapes."""
    config = VARIANTS[variant].image_encoder
    assert flop_counts.encoder_flops(config) / 1e12 == pytest.approx(tera, rel=1e-3)
    assert flop_counts.encoder_flops(config, useful=True) < flop_counts.encoder_flops(config)


def test_windows_that_divide_the_grid_waste_nothing() -> None:
    config = VARIANTS["vit_ti"].image_encoder
    assert flop_counts.encoder_flops(config, useful=True) == flop_counts.encoder_flops(config)
    assert flop_counts.encoder_flops(config, (264, 256), useful=True) == flop_counts.encoder_flops(
        config
    )


@pytest.mark.parametrize("config", [WIDE, TINY, VARIANTS["vit_b"]])
def test_encoder_is_the_products_in_the_program(config: SamConfig) -> None:
    lowered, products = _trace(*_encode(config.image_encoder))
    assert flop_counts.encoder_flops(config.image_encoder) == products
    if config is not TINY:
        assert lowered == pytest.approx(products, rel=0.04)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("config", [WIDE, TINY])
def test_decoder_is_the_products_in_the_program(config: SamConfig, with_mask: bool) -> None:
    num_prompts, num_points = 3, 2
    decode = _decode(config, num_prompts, num_points, with_mask)
    _, products = _trace(*decode)
    flops = flop_counts.decoder_flops(
        config,
        num_prompts,
        num_points + 1,
        multimask_output=not with_mask,
        with_mask=with_mask,
    )
    # Coordinates times frequencies are products too, of two numbers each.
    positions = 2 * config.image_encoder.output_dim * num_prompts * num_points
    # The mask branch multiplies each sub-pixel with zeros for the three corners it is not in.
    gh, gw = config.image_encoder.grid
    zeros = 2 * num_prompts * gh * gw * 16 * 3 * (config.mask_channels // 4)
    assert flops + positions + with_mask * zeros == products


def test_a_step_is_three_forward_passes() -> None:
    prompts = PromptConfig(num_corrections=2, random_mask_round=False, final_mask_round=True)
    first = flop_counts.decoder_flops(TINY, 5, 3 + 2, multimask_output=True)
    later = flop_counts.decoder_flops(TINY, 5, 3 + 2, multimask_output=False, with_mask=True)
    image = flop_counts.encoder_flops(TINY.image_encoder) + first + 3 * later
    assert flop_counts.step_flops(TINY, prompts, batch_size=4, num_objects=5) == 3 * 4 * image


@pytest.mark.parametrize(
    ("patterns", "lora_rank", "encoder_passes"),
    [
        (("all",), 0, 3),
        (("decoder",), 0, 1),
        (("lora", "decoder"), 2, 2),
        (("block_00/norm",), 0, 2),
    ],
)
def test_frozen_parts_have_no_gradients_of_weights(
    patterns: tuple[str, ...], lora_rank: int, encoder_passes: int
) -> None:
    task = SegmentTask(Sam(TINY), PromptConfig(), LossConfig(), 2, lora=LoraConfig(rank=lora_rank))
    params = jax.eval_shape(task.init, jax.random.key(0))["params"]
    encoder = flop_counts.encoder_flops(TINY.image_encoder, useful=True)

    def passes(trained: Any) -> float:
        """Passes over the encoder, in units of its forward pass."""
        without = dataclasses.replace(task, takes_embeddings=True)
        return (task.flops(1, trained) - without.flops(1, trained)) / encoder

    assert passes(select_trained(params, patterns)) == pytest.approx(encoder_passes, abs=0.3)


def test_objects_share_the_first_layers_view_of_the_image() -> None:
    def flops(num_prompts: int) -> float:
        return flop_counts.decoder_flops(VARIANTS["vit_b"], num_prompts, 2, multimask_output=True)

    shared = 1 - flops(1000) / (1000 * flops(1))
    # Less than the projections that are spared, as heads that share cells meet them among zeros.
    assert shared == pytest.approx(0.087, abs=0.01)


def _encode(config: ImageEncoderConfig) -> tuple[Any, ...]:
    model = ImageEncoderViT(config, implementation="reference")
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    return model.apply, jax.eval_shape(model.init, jax.random.key(0), images), images


def _decode(config: SamConfig, num_prompts: int, num_points: int, with_mask: bool) -> Any:
    model = Sam(config)

    def decode(variables: Any, embeddings: Any, prompts: Any) -> Any:
        return model.apply(
            variables, embeddings, prompts, multimask_output=not with_mask, method=Sam.decode
        )

    grid, dim = config.image_encoder.grid, config.image_encoder.output_dim
    return (
        decode,
        jax.eval_shape(lambda: init_variables(model, jax.random.key(0))),
        jax.ShapeDtypeStruct((1, *grid, dim), jnp.float32),
        random_prompts(
            1, num_prompts, num_points, model.image_size, model.low_res_size if with_mask else None
        ),
    )


def _trace(function: Any, *args: Any) -> tuple[float, int]:
    """FLOPs that XLA counts before it optimises, and those of the program's matrix products."""
    traced = jax.jit(function).trace(*args)
    return traced.lower().cost_analysis()["flops"], sum(map(_flops, _equations(traced.jaxpr.jaxpr)))


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                assert equation.primitive.name not in ("scan", "while"), "its trips would be lost"
                yield from _equations(inner)


def _flops(equation: Any) -> int:
    output = equation.outvars[0].aval
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * output.size * int(np.prod([shape[axis] for axis in contracted]))
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        numbers = equation.params["dimension_numbers"]
        return 2 * output.size * kernel.size // kernel.shape[numbers.rhs_spec[0]]
    return 0


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    square = dataclasses.replace(TINY.image_encoder, image_size=(40, 40))
    monkeypatch.setitem(VARIANTS, "tiny", dataclasses.replace(TINY, image_encoder=square))
    monkeypatch.setattr(limits, "MATMUL_SIZES", {"cpu": (64,), "accelerator": (64,)})
    monkeypatch.setattr(limits, "COPY_BYTES", 2**16)
    monkeypatch.setattr(dead_leaves, "IMAGE_HW", (90, 135))
    monkeypatch.setattr(input, "NUM_FILES", 4)
    # Of eight, each would have a part in every array that is saved.
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *platform: two)


ENCODER = ["--variant", "tiny", "--batch", "2"]
DECODER = ["--variant", "tiny", "--prompts", "3"]
# Programs that are compiled sooner.
SMALL = [
    part
    for setting in (*ONE_LAYER, *ONE_ROUND, "train.ema_decay=0.0")
    for part in ("--set", setting)
]


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize(
    ("benchmark_main", "arguments", "unit"),
    [
        (limits.main, [], "float32 FLOP/s"),
        (
            encoder.main,
            [*ENCODER, "--backward", "--remat", "blocks", "--dtype", "bfloat16"],
            "FLOP/s",
        ),
        (decoder.main, [*DECODER, "--with-mask"], "FLOP/s"),
        (
            attention.main,
            ["--grid", "4", "8", "--heads", "2", "--backward", "--dtype", "bfloat16"],
            "chunked FLOP/s",
        ),
        (checkpoint.main, ["--config", str(PRETRAINING)], "restored bytes/s"),
        (step.main, ["--config", str(CONFIG), "--fresh-batches", *SMALL], "FLOP/s"),
        (
            input.main,
            ["--config", str(CONFIG), "--synthetic", "--set", "data.batch_size=4"],
            "images/s",
        ),
        (
            input.main,
            ["--config", str(CONFIG), "--sa1b", "2", "--accelerator-rate", "5"],
            "images/s of a core",
        ),
    ],
)
def test_every_benchmark_writes_a_record(
    benchmark_main: Any, arguments: Sequence[str], unit: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "record.json"
    record = benchmark_main([*arguments, "--repeats", "1", "--out", str(out)])
    assert json.loads(out.read_text(encoding="utf-8")) == record
    assert record["rates"][unit]["achieved"] > 0
    assert record["commit"] != ""
    assert record["command"].startswith(f"python -m benchmarks.{record['benchmark']} ")
    assert unit in capsys.readouterr().out


@pytest.mark.usefixtures("_tiny")
def test_cores_follow_from_the_accelerators_rate(tmp_path: Path) -> None:
    arguments = ["--config", str(CONFIG), "--synthetic", "--repeats", "2", "--accelerator-rate"]
    record = input.main([*arguments, "6", "--out", str(tmp_path / "record.json")])
    per_core = record["rates"]["images/s of a core"]["achieved"]
    assert record["cores_per_accelerator"] == pytest.approx(6 / per_core)
    assert record["main_process_rate"] == 1
    assert all(record[f"ms_{stage}"] > 0 for stage in ("read", *input.STAGES, "batch"))


@pytest.mark.usefixtures("_tiny")
def test_reduced_decoding_is_held_against_full(tmp_path: Path) -> None:
    arguments = ["--config", str(CONFIG), "--repeats", "1", "--out", str(tmp_path / "record.json")]
    made = input.main([*arguments, "--sa1b", "2"])
    errors = [made[f"reduced_decoding_{which}_error"] for which in ("mean", "rms", "max")]
    assert 0 < errors[0] < errors[1] < errors[2] <= 255
    # These are no JPEGs.
    shapes = input.main([*arguments, "--synthetic"])
    assert shapes["reduced_decoding_max_error"] == 0


def test_dead_leaves_are_read_as_sa1b(tmp_path: Path) -> None:
    dead_leaves.write_tar(tmp_path / "a.tar", 2, image_hw=(150, 225), num_masks=20)
    dead_leaves.write_tar(tmp_path / "again.tar", 2, image_hw=(150, 225), num_masks=20)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "again.tar").read_bytes()
    source = Sa1bSource(tmp_path / "a.tar")
    assert len(source) == 2
    for sample in (source[0], source[1]):
        masks = decode_masks(sample, range(20))
        assert masks.shape == (20, 150, 225)
        assert masks.any(axis=(1, 2)).all()
        # Wholes hold parts: some masks overlap.
        assert masks.sum() > masks.any(axis=0).sum()
    assert source[0].image != source[1].image


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_table_runs_what_has_no_record_and_tells_what_failed(
    platform: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    commands = []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        if "--with-mask" in command:
            return subprocess.CompletedProcess(command, 1, stdout="some lines\nout of memory")
        rate = {"achieved": 2e12, "limit": 4e12, "limit_rate": 0.5}
        units = ("images/s", "FLOP/s", "bfloat16 FLOP/s")
        record = {
            "platform": platform,
            "device": "a device",
            "commit": "abc",
            "best_seconds": 0.25,
            "peak_bytes": None,
            "planned_bytes": 2**30,
            "rates": dict.fromkeys(units, rate),
            "peers": {"torch": {"speedup": 3.0}, "torch-sdpa": {"failed": "out of memory"}},
        }
        Path(command[command.index("--out") + 1]).write_text(json.dumps(record))
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    records = table.main(["--folder", str(tmp_path)])
    rows = table.small_rows() if platform == "cpu" else table.accelerator_rows()
    assert [record["name"] for record in records] == ["limits", *(row.name for row in rows)]
    failed = {row.name for row in rows if "--with-mask" in row.arguments}
    assert {record["name"] for record in records if "failed" in record} == failed
    text = capsys.readouterr().out
    assert "a device, abc, 2 TFLOP/s" in text
    assert "50.0%" in text
    assert "3.00" in text

    # What is done is not done again.
    commands.clear()
    table.main(["--folder", str(tmp_path)])
    assert len(commands) == len(failed)


@pytest.mark.parametrize("row", [*table.small_rows(), *table.accelerator_rows()])
def test_rows_of_the_table_are_commands(row: table.Row) -> None:
    """Up to where they would start to compute."""
    scripts = {"encoder": encoder, "decoder": decoder, "step": step}
    script: Any = scripts[row.benchmark]
    args = script.parse([*row.arguments, "--repeats", "1"])
    assert args.repeats == 1
    if row.benchmark == "step":
        assert experiment.load(args).data.num_workers == 0


@pytest.mark.parity
@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize(
    ("benchmark_main", "arguments"),
    [
        (encoder.main, [*ENCODER, "--backward", "--dtype", "bfloat16"]),
        (encoder.main, [*ENCODER, "--dtype", "bfloat16"]),
        (decoder.main, [*DECODER, "--batch", "2", "--with-mask", "--dtype", "bfloat16"]),
    ],
)
def test_the_peers_run_at_the_same_shapes(
    benchmark_main: Any, arguments: Sequence[str], tmp_path: Path, capsys: Any
) -> None:
    out = str(tmp_path / "record.json")
    peers = ("--peer", "torch", "torch-sdpa")
    record = benchmark_main([*arguments, *peers, "--repeats", "2", "--out", out])
    assert [*record["peers"]] == ["torch", "torch-sdpa"]
    assert all(times["speedup"] > 0 for times in record["peers"].values())
    assert "times as fast as torch-sdpa" in capsys.readouterr().out


@pytest.mark.parity
@pytest.mark.usefixtures("_tiny")
def test_where_nothing_can_be_compiled_the_fused_peer_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    torch = pytest.importorskip("torch")
    exc = importlib.import_module("torch._dynamo.exc")

    def compile_nothing(function: Any, **options: Any) -> Any:
        def call(*args: Any) -> Any:
            raise exc.TorchDynamoException("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    out = str(tmp_path / "record.json")
    record = encoder.main([*ENCODER, "--peer", "torch-compile", "--repeats", "2", "--out", out])
    assert [*record["peers"]] == ["torch-sdpa"]
    assert "no C++ compiler" in capsys.readouterr().err


@pytest.mark.parity
def test_the_fast_peer_is_the_published_model() -> None:
    """Embeddings, gradients and masks, of windows that need padding and of several images."""
    torch = pytest.importorskip("torch")
    fast = importlib.import_module("benchmarks.fast")
    torch.manual_seed(0)
    config = dataclasses.replace(
        WIDE, image_encoder=dataclasses.replace(WIDE.image_encoder, image_size=(128, 128))
    )
    model = published.build(config).eval()
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter)
    images = torch.randn(2, 3, 128, 128)
    cotangents = torch.randn(2, 256, 8, 8)
    coords = 128 * torch.rand(6, 2, 2)
    labels = torch.tensor([[1, 0], [0, -1], [1, 1]]).repeat(2, 1)
    masks = torch.randn(6, 1, 32, 32)

    def decode(embeddings: Any, prompts: Any) -> Any:
        points = (coords[prompts], labels[prompts])
        return fast.decode_images(model, embeddings, points, masks[prompts], multimask_output=True)

    def encode() -> tuple[Any, list[Any]]:
        model.zero_grad()
        embeddings = model.image_encoder(images)
        (embeddings * cotangents).sum().backward()
        return embeddings.detach(), [p.grad for p in model.image_encoder.parameters()]

    embeddings, gradients = encode()
    with torch.no_grad():
        in_turn = [decode(embeddings[i : i + 1], slice(3 * i, 3 * i + 3)) for i in range(2)]
    expected = [torch.cat(parts) for parts in zip(*in_turn, strict=True)]
    fast.speed_up(model)
    with torch.no_grad():
        at_once = decode(embeddings, slice(None))
    fast_embeddings, fast_gradients = encode()
    for ours, theirs in zip(
        (fast_embeddings, *fast_gradients, *at_once),
        (embeddings, *gradients, *expected),
        strict=True,
    ):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_every_kernel_of_a_plan_can_be_counted() -> None:
    """A plan knows the kernels that ``benchmarks.kernels`` counts, name by name."""
    found = [name for case in kernels.CASES.values() for name in kernels.kernels_of(case())]
    assert sorted(found) == sorted(KERNEL_PEAK_RATES)


@pytest.mark.usefixtures("tpu_compiler")
def test_kernels_are_counted(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    # By itself: the compiler is told to write its instructions down when it is loaded.
    command = [sys.executable, "-m", "benchmarks.kernels", "--only", "mask_embedding"]
    subprocess.run(
        [*command, "--out", str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[2],
        check=True,
    )
    record = json.loads(out.read_text(encoding="utf-8"))
    assert set(record) == {"mask_embedding", "mask_embedding_backward"}
    assert all(0 < kernel["peak_rate"] < 1 for kernel in record.values())
