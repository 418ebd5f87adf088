"""Prompts to embeddings: which tokens exist, their values by hand, garbage at invalid places."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.models.prompt_encoder import PromptEncoder, Prompts, SparseEmbeddings
from sam_jax.ops.positional import fourier_features, grid_coords
from tests.golden.tiny import (
    EVERY_COMBINATION,
    TINY,
    ragged_batch,
    random_prompts,
    random_variables,
)

DIM = TINY.image_encoder.output_dim
GRID = (3, 5)
SIZE = (12, 20)
LOW_RES = (4 * GRID[0], 4 * GRID[1])
VARIABLES = {name: tree["prompt_encoder"] for name, tree in random_variables(TINY).items()}
PARAMS = VARIABLES["params"]
ENCODER = PromptEncoder(DIM, TINY.mask_channels)


@jax.jit
def embed(prompts: Prompts) -> tuple[SparseEmbeddings, jax.Array]:
    return ENCODER.apply(VARIABLES, prompts, SIZE, GRID)


def embed_sparse(prompts: Prompts) -> SparseEmbeddings:
    return embed(prompts)[0]


def features(x: float, y: float) -> jax.Array:
    """Features of a pixel's centre, which is its index + 0.5, in an image of 20 x 12 pixels."""
    coords = jnp.array([(x + 0.5) / 20, (y + 0.5) / 12])
    return fourier_features(coords, VARIABLES["constants"]["frequencies"])


def test_points_by_hand() -> None:
    coords = jnp.array([[3.0, 2.0], [19.0, 11.0], [0.5, 0.0], [7.0, 7.0], [4.0, 4.0]])
    prompts = Prompts(
        point_coords=jnp.tile(coords, (2, 1, 1, 1)),
        point_labels=jnp.tile(jnp.array([1, 0, 2, 3, -1]), (2, 1, 1)),
        point_valid=jnp.ones((2, 1, 5), bool),
    )
    ours = embed_sparse(prompts)
    kinds = PARAMS["point_kinds"]
    expected = [
        features(3, 2) + kinds[1],
        features(19, 11) + kinds[0],
        features(0.5, 0) + kinds[2],
        features(7, 7) + kinds[3],
        # "Not a point" has no place, and closes every list of points without a box.
        PARAMS["not_a_point"],
        PARAMS["not_a_point"],
    ]
    assert ours.valid.all()
    for image in range(2):
        np.testing.assert_allclose(ours.tokens[image, 0], jnp.stack(expected), atol=2e-5)


def test_boxes_by_hand() -> None:
    boxes = jnp.array([[[1.0, 2.0, 18.5, 9.0]], [[0.0, 0.0, 19.0, 11.0]]])
    ours = embed_sparse(Prompts(boxes_xyxy=boxes, box_valid=jnp.array([[True], [False]])))
    kinds = PARAMS["point_kinds"]
    expected = jnp.stack([features(1, 2) + kinds[2], features(18.5, 9) + kinds[3]])
    np.testing.assert_allclose(ours.tokens[0, 0], expected, atol=2e-5)
    np.testing.assert_array_equal(ours.valid[:, 0], [[True, True], [False, False]])


def test_points_are_closed_by_a_token_unless_there_is_a_box() -> None:
    """Four objects: points, points and box, box, nothing."""
    points = jnp.array([[[1, 1], [1, 0], [0, 0], [0, 0]]], bool)
    boxes = jnp.array([[0, 1, 1, 0]], bool)
    prompts = Prompts(
        point_coords=jnp.ones((2, 4, 2, 2)),
        point_labels=jnp.ones((2, 4, 2), jnp.int32),
        point_valid=jnp.tile(points, (2, 1, 1)),
        boxes_xyxy=jnp.ones((2, 4, 4)),
        box_valid=jnp.tile(boxes, (2, 1)),
    )
    ours = embed_sparse(prompts)
    # The third place is "not a point" or the box's first corner: one leaves it to the other.
    expected = [[1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    np.testing.assert_array_equal(ours.valid[1], np.array(expected, bool))
    np.testing.assert_array_equal(ours.tokens[1, 0, 2], PARAMS["not_a_point"])
    corner = features(1, 1) + PARAMS["point_kinds"][2]
    np.testing.assert_allclose(ours.tokens[1, 1:3, 2], jnp.stack([corner] * 2), atol=2e-5)


def test_text_tokens_are_appended_as_they_are() -> None:
    text = jax.random.normal(jax.random.key(0), (2, 3, 2, DIM))
    valid = jnp.zeros((2, 3, 2), bool).at[:, 1].set(True)
    ours = embed_sparse(
        Prompts(
            boxes_xyxy=jnp.ones((2, 3, 4)),
            box_valid=jnp.ones((2, 3), bool),
            text_tokens=text,
            text_valid=valid,
        )
    )
    np.testing.assert_array_equal(ours.tokens[:, 1, 2:], text[:, 1])
    np.testing.assert_array_equal(ours.valid[:, :, 2:], valid)


def test_no_mask_is_one_shared_vector() -> None:
    sparse, dense = embed(Prompts())
    assert sparse.tokens.shape == (1, 1, 0, DIM)
    assert dense.shape == (1, 1, *GRID, DIM)
    np.testing.assert_array_equal(dense, jnp.broadcast_to(PARAMS["no_mask"], dense.shape))


def test_without_prompts_every_image_has_an_object_without_tokens() -> None:
    ours = ENCODER.apply(
        VARIABLES, Prompts(), SIZE, num_images=3, method=PromptEncoder.sparse_prompt_embeddings
    )
    assert ours.tokens.shape == (3, 1, 0, DIM)
    assert ours.valid.shape == (3, 1, 0)


def test_the_image_has_the_encoding_of_its_tokens_centres() -> None:
    ours = ENCODER.apply(VARIABLES, GRID, method=PromptEncoder.image_pe)
    expected = fourier_features(
        jnp.asarray(grid_coords(GRID)), VARIABLES["constants"]["frequencies"]
    )
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_masks_are_embedded_token_by_token() -> None:
    logits = jax.random.normal(jax.random.key(0), (2, 2, *LOW_RES))
    valid = jnp.array([[True, False], [True, True]])
    _, ours = embed(Prompts(mask_logits=logits, mask_valid=valid))
    assert ours.shape == (2, 2, *GRID, DIM)
    np.testing.assert_array_equal(ours[0, 1], jnp.broadcast_to(PARAMS["no_mask"], (*GRID, DIM)))
    other = Prompts(mask_logits=logits.at[1, 0, 7, 9].add(5.0), mask_valid=valid)
    _, changed = embed(other)
    expected = np.zeros((2, 2, *GRID), bool)
    expected[1, 0, 7 // 4, 9 // 4] = True
    np.testing.assert_array_equal((changed != ours).any(-1), expected)


@pytest.mark.parametrize("has_masks", [False, True])
def test_masks_are_added_to_the_image(has_masks: bool) -> None:
    prompts = Prompts()
    if has_masks:
        logits = jax.random.normal(jax.random.key(0), (2, 3, *LOW_RES))
        prompts = Prompts(mask_logits=logits, mask_valid=jnp.ones((2, 3), bool))
    image = jax.random.normal(jax.random.key(1), (2, *GRID, DIM))
    ours = ENCODER.apply(
        VARIABLES, image, prompts, method=PromptEncoder.add_dense_prompt_embeddings
    )
    _, dense = embed(prompts)
    np.testing.assert_allclose(ours, image[:, None] + dense, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"point_coords": jnp.ones((1, 1, 1, 2)), "point_valid": jnp.ones((1, 1, 1), bool)},
        {"point_coords": jnp.ones((1, 1, 1, 2)), "point_labels": jnp.ones((1, 1, 1), int)},
        {"boxes_xyxy": jnp.ones((1, 1, 4))},
        {"mask_valid": jnp.ones((1, 1), bool)},
        {"text_tokens": jnp.ones((1, 1, 1, DIM))},
    ],
)
def test_incomplete_prompts_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be given together"):
        ENCODER.apply(VARIABLES, Prompts(**fields), SIZE, GRID)


def test_what_is_invalid_changes_no_output_and_no_gradient() -> None:
    every = [random_prompts(kinds, 1, SIZE, LOW_RES) for kinds in EVERY_COMBINATION.values()]
    garbage = ragged_batch([every[:6], every[6:]], LOW_RES)
    text_valid = jnp.zeros((2, 6, 2), bool).at[0, 3].set(True)
    garbage = garbage.replace(
        text_tokens=jnp.where(text_valid[..., None], 0.5, jnp.inf) + jnp.zeros(DIM),
        text_valid=text_valid,
    )
    assert not all(np.isfinite(x).all() for x in jax.tree.leaves(garbage))
    clean = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.ones_like(x)), garbage)
    clean = clean.replace(point_labels=jnp.where(clean.point_valid, clean.point_labels, 0))

    @jax.jit
    def run(params: Any, prompts: Prompts) -> Any:
        def loss(params: Any, floats: Prompts) -> Any:
            everything = jax.tree.map(
                lambda x, y: y if x.dtype == jnp.float32 else x, prompts, floats
            )
            variables = {**VARIABLES, "params": params}
            sparse, dense = ENCODER.apply(variables, everything, SIZE, GRID)
            valid_tokens = jnp.where(sparse.valid[..., None], sparse.tokens, 0.0)
            return jnp.sum(valid_tokens**2) + jnp.sum(dense**2), (valid_tokens, dense)

        grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)
        return grad(params, prompts)

    ours, expected = run(PARAMS, garbage), run(PARAMS, clean)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(x.dtype, jnp.floating):
            assert np.isfinite(x).all()
            np.testing.assert_array_equal(x, y)
