"""Every output of the model against frozen answers of the published code; needs no PyTorch.

``tests/parity/test_frozen.py`` writes the file and checks that it is current.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.models.prompt_encoder import PromptEncoder
from sam_jax.models.sam import Sam, init_variables
from sam_jax.ops.images import normalize_images
from sam_jax.weights.names import from_native, to_native
from tests.golden.tiny import (
    EVERY_COMBINATION,
    FROZEN_STRIDE,
    TINY,
    load_frozen,
    ragged_batch,
)

# Largest allowed difference, over the largest magnitude of the reference's output.
TOLERANCE = 1e-5

MODEL = Sam(TINY)


@pytest.fixture(scope="module")
def frozen() -> dict[str, np.ndarray]:
    return load_frozen()


@pytest.fixture(scope="module")
def variables(frozen: dict[str, np.ndarray]) -> Any:
    template = jax.eval_shape(lambda: init_variables(MODEL, jax.random.key(0)))
    weights = select(frozen, "weights/")
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), to_native(weights, template))


@pytest.fixture(scope="module")
def prompts(frozen: dict[str, np.ndarray]) -> Any:
    """The combinations dealt out to the two images in turn, as one batch."""
    records = {
        name: {
            field: x.astype(np.float32) if field == "mask_inputs" else x
            for field, x in select(frozen, f"prompts/{name}/").items()
        }
        for name in EVERY_COMBINATION
    }
    every = list(records.values())
    return ragged_batch([every[0::2], every[1::2]], MODEL.low_res_size)


def select(frozen: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): x for name, x in frozen.items() if name.startswith(prefix)}


def assert_equal(ours: Any, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    error = np.abs(np.asarray(ours) - theirs).max(initial=0) / np.abs(theirs).max(initial=1e-9)
    assert error <= TOLERANCE


def test_image_embeddings(frozen: dict[str, np.ndarray], variables: Any) -> None:
    @jax.jit
    def encode(variables: Any, images: jax.Array) -> jax.Array:
        hw = jnp.full((2, 2), jnp.array(images.shape[1:3]))
        return MODEL.apply(variables, normalize_images(images, hw), method=Sam.encode)

    ours = encode(variables, jnp.asarray(frozen["images"]))
    assert_equal(ours, frozen["image_embeddings"])


def test_prompt_embeddings(frozen: dict[str, np.ndarray], variables: Any, prompts: Any) -> None:
    encoder = PromptEncoder(TINY.image_encoder.output_dim, TINY.mask_channels)
    own = {name: tree["prompt_encoder"] for name, tree in variables.items()}
    size, grid = TINY.image_encoder.image_size, TINY.image_encoder.grid
    sparse, dense = jax.jit(lambda v, p: encoder.apply(v, p, size, grid))(own, prompts)
    for index, name in enumerate(EVERY_COMBINATION):
        image, place = index % 2, index // 2
        valid = np.asarray(sparse.valid[image, place])
        assert_equal(np.asarray(sparse.tokens[image, place])[valid], frozen[f"sparse/{name}"])
        if name == "mask":
            assert_equal(
                dense[image, place][::FROZEN_STRIDE, ::FROZEN_STRIDE], frozen["dense/mask"]
            )


def test_masks(frozen: dict[str, np.ndarray], variables: Any, prompts: Any) -> None:
    @jax.jit
    def decode_both(variables: Any, embeddings: jax.Array, prompts: Any) -> Any:
        decode = functools.partial(MODEL.apply, variables, embeddings, prompts, method=Sam.decode)
        both = [decode(multimask_output=multimask) for multimask in (False, True)]
        return jax.tree.map(lambda single, three: jnp.concatenate([single, three], 2), *both)

    ours = decode_both(variables, jnp.asarray(frozen["image_embeddings"]), prompts)
    for index, name in enumerate(EVERY_COMBINATION):
        at = index % 2, index // 2
        logits = ours.low_res_logits[at][:, ::FROZEN_STRIDE, ::FROZEN_STRIDE]
        assert_equal(logits, frozen[f"logits/{name}"])
        assert_equal(ours.iou_predictions[at], frozen[f"iou/{name}"])


def test_weights_return_unchanged(frozen: dict[str, np.ndarray]) -> None:
    template = jax.eval_shape(lambda: init_variables(MODEL, jax.random.key(0)))
    weights = select(frozen, "weights/")
    back = from_native(to_native(weights, template))
    assert back.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
        assert back[name].dtype == array.dtype
