"""ViT-B at its published width and size: one image, then every combination of prompts."""

import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.models.sam import Sam
from sam_jax.models.variants import VARIANTS
from tests.golden.tiny import EVERY_COMBINATION, ragged_batch, random_prompts
from tests.parity import official

pytestmark = [pytest.mark.parity, pytest.mark.slow]

# Of every output, in its own unit.
ABSOLUTE_TOLERANCE = 1e-4

CONFIG = VARIANTS["vit_b"]
MODEL = Sam(CONFIG)


def assert_near(ours: Any, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ABSOLUTE_TOLERANCE)


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Both models with equal weights and the published one's embeddings of an image."""

    official: Any
    variables: dict[str, Any]
    image: np.ndarray
    embeddings: np.ndarray


@pytest.fixture(scope="module")
def embedded(segment_anything: ModuleType) -> Embedded:
    theirs = segment_anything.build_sam_vit_b().requires_grad_(False)
    official.randomize(theirs, seed=0)
    shape = (1, *CONFIG.image_encoder.image_size, 3)
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with official.kept_memory():
        embeddings = official.encode(theirs, image)
    return Embedded(theirs, official.native_variables(theirs, CONFIG), image, embeddings)


def test_image_embeddings(embedded: Embedded) -> None:
    encode = jax.jit(functools.partial(MODEL.apply, method=Sam.encode))
    assert_near(encode(embedded.variables, jnp.asarray(embedded.image)), embedded.embeddings)


@pytest.mark.parametrize("with_mask", [False, True])
def test_every_combination(embedded: Embedded, with_mask: bool) -> None:
    """Without a mask in the batch, objects share the cells of their image until they differ.

    Three candidates there, one with masks, as people ask for them; `test_modules` has the rest.
    """
    objects = [
        random_prompts(kinds, 1, MODEL.image_size, MODEL.low_res_size)
        for kinds in EVERY_COMBINATION.values()
        if kinds.mask == with_mask
    ]
    batch = ragged_batch([objects], MODEL.low_res_size)
    if not with_mask:
        batch = batch.replace(mask_logits=None, mask_valid=None)
    decode = functools.partial(MODEL.apply, method=Sam.decode, multimask_output=not with_mask)
    ours = jax.jit(decode)(embedded.variables, jnp.asarray(embedded.embeddings), batch)
    for index, prompts in enumerate(objects):
        logits, iou = official.decode(
            embedded.official, embedded.embeddings[0], prompts, multimask_output=not with_mask
        )
        assert_near(ours.low_res_logits[0, index], logits[0])
        assert_near(ours.iou_predictions[0, index], iou[0])
