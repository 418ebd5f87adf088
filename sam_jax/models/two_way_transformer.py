"""The two-way transformer: prompt tokens and image cells attend to each other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Bool, Float
from sam_jax.models.layers import Mlp, layer_norm


class Attention(nn.Module):
    """Multi-head attention whose inner width may be smaller than the embedding's.

    Queries and keys carry an axis of objects that may be 1 on either side where all objects of an
    image share it: it is broadcast inside the product and never copied.
    """

    num_heads: int
    downsample_rate: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b #p s d"],
        keys: Float[Array, "b #p t d"],
        values: Float[Array, "b #p t d"],
        keys_valid: Bool[Array, "b #p t"] | None = None,
    ) -> Float[Array, "b p s d"]:
        dim = queries.shape[-1]
        inner = dim // self.downsample_rate

        # Queries and keys start with the same projection, so that attention starts as a kernel on
        # positions: a click looks around itself from the first step on, and need not learn to.
        lecun_normal = nn.initializers.lecun_normal()
        init_key = self.make_rng("params") if self.is_initializing() else None

        def same_for_both(key, shape, dtype):
            return lecun_normal(key if init_key is None else init_key, shape, dtype)

        def project(name, x):
            kernel_init = lecun_normal if name == "v_proj" else same_for_both
            x = nn.Dense(inner, dtype=self.dtype, kernel_init=kernel_init, name=name)(x)
            return rearrange(x, "b p t (a c) -> b p t a c", a=self.num_heads)

        q = project("q_proj", queries)
        k = project("k_proj", keys)
        v = project("v_proj", values)
        scale = (inner // self.num_heads) ** -0.5
        shared = k.shape[1] == 1
        if shared:
            k, v = k[:, 0], v[:, 0]
        keys_axes = "btac" if shared else "bptac"
        if q.shape[1] == 1 and not shared:
            # Only the image side is shared: its queries meet every object's keys.
            logits = jnp.einsum("bsac,bptac->bpast", q[:, 0], k, preferred_element_type=jnp.float32)
        else:
            logits = jnp.einsum(
                f"bpsac,{keys_axes}->bpast", q, k, preferred_element_type=jnp.float32
            )
        logits = logits * scale
        if keys_valid is not None:
            logits = jnp.where(keys_valid[:, :, None, None, :], logits, -jnp.inf)
        probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out = jnp.einsum(f"bpast,{keys_axes}->bpsac", probs, v)
        return nn.Dense(dim, dtype=self.dtype, name="out_proj")(
            rearrange(out, "b p s a c -> b p s (a c)")
        )


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
