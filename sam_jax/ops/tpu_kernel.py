"""What kernels for TPUs share."""

import jax
import jax.numpy as jnp

# Numbers in a row of a vector register, and rows.
LANES = 128
SUBLANES = 8
# Of the memory beside a core: what is fetched for the next step, and a handful of blocks of logits.
VMEM_LIMIT_BYTES = 100 * 2**20


def product(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """A product in float32; ``contracted`` are the axes that are summed over."""
    return jax.lax.dot_general(
        a,
        b,
        (((contracted[0],), (contracted[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
