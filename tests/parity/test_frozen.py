"""The frozen outputs of the published code are still what it answers.

``SAM_JAX_UPDATE_GOLDEN=1 python -m pytest tests/parity/test_frozen.py`` writes them again.
"""

import os
from types import ModuleType

import numpy as np
import pytest

from tests.golden.tiny import (
    EVERY_COMBINATION,
    FROZEN,
    FROZEN_STRIDE,
    TINY,
    load_frozen,
    random_prompts,
)
from tests.parity import official

pytestmark = pytest.mark.parity


def answers(segment_anything: ModuleType) -> dict[str, np.ndarray]:
    """Weights, inputs and outputs of the published model at tiny width."""
    model = official.build(TINY, seed=2)
    mean, std = (getattr(model, name).numpy()[:, 0, 0] for name in ("pixel_mean", "pixel_std"))
    model.half().float()  # so that half the bytes hold the weights exactly
    frozen = {
        f"weights/{name}": x.astype(np.float16) for name, x in official.numpy_state(model).items()
    }

    encoder = TINY.image_encoder
    images = np.random.default_rng(2).integers(0, 256, (2, *encoder.image_size, 3), np.uint8)
    embeddings = official.encode(model, (images - mean) / std)
    frozen |= {"images": images, "image_embeddings": embeddings}

    low_res_size = (4 * encoder.grid[0], 4 * encoder.grid[1])
    for index, (name, kinds) in enumerate(EVERY_COMBINATION.items()):
        prompts = random_prompts(kinds, 1, encoder.image_size, low_res_size)
        sparse, dense = official.embed_prompts(model, prompts)
        single, three = (
            official.decode(model, embeddings[index % 2], prompts, multimask_output=multimask)
            for multimask in (False, True)
        )
        if "mask_inputs" in prompts:
            prompts["mask_inputs"] = prompts["mask_inputs"].astype(np.float16)
        frozen |= {f"prompts/{name}/{field}": x for field, x in prompts.items()}
        frozen |= {
            f"sparse/{name}": sparse[0],
            f"logits/{name}": np.concatenate([single[0], three[0]], axis=1)[
                0, :, ::FROZEN_STRIDE, ::FROZEN_STRIDE
            ],
            f"iou/{name}": np.concatenate([single[1], three[1]], axis=1)[0],
        }
        if name == "mask":
            frozen["dense/mask"] = dense[0, ::FROZEN_STRIDE, ::FROZEN_STRIDE]
    return frozen


def test_frozen_outputs_are_current(segment_anything: ModuleType) -> None:
    current = answers(segment_anything)
    if os.environ.get("SAM_JAX_UPDATE_GOLDEN"):
        np.savez_compressed(FROZEN, **current)
    frozen = load_frozen()
    assert frozen.keys() == current.keys()
    for name, array in current.items():
        if name.startswith(("weights/", "prompts/", "images")):
            np.testing.assert_array_equal(frozen[name], array, err_msg=name)
        elif array.size:
            official.assert_equal(frozen[name], array)
    assert FROZEN.stat().st_size < 300_000
