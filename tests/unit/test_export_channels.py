"""Exports of models whose images have other channels than three."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.export.onnx import CHANNELS, ENCODER, export_onnx
from sam_jax.export.stablehlo import SIGNATURE, export_stablehlo, load_stablehlo
from sam_jax.models.sam import Sam
from sam_jax.ops.images import ImageChannels
from tests.golden import tiny_mobile_sam
from tests.golden.tiny import TINY, random_variables

TINY_VIT = dataclasses.replace(
    tiny_mobile_sam.SMALL,
    image_encoder=dataclasses.replace(tiny_mobile_sam.SMALL.image_encoder, image_size=(64, 64)),
)


def channels(count: int) -> ImageChannels:
    return ImageChannels(count, (100.0,) * count, (9.0,) * count)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("config", [TINY, TINY_VIT], ids=["vit", "tiny_vit"])
def test_onnx_encoders_take_them(config, count: int, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs requirements-torch.lock")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs requirements-torch.lock")
    config = dataclasses.replace(config, channels=channels(count))
    variables = random_variables(config)
    export_onnx(tmp_path / "x", config, variables)
    assert json.loads((tmp_path / "x" / CHANNELS).read_text())["in_chans"] == count
    height, width = config.image_encoder.image_size
    images = np.random.default_rng(0).normal(size=(1, height, width, count)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "x" / ENCODER)
    (found,) = session.run(None, {"images": images.transpose(0, 3, 1, 2)})
    expected = jax.jit(lambda v, x: Sam(config).apply(v, x, method=Sam.encode))(variables, images)
    np.testing.assert_allclose(found.transpose(0, 2, 3, 1), expected, atol=1e-4)


def test_stablehlo_takes_them(tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers", reason="needs requirements-torch.lock")
    config = dataclasses.replace(TINY, channels=channels(2))
    variables = random_variables(config)
    export_stablehlo(tmp_path / "x", Sam(config), variables, platforms=("cpu",))
    signature = json.loads((tmp_path / "x" / SIGNATURE).read_text())
    assert signature["encoder"]["inputs"][0]["shape"] == ["b", "40", "48", "2"]
    assert signature["channels"]["pixel_mean"] == [100.0, 100.0]
    images = np.random.default_rng(0).normal(size=(1, 40, 48, 2)).astype(np.float32)
    found = load_stablehlo(tmp_path / "x").encode(jnp.asarray(images))
    expected = jax.jit(lambda v, x: Sam(config).apply(v, x, method=Sam.encode))(variables, images)
    np.testing.assert_allclose(found, expected, atol=1e-5)
