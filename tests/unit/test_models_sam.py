"""The whole model: objects and images do not mix, padding is inert, everything can be trained."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sam_jax.models.prompt_encoder import PromptEncoder, Prompts
from sam_jax.models.sam import Sam, SamConfig, init_variables, variable_shapes
from sam_jax.models.variants import VARIANTS
from tests.golden.tiny import (
    EVERY_COMBINATION,
    TINY,
    ragged_batch,
    random_prompts,
    random_variables,
)

MODEL = Sam(TINY)
GRID = TINY.image_encoder.grid
DIM = TINY.image_encoder.output_dim
# Without blocks and layers, which is soon compiled.
SHALLOW = SamConfig(
    dataclasses.replace(TINY.image_encoder, depth=0),
    dataclasses.replace(TINY.mask_decoder, depth=0),
    TINY.mask_channels,
)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape).astype(np.float32))


def every_prompt() -> Prompts:
    """All combinations, six objects in one image and five and a padded one in the other."""
    every = [
        random_prompts(kinds, 1, MODEL.image_size, MODEL.low_res_size)
        for kinds in EVERY_COMBINATION.values()
    ]
    return ragged_batch([every[:6], every[6:]], MODEL.low_res_size)


def test_training_reaches_every_parameter_and_padding_reaches_none() -> None:
    """Garbage at invalid places changes no answer and no gradient, and all gradients are finite."""
    # One layer, the last look, and both heads.
    model = Sam(
        dataclasses.replace(TINY, mask_decoder=dataclasses.replace(TINY.mask_decoder, depth=1))
    )
    variables = random_variables(model.config)
    embeddings, garbage = normal(2, *GRID, DIM), every_prompt()
    clean = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.ones_like(x)), garbage)
    valid = jnp.ones((2, 6), bool).at[1, 5].set(False)
    decoding = {name: variables["params"][name] for name in ("prompt_encoder", "mask_decoder")}

    # It runs twice: compiling it well would take longer.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params: Any, prompts: Prompts) -> Any:
        def loss(params: Any) -> Any:
            trained = {**variables, "params": params}
            both = [
                model.apply(
                    trained, embeddings, prompts, multimask_output=multimask, method=Sam.decode
                )
                for multimask in (False, True)
            ]
            sums = jax.tree.map(
                lambda x: jnp.sum(jnp.where(jnp.expand_dims(valid, range(2, x.ndim)), x, 0) ** 2),
                both,
            )
            return sum(jax.tree.leaves(sums)), both

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, predictions), gradients = run(decoding, garbage)
    (value_clean, predictions_clean), gradients_clean = run(decoding, clean)
    assert value == value_clean
    for x, y in zip(jax.tree.leaves(predictions), jax.tree.leaves(predictions_clean), strict=True):
        np.testing.assert_array_equal(x[valid], y[valid])
    clean_leaves = flatten_dict(gradients_clean, sep="/")
    for path, x in flatten_dict(gradients, sep="/").items():
        assert np.isfinite(x).all(), path
        np.testing.assert_array_equal(x, clean_leaves[path], err_msg=path)
        # A key's bias shifts all logits of a query alike, so its gradient is rounding alone.
        assert np.abs(x).max() > 1e-3 or path.endswith("k_proj/bias"), path


def test_one_call_encodes_and_decodes() -> None:
    prompts = Prompts(boxes_xyxy=normal(2, 1, 4) + 20, box_valid=jnp.ones((2, 1), bool))
    images = normal(2, 28, 64, 3)
    model, variables = Sam(SHALLOW), random_variables(SHALLOW)

    @jax.jit
    def run(images: jax.Array, prompts: Prompts) -> Any:
        embeddings = model.apply(variables, images, method=Sam.encode)
        apply = functools.partial(model.apply, variables, multimask_output=False)
        return apply(images, prompts), apply(embeddings, prompts, method=Sam.decode)

    whole, parts = run(images, prompts)
    # The frame of the coordinates is that of the images given, not the one of the tables.
    assert whole.low_res_logits.shape == (2, 1, 1, 28, 64)
    np.testing.assert_allclose(whole.low_res_logits, parts.low_res_logits, atol=1e-5)
    np.testing.assert_allclose(whole.iou_predictions, parts.iou_predictions, atol=1e-5)


def test_shapes_at_a_size_that_is_not_square() -> None:
    model, size = Sam(VARIANTS["vit_b"]), (640, 1008)
    assert model.image_size == (1024, 1024)
    assert model.low_res_size == (256, 256)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    boxes = jax.ShapeDtypeStruct((2, 5, 4), jnp.float32)
    prompts = Prompts(boxes_xyxy=boxes, box_valid=jax.ShapeDtypeStruct((2, 5), bool))
    prediction = jax.eval_shape(
        functools.partial(model.apply, multimask_output=True),
        variables,
        jax.ShapeDtypeStruct((2, *size, 3), jnp.float32),
        prompts,
    )
    assert prediction.low_res_logits.shape == (2, 5, 3, 160, 252)
    assert prediction.iou_predictions.shape == (2, 5, 3)


def test_fresh_variables() -> None:
    shapes = jax.eval_shape(lambda: init_variables(MODEL, jax.random.key(0)))
    assert variable_shapes(MODEL.config) == shapes
    assert shapes.keys() == {"params", "constants"}
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    prompts = PromptEncoder(256, 4)
    fresh = jax.jit(lambda key: prompts.init(key, Prompts(), (12, 20), (3, 5)))
    frequencies = fresh(jax.random.key(0))["constants"]["frequencies"]
    assert frequencies.shape == (2, 128)
    assert 0.8 < frequencies.std() < 1.2


def test_shapes_are_the_callers_own() -> None:
    shapes = variable_shapes(MODEL.config)
    del shapes["params"]["mask_decoder"]
    assert "mask_decoder" in variable_shapes(MODEL.config)["params"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (40, 46)}, r"\(40, 46\) is not a multiple of the patch size 4"),
        ({"num_heads": 5}, "embed_dim 24 is not divisible by num_heads 5"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamConfig(dataclasses.replace(TINY.image_encoder, **changes), TINY.mask_decoder)
