"""A trained model on a real photograph: every prompt as the published code answers it.

Weights and pictures are not in the repository; without them these tests are skipped.
"""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sam_jax.images import read_image
from sam_jax.inference.predictor import Predictor
from sam_jax.inference.prompts import Prompt
from sam_jax.weights.files import read_tensors
from sam_jax.weights.load import load
from tests.parity.official import torch

# Not of the mark "parity", whose tests CI must not skip: it may have neither weights nor pictures.
pytestmark = pytest.mark.slow

EMBEDDING_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-3
SCORE_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Setting:
    """Both predictors, which have seen the picture."""

    ours: Predictor
    embeddings: Any
    theirs: Any
    size_hw: tuple[int, int]


@pytest.fixture(scope="module")
def setting(mobile_sam: ModuleType, mobile_sam_weights: Path, shared_data: Path) -> Setting:
    image = read_image(sorted((shared_data / "permissive/coco_ccby/images").iterdir())[7])
    theirs = mobile_sam.sam_model_registry["vit_t"]()
    state = {n: torch.from_numpy(x.copy()) for n, x in read_tensors(mobile_sam_weights).items()}
    theirs.load_state_dict(state, strict=False)
    predictor = mobile_sam.SamPredictor(theirs.eval())
    with torch.no_grad():
        predictor.set_image(image)
    ours = Predictor(*load(mobile_sam_weights))
    return Setting(ours, ours.embed([image]), predictor, image.shape[:2])


def test_embedding(setting: Setting) -> None:
    expected = setting.theirs.features.permute(0, 2, 3, 1).numpy()
    difference = np.abs(np.asarray(setting.embeddings.features) - expected).max()
    assert difference <= EMBEDDING_TOLERANCE


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("with_mask", [False, True])
def test_prompts(setting: Setting, with_mask: bool, multimask_output: bool) -> None:
    h, w = setting.size_hw
    corners = np.array([[0.5 * w, 0.5 * h], [0.7 * w, 0.4 * h], [0.1 * w, 0.2 * h]])
    rows, columns = np.mgrid[:256, :256]
    logits = (6 - np.hypot(rows - 90, columns - 120) / 6).astype(np.float32)
    mask = logits if with_mask else None
    cases = ("points", "box") if with_mask else ("point", "points", "box", "box point")
    prompts = []
    for kinds in cases:
        points = corners[: 3 if "points" in kinds else int("point" in kinds)]
        labels = np.array([1, 1, 0])[: len(points)]
        box = np.array([0.3 * w, 0.2 * h, 0.8 * w, 0.9 * h]) if "box" in kinds else None
        prompts.append(Prompt(points=points, labels=labels, box=box, mask=mask))
    (found,) = setting.ours.predict(
        setting.embeddings, [prompts], multimask_output=multimask_output
    )
    for index, (kinds, prompt) in enumerate(zip(cases, prompts, strict=True)):
        has_points = len(prompt.points) > 0
        with torch.no_grad():
            _, scores, logits = setting.theirs.predict(
                np.asarray(prompt.points) if has_points else None,
                np.asarray(prompt.labels) if has_points else None,
                prompt.box,
                None if mask is None else mask[None],
                multimask_output=multimask_output,
            )
        for ours, theirs, tolerance in (
            (found.low_res_logits[index], logits, LOGIT_TOLERANCE),
            (found.iou_predictions[index], scores, SCORE_TOLERANCE),
        ):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=kinds)
