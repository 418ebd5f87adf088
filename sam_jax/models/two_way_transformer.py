"""The two-way transformer: prompt tokens and image cells attend to each other."""

import itertools

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Bool, Float, UInt32
from sam_jax.models.layers import Mlp, NormWeights, layer_norm
from sam_jax.models.token_attention import (
    NORM_EPSILON,
    Attention,
    AttentionWeights,
    answer_cells,
    ask_cells,
    fits_kernels,
)
from sam_jax.ops.dropout import branch_seeds
from sam_jax.ops.dropout import dropout as drop_some
from sam_jax.ops.full_precision import add_shared, broadcast_to
from sam_jax.ops.placement import Kernels

# Places with dropout in a layer, at most.
_MOST_BRANCHES = 8


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of tokens, tokens to image, MLP of tokens, image to tokens.

    Attributes:
      index: of the layer; the first's tokens are their own positional encoding, so its
        self-attention takes them as they are and replaces them.
      kernels: see ``Placement.kernels``.
    """

    num_heads: int
    mlp_dim: int
    index: int
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    kernels: Kernels = "none"

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b #p t d"],
        cells: Float[Array, "b #p k d"],
        token_pe: Float[Array, "b #p t d"],
        cell_pe: Float[Array, "k d"],
        tokens_valid: Bool[Array, "b #p t"],
        dropout_seeds: UInt32[Array, "b p"] | None,
    ) -> tuple[Float[Array, "b p t d"], Float[Array, "b p k d"]]:
        branch = itertools.count(_MOST_BRANCHES * self.index)
        in_kernels, interpret = self.kernels != "none", self.kernels == "interpreted"

        def dropout(x):
            return drop_some(x, dropout_seeds, next(branch), self.dropout_rate)

        def attention(name, downsample_rate=2):
            return Attention(self.num_heads, downsample_rate, self.dtype, name=name)

        def weights(name):
            return AttentionWeights(self.num_heads, 2, self.dtype, name=name)(tokens.shape[-1])

        def norm(name, x):
            return layer_norm(NORM_EPSILON, self.dtype, name)(x)

        self_attention = attention("self_attn", downsample_rate=1)
        if self.index == 0:
            tokens = dropout(self_attention(tokens, tokens, tokens, tokens_valid))
        else:
            q = tokens + token_pe
            tokens = add_shared(dropout(self_attention(q, q, tokens, tokens_valid)), tokens)
        tokens = norm("norm1", tokens)

        name = "cross_attn_token_to_image"
        if in_kernels:
            looked, cells = ask_cells(
                weights(name), tokens + token_pe, cells, cell_pe, interpret=interpret
            )
        else:
            looked = attention(name)(tokens + token_pe, cells + cell_pe, cells)
        tokens = norm("norm2", add_shared(dropout(looked), tokens))

        mlp = Mlp((self.mlp_dim, tokens.shape[-1]), nn.relu, self.dtype, name="mlp")
        tokens = norm("norm3", add_shared(dropout(mlp(tokens)), tokens))

        name = "cross_attn_image_to_token"
        if in_kernels:
            seeds = None if dropout_seeds is None else branch_seeds(dropout_seeds, next(branch))
            cells = answer_cells(
                weights(name),
                NormWeights(name="norm4")(cells.shape[-1]),
                cells,
                cell_pe,
                tokens + token_pe,
                tokens,
                tokens_valid,
                seeds,
                self.dropout_rate,
                interpret=interpret,
            )
            return tokens, cells
        answered = attention(name)(cells + cell_pe, tokens + token_pe, tokens, tokens_valid)
        return tokens, norm("norm4", add_shared(dropout(answered), cells))


class TwoWayTransformer(nn.Module):
    """Tokens and image cells after ``depth`` two-way layers and one last look at the image.

    Until the first layer updates them, the cells of an image are the same for all of its objects
    (unless a mask was given): their projections are then computed once per image.

    Source: Kirillov et al. 2023, appendix A, "Lightweight mask decoder".
    """

    depth: int = 2
    num_heads: int = 8
    mlp_dim: int = 2048
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    kernels: Kernels = "none"

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b #p t d"],
        cells: Float[Array, "b #p k d"],
        cell_pe: Float[Array, "k d"],
        tokens_valid: Bool[Array, "b #p t"],
        *,
        dropout_seeds: UInt32[Array, "b p"] | None = None,
    ) -> tuple[Float[Array, "b p t d"], Float[Array, "b p k d"]]:
        """Updated tokens and cells.

        Args:
          tokens: output tokens followed by the prompts' tokens.
          cells: image embeddings with the dense prompt added, one set per image (p = 1) or object.
          cell_pe: positional encoding of the cells.
          tokens_valid: tokens that exist; the others are attended to by nothing.
          dropout_seeds: of each object, in training; None for no dropout.
        """
        kernels = self.kernels if fits_kernels(tokens, cells, self.num_heads) else "none"
        if kernels != "none":
            # They work on one object after the other, so each has its own.
            objects = jnp.broadcast_shapes(tokens.shape[:2], cells.shape[:2])
            tokens_valid = jnp.broadcast_to(tokens_valid, (*objects, *tokens_valid.shape[2:]))
            tokens, cells = (
                broadcast_to(x, (*objects, *x.shape[2:]), x.dtype) for x in (tokens, cells)
            )
        token_pe = tokens
        for index in range(self.depth):
            tokens, cells = TwoWayAttentionBlock(
                num_heads=self.num_heads,
                mlp_dim=self.mlp_dim,
                index=index,
                dropout_rate=self.dropout_rate,
                dtype=self.dtype,
                kernels=kernels,
                name=f"layer_{index}",
            )(tokens, cells, token_pe, cell_pe, tokens_valid, dropout_seeds)
        name = "final_attn_token_to_image"
        if kernels != "none":
            weights = AttentionWeights(self.num_heads, 2, self.dtype, name=name)(tokens.shape[-1])
            interpret = kernels == "interpreted"
            looked, cells = ask_cells(
                weights, tokens + token_pe, cells, cell_pe, interpret=interpret
            )
        else:
            last = Attention(self.num_heads, 2, self.dtype, name=name)
            looked = last(tokens + token_pe, cells + cell_pe, cells)
        looked = drop_some(looked, dropout_seeds, _MOST_BRANCHES * self.depth, self.dropout_rate)
        return layer_norm(NORM_EPSILON, self.dtype, "norm_final")(add_shared(looked, tokens)), cells
