"""StableHLO files answer as the model does, for any number of images, objects and points."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.export.stablehlo import DECODER, ExportedSam, export_stablehlo, load_stablehlo
from sam_jax.models.prompt_encoder import Prompts
from sam_jax.models.sam import Sam
from sam_jax.weights.files import WeightsError
from tests.golden.tiny import SHALLOW, random_variables

MODEL = Sam(SHALLOW)

pytest.importorskip("flatbuffers", reason="needs requirements-torch.lock")


@pytest.fixture(scope="module")
def variables():
    return random_variables(SHALLOW)


@pytest.fixture(scope="module")
def folder(variables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "sam"
    export_stablehlo(folder, MODEL, variables)
    return folder


@pytest.fixture(scope="module")
def exported(folder: Path) -> ExportedSam:
    return load_stablehlo(folder)


@pytest.mark.parametrize("batch", [1, 3])
def test_encoder(exported: ExportedSam, variables, batch: int) -> None:
    images = jax.random.normal(jax.random.key(0), (batch, *MODEL.image_size, 3))
    np.testing.assert_allclose(
        exported.encode(images),
        jax.jit(functools.partial(MODEL.apply, method=Sam.encode))(variables, images),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize(("b", "p", "n"), [(1, 1, 1), (2, 5, 3)])
def test_decoder(exported: ExportedSam, variables, b: int, p: int, n: int) -> None:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

    embeddings = normal(b, *SHALLOW.image_encoder.grid, 32)
    prompts = Prompts(
        point_coords=jnp.asarray(rng.uniform(0, 40, (b, p, n, 2)).astype(np.float32)),
        point_labels=jnp.asarray(rng.integers(0, 2, (b, p, n)).astype(np.int32)),
        point_valid=jnp.asarray(rng.random((b, p, n)) < 0.7),
        boxes_xyxy=jnp.asarray(rng.uniform(0, 40, (b, p, 4)).astype(np.float32)),
        box_valid=jnp.asarray(rng.random((b, p)) < 0.5),
        mask_logits=normal(b, p, *MODEL.low_res_size),
        mask_valid=jnp.asarray(rng.random((b, p)) < 0.5),
    )
    found = exported.decode(embeddings, prompts)
    for multimask, part in ((True, slice(0, 3)), (False, slice(3, 4))):
        decode = functools.partial(MODEL.apply, multimask_output=multimask, method=Sam.decode)
        expected = jax.jit(decode)(variables, embeddings, prompts)
        np.testing.assert_allclose(
            found.low_res_logits[:, :, part], expected.low_res_logits, rtol=0, atol=1e-4
        )
        np.testing.assert_allclose(
            found.iou_predictions[:, :, part], expected.iou_predictions, rtol=0, atol=1e-5
        )


def test_the_files_say_what_they_take_and_where_they_run(folder: Path) -> None:
    signature = json.loads((folder / "signature.json").read_text())
    assert signature["platforms"] == ["cpu", "cuda", "tpu"]
    inputs = {i["name"]: (i["shape"], i["dtype"]) for i in signature["decoder"]["inputs"]}
    assert inputs["point_coords"] == (["b", "p", "n", "2"], "float32")
    assert inputs["mask_valid"] == (["b", "p"], "bool")
    outputs = {o["name"]: o["shape"] for o in signature["decoder"]["outputs"]}
    assert outputs["low_res_logits"] == ["b", "p", "4", "40", "48"]
    # Weights lie beside the programs, once.
    assert (folder / DECODER).stat().st_size < (folder / "model.safetensors").stat().st_size * 3


def test_damaged_files_are_named(folder: Path, variables, tmp_path: Path) -> None:
    export_stablehlo(tmp_path / "x", MODEL, variables, platforms=("cpu",))
    whole = (tmp_path / "x" / DECODER).read_bytes()
    for length in (0, 10, len(whole) // 2):
        (tmp_path / "x" / DECODER).write_bytes(whole[:length])
        with pytest.raises(WeightsError, match="holds no whole StableHLO export"):
            load_stablehlo(tmp_path / "x")
    (tmp_path / "x" / DECODER).unlink()
    with pytest.raises(WeightsError, match="holds no whole StableHLO export"):
        load_stablehlo(tmp_path / "x")
    with pytest.raises(WeightsError, match="is there already"):
        export_stablehlo(folder, MODEL, variables)
