"""The two-way transformer: prompt tokens and image tokens attend to each other."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Bool, Float, UInt32
from sam_jax.models.layers import LECUN_NORMAL, DenseParams, Mlp, NormParams, layer_norm
from sam_jax.ops.dropout import branch_seeds, dropout
from sam_jax.ops.full_precision import add_shared
from sam_jax.ops.token_attention import (
    AttentionWeights,
    image_to_token_attention,
    token_attention,
    token_to_image_attention,
)

_NORM_EPSILON = 1e-5
# Places with dropout in a layer, by which their random bits differ; there is room for more.
_BRANCHES = ("self-attention", "token to image", "mlp", "image to token")
_MOST_BRANCHES = 8


class AttentionParams(nn.Module):
    """Parameters of multi-head attention.

    Attributes:
      downsample_rate: of the embedding's width over that of all heads.
    """

    downsample_rate: int = 1

    @nn.compact
    def __call__(self, dim: int) -> AttentionWeights:
        inner = dim // self.downsample_rate
        # Queries and keys start with the same projection, so that attention starts as a kernel on
        # positions: a click looks around itself from the first step on, and need not learn to.
        shared_key = self.make_rng("params") if self.is_initializing() else None

        def same_for_both(key, shape, dtype=jnp.float32):
            return LECUN_NORMAL(key if shared_key is None else shared_key, shape, dtype)

        return AttentionWeights(
            *DenseParams(inner, same_for_both, name="q_proj")(dim),
            *DenseParams(inner, same_for_both, name="k_proj")(dim),
            *DenseParams(inner, name="v_proj")(dim),
            *DenseParams(dim, name="out_proj")(inner),
        )


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of tokens, tokens to image, MLP of tokens, image to tokens.

    Attributes:
      index: of the layer; the first's tokens are their own positional encoding, so its
        self-attention takes them as they are and replaces them.
    """

    num_heads: int
    mlp_dim: int
    index: int
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b #p t d"],
        image_tokens: Float[Array, "b #p k d"],
        token_pe: Float[Array, "b #p t d"],
        image_pe: Float[Array, "k d"],
        tokens_valid: Bool[Array, "b #p t"],
        dropout_seeds: UInt32[Array, "b p"] | None,
    ) -> tuple[Float[Array, "b p t d"], Float[Array, "b #p k d"]]:
        dim, heads = tokens.shape[-1], self.num_heads

        def seeds(branch):
            if dropout_seeds is None:
                return None
            return branch_seeds(
                dropout_seeds, _MOST_BRANCHES * self.index + _BRANCHES.index(branch)
            )

        def drop(x, branch):
            return dropout(x, seeds(branch), self.dropout_rate)

        def norm(name, x):
            return layer_norm(_NORM_EPSILON, self.dtype, name)(x)

        # Self-attention of the tokens.
        weights = AttentionParams(name="self_attn")(dim)
        if self.index == 0:
            tokens = token_attention(weights, tokens, tokens, tokens, tokens_valid, num_heads=heads)
            tokens = drop(tokens, "self-attention")
        else:
            q = tokens + token_pe
            update = token_attention(weights, q, q, tokens, tokens_valid, num_heads=heads)
            tokens = add_shared(drop(update, "self-attention"), tokens)
        tokens = norm("norm1", tokens)

        # Attention of the tokens to the image, whose tokens come back as they are: going through
        # the operation, their gradients are summed there.
        weights = AttentionParams(2, name="cross_attn_token_to_image")(dim)
        update, image_tokens = token_to_image_attention(
            weights, tokens + token_pe, image_tokens, image_pe, num_heads=heads
        )
        tokens = norm("norm2", add_shared(drop(update, "token to image"), tokens))

        # MLP of each token.
        mlp = Mlp((self.mlp_dim, dim), nn.relu, self.dtype, name="mlp")
        tokens = norm("norm3", add_shared(drop(mlp(tokens), "mlp"), tokens))

        # Attention of the image to the tokens.
        image_tokens = image_to_token_attention(
            AttentionParams(2, name="cross_attn_image_to_token")(dim),
            NormParams(name="norm4")(dim),
            image_tokens,
            image_pe,
            tokens + token_pe,
            tokens,
            tokens_valid,
            seeds("image to token"),
            num_heads=heads,
            dropout_rate=self.dropout_rate,
            norm_epsilon=_NORM_EPSILON,
        )
        return tokens, image_tokens


class TwoWayTransformer(nn.Module):
    """Tokens and image tokens after ``depth`` two-way layers and one last look at the image.

    Until the first layer updates them, the image tokens are the same for all objects of an image
    (unless a mask was given): their projections are then computed once per image.

    Source: Kirillov et al. 2023, appendix A, "Lightweight mask decoder".
    """

    depth: int = 2
    num_heads: int = 8
    mlp_dim: int = 2048
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b #p t d"],
        image_tokens: Float[Array, "b #p k d"],
        image_pe: Float[Array, "k d"],
        tokens_valid: Bool[Array, "b #p t"],
        *,
        dropout_seeds: UInt32[Array, "b p"] | None = None,
    ) -> tuple[Float[Array, "b p t d"], Float[Array, "b #p k d"]]:
        """Updated tokens and image tokens.

        Args:
          tokens: output tokens followed by the prompts' tokens.
          image_tokens: image embeddings with the dense prompt embeddings added, of each image
            (p = 1) or object.
          image_pe: positional encoding of the image tokens.
          tokens_valid: tokens that exist; the others are attended to by nothing.
          dropout_seeds: of each object, in training; None for no dropout.
        """
        # As in the paper: each attention adds the original tokens again.
        token_pe = tokens
        for index in range(self.depth):
            tokens, image_tokens = TwoWayAttentionBlock(
                num_heads=self.num_heads,
                mlp_dim=self.mlp_dim,
                index=index,
                dropout_rate=self.dropout_rate,
                dtype=self.dtype,
                name=f"layer_{index}",
            )(tokens, image_tokens, token_pe, image_pe, tokens_valid, dropout_seeds)
        weights = AttentionParams(2, name="final_attn_token_to_image")(tokens.shape[-1])
        update, image_tokens = token_to_image_attention(
            weights, tokens + token_pe, image_tokens, image_pe, num_heads=self.num_heads
        )
        seeds = None
        if dropout_seeds is not None:
            seeds = branch_seeds(dropout_seeds, _MOST_BRANCHES * self.depth)
        tokens = add_shared(dropout(update, seeds, self.dropout_rate), tokens)
        return layer_norm(_NORM_EPSILON, self.dtype, "norm_final")(tokens), image_tokens
