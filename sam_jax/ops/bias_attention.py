"""Attention in a window with a learned bias for each distance, as LeViT and TinyViT have it."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sam_jax.arrays import Array, Float
from sam_jax.ops.attention import mean_by_softmax
from sam_jax.ops.full_precision import multiply


def bias_attention(
    qkv: Float[Array, "n s s e"], biases: Float[Array, "a s s"]
) -> Float[Array, "n s s d"]:
    """Softmax attention of all tokens of a window with each other.

    Logits are ``q . k / sqrt(c) + biases[rows between, columns between]`` in float32.

    Args:
      qkv: projections of every token as one dense layer makes them, e = 3 d: query, key and value
        of the first head, then those of the next.
      biases: of each head, by rows and by columns between query and key, without direction.

    Source: Graham et al. 2021 (LeViT), section 4.
    """
    heads, size, _ = biases.shape
    q, k, v = rearrange(qkv, "n h w (a three c) -> three n a (h w) c", three=3, a=heads)
    logits = jnp.einsum(
        "naqc,nakc->naqk", multiply(q, q.shape[-1] ** -0.5), k, preferred_element_type=jnp.float32
    )
    out = mean_by_softmax(logits + biases_of_pairs(biases), v)
    return rearrange(out, "n a (h w) c -> n h w (a c)", h=size)


def biases_of_pairs(
    biases: Float[Array | np.ndarray, "a s s"],
) -> Float[Array | np.ndarray, "a t t"]:
    """The bias of each pair of a window's tokens, which are in row-major order."""
    places = np.arange(biases.shape[1])
    distances = np.abs(places[:, None] - places)
    by_rows = biases[:, distances]
    return rearrange(by_rows[..., distances], "a qh kh qw kw -> a (qh qw) (kh kw)")
