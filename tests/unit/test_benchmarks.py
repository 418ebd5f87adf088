"""Hand-counted work against other counts, and every benchmark once at a tiny size."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention, checkpoint, dead_leaves, decoder, encoder, input, limits, step
from benchmarks.random_inputs import random_prompts
from sam_jax import work
from sam_jax.data import decode_masks
from sam_jax.data.sources.sa1b import Sa1bSource
from sam_jax.models.image_encoder import ImageEncoderConfig, ImageEncoderViT
from sam_jax.models.mask_decoder import MaskDecoderConfig
from sam_jax.models.sam import Sam, SamConfig, init_variables
from sam_jax.models.variants import VARIANTS
from sam_jax.prompts import PromptConfig
from tests.golden.tiny import TINY

CONFIG = Path(__file__).parents[1] / "e2e" / "tiny_run.py"

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
    assert work.encoder_flops(config) / 1e12 == pytest.approx(tera, rel=1e-3)
    assert work.encoder_flops(config, useful=True) < work.encoder_flops(config)


def test_windows_that_divide_the_grid_waste_nothing() -> None:
    config = VARIANTS["vit_ti"].image_encoder
    assert work.encoder_flops(config, useful=True) == work.encoder_flops(config)
    assert work.encoder_flops(config, (264, 256), useful=True) == work.encoder_flops(config)


@pytest.mark.parametrize("config", [WIDE, TINY, VARIANTS["vit_b"]])
def test_encoder_is_the_products_in_the_program(config: SamConfig) -> None:
    lowered, products = _trace(*_encode(config.image_encoder))
    assert work.encoder_flops(config.image_encoder) == products
    if config is not TINY:
        assert lowered == pytest.approx(products, rel=0.04)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("config", [WIDE, TINY])
def test_decoder_is_the_products_in_the_program(config: SamConfig, with_mask: bool) -> None:
    num_prompts, num_points = 3, 2
    decode = _decode(config, num_prompts, num_points, with_mask)
    _, products = _trace(*decode)
    flops = work.decoder_flops(
        config,
        num_prompts,
        num_points + 1,
        multimask_output=not with_mask,
        with_mask=with_mask,
    )
    # Coordinates times frequencies are products too, of two numbers each.
    positions = 2 * config.image_encoder.output_dim * num_prompts * num_points
    assert flops + positions == products


def test_a_step_is_three_forward_passes() -> None:
    prompts = PromptConfig(num_corrections=2, random_mask_round=False, final_mask_round=True)
    first = work.decoder_flops(TINY, 5, 3 + 2, multimask_output=True)
    later = work.decoder_flops(TINY, 5, 3 + 2, multimask_output=False, with_mask=True)
    image = work.encoder_flops(TINY.image_encoder) + first + 3 * later
    assert work.step_flops(TINY, prompts, batch_size=4, num_objects=5) == 3 * 4 * image


def test_objects_share_the_first_layers_view_of_the_image() -> None:
    def flops(num_prompts: int) -> float:
        return work.decoder_flops(VARIANTS["vit_b"], num_prompts, 2, multimask_output=True)

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
    """What XLA counts before it optimises, and what the products of the program come to."""
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


ENCODER = ["--variant", "tiny", "--batch", "2"]
DECODER = ["--variant", "tiny", "--prompts", "3"]


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
        (checkpoint.main, ["--config", str(CONFIG)], "restored bytes/s"),
        (step.main, ["--config", str(CONFIG), "--fresh-batches"], "FLOP/s"),
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
    record = benchmark_main([*arguments, "--repeats", "2", "--out", str(out)])
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


@pytest.mark.parity
@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize(
    ("benchmark_main", "arguments"),
    [
        (encoder.main, [*ENCODER, "--backward", "--dtype", "bfloat16"]),
        (decoder.main, [*DECODER, "--with-mask", "--dtype", "bfloat16"]),
    ],
)
def test_the_peer_runs_at_the_same_shapes(
    benchmark_main: Any, arguments: Sequence[str], tmp_path: Path
) -> None:
    out = str(tmp_path / "record.json")
    record = benchmark_main([*arguments, "--peer", "torch", "--repeats", "2", "--out", out])
    assert record["speedup_over_peer"] > 0
