"""Made-up weights, images and prompts: what values they have does not change the time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.models.prompt_encoder import Prompts


def random_like(shapes: Any) -> Any:
    """Small random numbers for a tree of shapes, without compiling an initialiser."""
    rng = np.random.default_rng(0)

    def values(leaf):
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    return jax.tree.map(values, shapes)


def random_prompts(
    batch: int,
    num_prompts: int,
    num_points: int,
    image_size: tuple[int, int],
    mask_size: tuple[int, int] | None,
) -> Prompts:
    """Foreground points, and a mask if its size is given."""
    rng = np.random.default_rng(0)
    shape = (batch, num_prompts)
    coords = rng.uniform(0, image_size[::-1], (*shape, num_points, 2))
    masks = None
    if mask_size is not None:
        masks = jnp.asarray(rng.standard_normal((*shape, *mask_size), np.float32))
    return Prompts(
        point_coords=jnp.asarray(coords, jnp.float32),
        point_labels=jnp.ones((*shape, num_points), jnp.int32),
        point_valid=jnp.ones((*shape, num_points), bool),
        mask_logits=masks,
        mask_valid=None if masks is None else jnp.ones(shape, bool),
    )
