"""With JAX's 64 bits turned on (``JAX_ENABLE_X64=1``), answers stay what they are, in float32."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sam_jax.inference.automatic import AutomaticOptions, generate_masks
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.inference.prompts import Prompt
from sam_jax.models.sam import Sam
from sam_jax.training.experiment import Experiment, read_config
from tests.golden.tiny import SHALLOW, random_variables

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
AUTOMATIC = AutomaticOptions(
    points_per_side=2,
    points_per_batch=4,
    pred_iou_thresh=0.0,
    stability_score_thresh=0.0,
    box_nms_thresh=1.0,
    crop_nms_thresh=1.0,
)


def answers() -> dict[str, Any]:
    """Answers of a predictor for an image, in every way that there is to ask."""
    predictor = Predictor(Sam(SHALLOW), random_variables(SHALLOW), Buckets((1,), (1,), (4,), (4,)))
    embeddings = predictor.embed([IMAGE])
    mask = np.zeros(IMAGE.shape[:2], bool)
    mask[20:40] = True
    prompts = [
        Prompt(points=[(7, 3), (50, 50)], labels=[1, 0]),
        Prompt(box=(3, 4, 50, 40)),
        Prompt(points=[(7, 3)], mask=mask),
    ]
    (several,) = predictor.predict(embeddings, [prompts])
    searches = {
        "whole": AUTOMATIC,
        "crops": dataclasses.replace(AUTOMATIC, crop_n_layers=1),
        "tiles": dataclasses.replace(AUTOMATIC, tile_px=50, tile_halo_px=44),
    }
    return {
        "features": np.asarray(embeddings.features),
        "several": several.low_res_logits,
        "several_ious": several.iou_predictions,
    } | {
        name: [
            (record["predicted_iou"], record["stability_score"], *record["bbox"], record["area"])
            for record in generate_masks(predictor, IMAGE, options)
        ]
        for name, options in searches.items()
    }


def test_inference_answers_the_same() -> None:
    expected = answers()
    with jax.enable_x64(True):
        found = answers()
    for name, array in expected.items():
        if isinstance(array, np.ndarray):
            assert found[name].dtype == array.dtype == np.float32, name
        else:
            assert len(array) > 0
            assert len(found[name]) == len(array), name
        np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-5, err_msg=name)


def test_a_training_step_keeps_its_types() -> None:
    """State and metrics; what is drawn at random names its type, which decides what is drawn."""
    config = str(Path(__file__).parents[1] / "e2e" / "tiny_run.py")
    with jax.enable_x64(True):
        experiment = Experiment.of(
            read_config(config, ["model.dtype=bfloat16", "prompts.num_corrections=0"])
        )
        program = experiment.compiled_step(jax.devices()[:1])
        before = program.placed_state
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(before)} == {"float32", "int32"}
        after, metrics = jax.eval_shape(program.step, before, program.placed_batch(2))
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert all(metric.dtype.itemsize <= 4 for metric in metrics.values())
