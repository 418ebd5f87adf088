"""MobileSAM's encoder against frozen answers of its published code; needs no PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.models.sam import Sam, init_variables
from sam_jax.weights.names import to_native
from tests.golden import tiny_mobile_sam as tiny

# Largest allowed difference, over the largest magnitude of the reference's output.
TOLERANCE = 1e-5


def test_image_embeddings() -> None:
    model = Sam(tiny.SMALL)
    template = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    variables = jax.tree.map(jnp.asarray, to_native(tiny.random_tensors(tiny.SMALL), template))
    encode = jax.jit(lambda variables, images: model.apply(variables, images, method=Sam.encode))
    ours = np.asarray(encode(variables, tiny.image()))
    with np.load(tiny.FROZEN) as file:
        theirs = file["image_embeddings"]
    kept = ours[:, :: tiny.FROZEN_STRIDE, :: tiny.FROZEN_STRIDE, ::4]
    assert np.abs(kept - theirs).max() <= TOLERANCE * np.abs(theirs).max()
