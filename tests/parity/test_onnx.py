"""ONNX files in onnxruntime: as this package answers, and as the published export does."""

import dataclasses
import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from sam_jax.export import onnx
from sam_jax.export.onnx import DECODER, ENCODER, export_onnx
from sam_jax.export.onnx_decoder import DecoderOptions
from sam_jax.inference.restore import restore_mask
from sam_jax.models.prompt_encoder import Prompts
from sam_jax.models.sam import Sam, SamConfig
from sam_jax.weights.files import WeightsError
from tests.golden.tiny import TINY
from tests.parity import official
from tests.parity.official import torch

pytestmark = pytest.mark.parity

# The published export knows square images only.
SQUARE = dataclasses.replace(
    TINY, image_encoder=dataclasses.replace(TINY.image_encoder, image_size=(48, 48))
)
MODEL = Sam(SQUARE)
ORIGINALS = ((48, 48), (30, 45), (333, 120))


@dataclasses.dataclass(frozen=True)
class Setting:
    """The published model, ours with its weights, and an image's embeddings [1, gh, gw, d]."""

    official: Any
    variables: dict[str, Any]
    embeddings: np.ndarray


@pytest.fixture(scope="module")
def setting(segment_anything: ModuleType) -> Setting:
    theirs = official.build(SQUARE)
    image = np.random.default_rng(0).standard_normal((1, 48, 48, 3)).astype(np.float32)
    return Setting(
        theirs, official.native_variables(theirs, SQUARE), official.encode(theirs, image)
    )


@pytest.fixture(scope="module")
def folder(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "export"
    export_onnx(folder, SQUARE, setting.variables, int8=True)
    return folder


def session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def decoder_inputs(
    setting: Setting, num_points: int, with_mask: bool, original_hw: tuple[int, int], seed: int = 0
) -> dict[str, np.ndarray]:
    """One prompt as clients of the published file send it, the padding point last."""
    rng = np.random.default_rng(seed)
    lh, lw = MODEL.low_res_size
    points = rng.uniform(0, 48, (1, num_points + 1, 2)).astype(np.float32)
    labels = rng.integers(0, 4, (1, num_points + 1)).astype(np.float32)
    points[:, -1], labels[:, -1] = 0, -1
    return {
        "image_embeddings": setting.embeddings.transpose(0, 3, 1, 2),
        "point_coords": points,
        "point_labels": labels,
        "mask_input": 6 * rng.standard_normal((1, 1, lh, lw)).astype(np.float32),
        "has_mask_input": np.array([float(with_mask)], np.float32),
        "orig_im_size": np.array(original_hw, np.float32),
    }


def published(setting: Setting, inputs: dict[str, np.ndarray], **options: bool) -> list[np.ndarray]:
    """Outputs of the module behind the published export."""
    from segment_anything.utils.onnx import SamOnnxModel

    options.setdefault("return_single_mask", False)
    model = SamOnnxModel(setting.official, **options)
    with torch.no_grad():
        return [out.numpy() for out in model(*map(torch.from_numpy, inputs.values()))]


def assert_masks_agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    ours, theirs = ours > 0, theirs > 0
    assert ours.shape == theirs.shape
    union = np.sum(ours | theirs, axis=(-2, -1))
    iou = np.sum(ours & theirs, axis=(-2, -1)) / np.maximum(union, 1)
    assert np.all((iou >= 0.999) | (union == 0)), iou


@pytest.mark.parametrize(
    ("num_points", "with_mask", "original_hw"),
    [
        (1, False, ORIGINALS[0]),
        (2, True, ORIGINALS[0]),
        (7, False, ORIGINALS[1]),
        (1, True, ORIGINALS[1]),
        (20, True, ORIGINALS[2]),
        (3, False, ORIGINALS[2]),
    ],
)
def test_decoder_agrees_with_the_published_export(
    setting: Setting, folder: Path, num_points: int, with_mask: bool, original_hw: tuple[int, int]
) -> None:
    inputs = decoder_inputs(setting, num_points, with_mask, original_hw, seed=num_points)
    masks, scores, low_res = session(folder / DECODER).run(None, inputs)
    expected = published(setting, inputs)
    assert masks.shape == (1, 4, *original_hw)
    assert_masks_agree(masks, expected[0])
    np.testing.assert_allclose(masks, expected[0], rtol=0, atol=1e-3)
    np.testing.assert_allclose(scores, expected[1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(low_res, expected[2], rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of the tracer and of what it traces
@pytest.mark.parametrize("original_hw", ORIGINALS)
def test_decoder_agrees_with_the_file_that_the_published_script_makes(
    setting: Setting, folder: Path, tmp_path: Path, original_hw: tuple[int, int]
) -> None:
    """With this PyTorch its tracer fixes the crop, so there is a file for each original size."""
    from segment_anything.utils.onnx import SamOnnxModel

    example = decoder_inputs(setting, 2, True, original_hw)
    torch.onnx.export(
        SamOnnxModel(setting.official, return_single_mask=False),
        tuple(map(torch.from_numpy, example.values())),
        tmp_path / "published.onnx",
        input_names=list(example),
        output_names=["masks", "iou_predictions", "low_res_masks"],
        dynamic_axes={name: {1: "num_points"} for name in ("point_coords", "point_labels")},
        opset_version=17,
        dynamo=False,
    )
    theirs, ours = session(tmp_path / "published.onnx"), session(folder / DECODER)
    assert [o.name for o in theirs.get_outputs()] == [o.name for o in ours.get_outputs()]
    assert {i.name: i.type for i in theirs.get_inputs()} == {
        i.name: i.type for i in ours.get_inputs()
    }
    for num_points in (1, 5, 20):
        for with_mask in (False, True):
            inputs = decoder_inputs(setting, num_points, with_mask, original_hw)
            expected, found = theirs.run(None, inputs), ours.run(None, inputs)
            assert_masks_agree(found[0], expected[0])
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def test_masks_of_a_picture_that_is_a_line(setting: Setting, folder: Path) -> None:
    """Of 48 pixels of the model's input it fills a hundredth of a row, and so a whole one."""
    hw = (2, 9600)
    inputs = decoder_inputs(setting, 1, False, hw)
    masks, _, low_res = session(folder / DECODER).run(None, inputs)
    for mask, logits in zip(masks[0], low_res[0], strict=True):
        expected = restore_mask(logits, (48, 48), (1, 48), hw)
        assert_masks_agree(mask, np.where(expected, 1.0, -1.0))


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("num_points", [1, 20])
def test_decoder_agrees_with_ours(
    setting: Setting, folder: Path, num_points: int, with_mask: bool
) -> None:
    original_hw = (30, 45)
    inputs = decoder_inputs(setting, num_points, with_mask, original_hw)
    masks, scores, low_res = session(folder / DECODER).run(None, inputs)
    # The padding point is one of the list here: the model would add its own.
    prompts = Prompts(
        point_coords=jax.numpy.asarray(inputs["point_coords"])[None, :, :-1],
        point_labels=jax.numpy.asarray(inputs["point_labels"], jax.numpy.int32)[None, :, :-1],
        point_valid=jax.numpy.ones((1, 1, num_points), bool),
        mask_logits=jax.numpy.asarray(inputs["mask_input"]),
        mask_valid=jax.numpy.full((1, 1), with_mask),
    )
    ours = {
        multimask: jax.jit(
            functools.partial(MODEL.apply, multimask_output=multimask, method=Sam.decode)
        )(setting.variables, jax.numpy.asarray(setting.embeddings), prompts)
        for multimask in (False, True)
    }
    logits = np.concatenate([ours[m].low_res_logits[0, 0] for m in (False, True)])
    predicted = np.concatenate([ours[m].iou_predictions[0, 0] for m in (False, True)])
    np.testing.assert_allclose(low_res[0], logits, rtol=0, atol=1e-4)
    np.testing.assert_allclose(scores[0], predicted, rtol=0, atol=1e-4)
    restored = np.stack([restore_mask(one, (48, 48), (32, 48), original_hw) for one in logits])
    assert_masks_agree(masks[0], np.where(restored, 1.0, -1.0))


@pytest.mark.parametrize("num_points", [1, 2, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"return_single_mask": True},
        {"return_extra_metrics": True},
        {"return_single_mask": True, "use_stability_score": True},
        {"return_single_mask": True, "use_stability_score": True, "return_extra_metrics": True},
    ],
    ids="+".join,
)
def test_options_mean_what_they_mean_there(
    setting: Setting, tmp_path: Path, options: dict[str, bool], num_points: int
) -> None:
    export_onnx(tmp_path / "x", SQUARE, setting.variables, options=DecoderOptions(**options))
    inputs = decoder_inputs(setting, num_points, False, (30, 45))
    found = session(tmp_path / "x" / DECODER)
    expected = published(setting, inputs, **options)
    names = ["masks", "iou_predictions"]
    names += ["stability_scores", "areas"] if options.get("return_extra_metrics") else []
    assert [output.name for output in found.get_outputs()] == [*names, "low_res_masks"]
    for name, ours, theirs in zip(
        [*names, "low_res_masks"], found.run(None, inputs), expected, strict=True
    ):
        if name == "areas":  # pixels at the edge, on either side of the threshold
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2)
        else:
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3, err_msg=name)


def test_the_interface_is_the_published_one(folder: Path) -> None:
    decoder = session(folder / DECODER)
    assert {i.name: i.shape for i in decoder.get_inputs()} == {
        "image_embeddings": [1, 32, 12, 12],
        "point_coords": ["num_prompts", "num_points", 2],
        "point_labels": ["num_prompts", "num_points"],
        "mask_input": ["num_masks", 1, 48, 48],
        "has_mask_input": [1],
        "orig_im_size": [2],
    }
    assert [o.name for o in decoder.get_outputs()] == ["masks", "iou_predictions", "low_res_masks"]
    assert {i.type for i in decoder.get_inputs()} == {"tensor(float)"}


def test_many_prompts_at_once_are_each_alone(setting: Setting, folder: Path) -> None:
    decoder = session(folder / DECODER)
    alone = [decoder_inputs(setting, 3, True, (30, 45), seed) for seed in range(4)]
    together = dict(alone[0])
    for name in ("point_coords", "point_labels", "mask_input"):
        together[name] = np.concatenate([inputs[name] for inputs in alone])
    for index, (inputs, masks) in enumerate(
        zip(alone, decoder.run(None, together)[2], strict=True)
    ):
        np.testing.assert_allclose(
            masks, decoder.run(None, inputs)[2][0], rtol=0, atol=1e-4, err_msg=str(index)
        )


def test_nothing_of_an_unused_mask_passes(setting: Setting, folder: Path) -> None:
    decoder = session(folder / DECODER)
    inputs = decoder_inputs(setting, 2, False, (48, 48))
    expected = decoder.run(None, inputs)
    inputs["mask_input"] = np.full_like(inputs["mask_input"], np.nan)
    for found, reference in zip(decoder.run(None, inputs), expected, strict=True):
        np.testing.assert_array_equal(found, reference)


@pytest.mark.parametrize("config", [SQUARE, TINY], ids=["square", "not-square"])
def test_encoder_agrees_with_the_published_one(
    segment_anything: ModuleType, tmp_path: Path, config: SamConfig
) -> None:
    theirs = official.build(config)
    export_onnx(tmp_path / "x", config, official.native_variables(theirs, config))
    encoder = session(tmp_path / "x" / ENCODER)
    shape = config.image_encoder.image_size
    for batch in (1, 3):
        images = np.random.default_rng(batch).standard_normal((batch, *shape, 3))
        images = images.astype(np.float32)
        (found,) = encoder.run(["image_embeddings"], {"images": images.transpose(0, 3, 1, 2)})
        official.assert_equal(found.transpose(0, 2, 3, 1), official.encode(theirs, images))


def test_int8_answers_nearly_the_same(setting: Setting, folder: Path) -> None:
    for name in (ENCODER, DECODER):
        small = folder / name.replace(".onnx", ".int8.onnx")
        assert small.stat().st_size < (folder / name).stat().st_size
    inputs = decoder_inputs(setting, 2, False, (48, 48))
    exact = session(folder / DECODER).run(None, inputs)[2]
    rough = session(folder / "decoder.int8.onnx").run(None, inputs)[2]
    # With random weights logits lie around the threshold, so their values are compared.
    assert np.corrcoef(exact.ravel(), rough.ravel())[0, 1] > 0.98
    images = np.random.default_rng(0).standard_normal((1, 3, 48, 48)).astype(np.float32)
    exact, rough = (
        session(folder / name).run(None, {"images": images})[0]
        for name in (ENCODER, "encoder.int8.onnx")
    )
    assert np.corrcoef(exact.ravel(), rough.ravel())[0, 1] > 0.98


def test_weights_past_the_limit_of_a_message_lie_beside_the_graph(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "LARGEST_MESSAGE", 1000)
    export_onnx(tmp_path / "x", SQUARE, setting.variables, int8=True)
    assert (tmp_path / "x" / f"{ENCODER}.data").exists()
    images = np.zeros((1, 3, 48, 48), np.float32)
    for name in (ENCODER, "encoder.int8.onnx"):
        assert np.isfinite(session(tmp_path / "x" / name).run(None, {"images": images})[0]).all()


def test_a_folder_with_something_in_it_is_refused(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(WeightsError, match="is there already"):
        export_onnx(tmp_path, SQUARE, setting.variables)
