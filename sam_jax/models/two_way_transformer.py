"""The two-way transformer: prompt tokens and image cells attend to each other."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Bool, Float
from sam_jax.models.layers import Mlp, layer_norm
from sam_jax.models.token_attention import Attention


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of tokens, tokens to image, MLP of tokens, image to tokens.

    Attributes:
      first: whether this is the first layer, whose tokens are their own positional encoding, so
        that the self-attention takes them as they are and replaces them.
    """

    num_heads: int
    mlp_dim: int
    first: bool
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b #p t d"],
        cells: Float[Array, "b #p k d"],
        token_pe: Float[Array, "b #p t d"],
        cell_pe: Float[Array, "k d"],
        tokens_valid: Bool[Array, "b #p t"],
        *,
        train: bool,
    ) -> tuple[Float[Array, "b p t d"], Float[Array, "b p k d"]]:
        def dropout(x):
            return nn.Dropout(self.dropout_rate)(x, deterministic=not train)

        def attention(name, downsample_rate=2):
            return Attention(self.num_heads, downsample_rate, self.dtype, name=name)

        def norm(name, x):
            return layer_norm(1e-5, self.dtype, name)(x)

        self_attention = attention("self_attn", downsample_rate=1)
        if self.first:
            tokens = dropout(self_attention(tokens, tokens, tokens, tokens_valid))
        else:
            q = tokens + token_pe
            tokens = tokens + dropout(self_attention(q, q, tokens, tokens_valid))
        tokens = norm("norm1", tokens)

        to_image = attention("cross_attn_token_to_image")
        tokens = tokens + dropout(to_image(tokens + token_pe, cells + cell_pe, cells))
        tokens = norm("norm2", tokens)

        mlp = Mlp((self.mlp_dim, tokens.shape[-1]), nn.relu, self.dtype, name="mlp")
        tokens = norm("norm3", tokens + dropout(mlp(tokens)))

        to_tokens = attention("cross_attn_image_to_token")
        cells = cells + dropout(to_tokens(cells + cell_pe, tokens + token_pe, tokens, tokens_valid))
        return tokens, norm("norm4", cells)


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

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b #p t d"],
        cells: Float[Array, "b #p k d"],
        cell_pe: Float[Array, "k d"],
        tokens_valid: Bool[Array, "b #p t"],
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "b p t d"], Float[Array, "b p k d"]]:
        """Updated tokens and cells.

        Args:
          tokens: output tokens followed by the prompts' tokens.
          cells: image embeddings with the dense prompt added, one set per image (p = 1) or object.
          cell_pe: positional encoding of the cells.
          tokens_valid: tokens that exist; the others are attended to by nothing.
          train: whether dropout acts; needs a ``dropout`` key then.
        """
        token_pe = tokens
        for index in range(self.depth):
            tokens, cells = TwoWayAttentionBlock(
                num_heads=self.num_heads,
                mlp_dim=self.mlp_dim,
                first=index == 0,
                dropout_rate=self.dropout_rate,
                dtype=self.dtype,
                name=f"layer_{index}",
            )(tokens, cells, token_pe, cell_pe, tokens_valid, train=train)
        last = Attention(self.num_heads, 2, self.dtype, name="final_attn_token_to_image")
        looked = last(tokens + token_pe, cells + cell_pe, cells)
        looked = nn.Dropout(self.dropout_rate)(looked, deterministic=not train)
        return layer_norm(1e-5, self.dtype, "norm_final")(tokens + looked), cells
