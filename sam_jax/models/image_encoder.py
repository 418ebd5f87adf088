"""The image encoder: a plain vision transformer with windows, as in ViTDet."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Float
from sam_jax.models.layers import Mlp, gelu, layer_norm
from sam_jax.ops.attention import Implementation, grid_attention
from sam_jax.ops.resize import resize_positions
from sam_jax.ops.windows import window_partition, window_unpartition


@dataclasses.dataclass(frozen=True)
class ImageEncoderConfig:
    """Shape of an image encoder.

    Attributes:
      image_size: height and width in pixels that the table of positions is made for; other sizes
        work and interpolate it.
      patch_size: side of a patch in pixels.
      embed_dim: width of the transformer.
      depth: number of blocks.
      num_heads: attention heads per block.
      global_attention_blocks: indices of the blocks that see the whole grid; the others see
        windows.
      window_size: side of a window in cells.
      mlp_rate: hidden width of a block's MLP over ``embed_dim``.
      output_dim: channels of the image embeddings.
      drop_path_rate: probability that the last block's residual branches are skipped in training;
        it grows linearly from 0 at the first block.
    """

    image_size: tuple[int, int] = (1024, 1024)
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    global_attention_blocks: Sequence[int] = (2, 5, 8, 11)
    window_size: int = 14
    mlp_rate: float = 4.0
    output_dim: int = 256
    drop_path_rate: float = 0.0

    @property
    def grid(self) -> tuple[int, int]:
        """Cells of the patch grid, (rows, columns)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


class RelativePositionAttention(nn.Module):
    """Multi-head self-attention of a grid with decomposed relative positions.

    Attributes:
      num_heads: attention heads.
      table_grid: rows and columns that the tables of relative positions are made for.
      implementation: see ``ops.attention.grid_attention``.
    """

    num_heads: int
    table_grid: tuple[int, int]
    implementation: Implementation = "auto"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "b gh gw d"]) -> Float[Array, "b gh gw d"]:
        dim = tokens.shape[-1]
        head_dim = dim // self.num_heads
        qkv = nn.Dense(3 * dim, dtype=self.dtype, name="qkv")(tokens)
        q, k, v = rearrange(qkv, "b h w (three a c) -> three b h w a c", three=3, a=self.num_heads)
        rel_pos_h, rel_pos_w = (
            self.param(name, nn.initializers.zeros, (2 * size - 1, head_dim))
            for name, size in zip(("rel_pos_h", "rel_pos_w"), self.table_grid, strict=True)
        )
        out = grid_attention(q, k, v, rel_pos_h, rel_pos_w, implementation=self.implementation)
        return nn.Dense(dim, dtype=self.dtype, name="proj")(
            rearrange(out, "b h w a c -> b h w (a c)")
        )


class DropPath(nn.Module):
    """Skips a residual branch for a random part of the images and scales the rest up.

    Source: Huang et al. 2016 (stochastic depth), per sample.
    """

    rate: float

    @nn.compact
    def __call__(self, branch: Float[Array, "b ..."], *, train: bool) -> Float[Array, "b ..."]:
        # Broadcasting over all axes but the first drops whole images.
        return nn.Dropout(self.rate, broadcast_dims=tuple(range(1, branch.ndim)))(
            branch, deterministic=not train
        )


class EncoderBlock(nn.Module):
    """One transformer block; ``window_size`` 0 means attention over the whole grid."""

    num_heads: int
    mlp_rate: float
    window_size: int
    table_grid: tuple[int, int]
    drop_path_rate: float = 0.0
    implementation: Implementation = "auto"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "b gh gw d"], train: bool) -> Float[Array, "b gh gw d"]:
        # ``train`` is positional because nn.remat marks static arguments by position.
        attention = RelativePositionAttention(
            self.num_heads, self.table_grid, self.implementation, self.dtype, name="attn"
        )
        branch = layer_norm(1e-6, self.dtype, "norm1")(tokens)
        if self.window_size:
            windows = attention(window_partition(branch, self.window_size))
            branch = window_unpartition(windows, tokens.shape[1:3])
        else:
            branch = attention(branch)
        tokens = tokens + DropPath(self.drop_path_rate, name="drop_path1")(branch, train=train)
        branch = layer_norm(1e-6, self.dtype, "norm2")(tokens)
        dim = tokens.shape[-1]
        branch = Mlp((int(dim * self.mlp_rate), dim), gelu, self.dtype, name="mlp")(branch)
        return tokens + DropPath(self.drop_path_rate, name="drop_path2")(branch, train=train)


class PatchEmbed(nn.Module):
    """A vector for each patch: a convolution with kernel and stride of a patch, as a product."""

    patch_size: int
    embed_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b gh gw d"]:
        patches = rearrange(
            images.astype(self.dtype),
            "b (gh i) (gw j) c -> b gh gw (i j c)",
            i=self.patch_size,
            j=self.patch_size,
        )
        return nn.Dense(self.embed_dim, dtype=self.dtype, name="proj")(patches)


class ImageEncoderViT(nn.Module):
    """Image embeddings, one vector per patch, of normalised images.

    Attributes:
      config: the shape.
      remat: whether each block's activations are computed again in the backward pass instead of
        being kept.
      implementation: see ``ops.attention.grid_attention``.
      dtype: type of the computation; parameters are float32.

    Source: Kirillov et al. 2023, section 3 and appendix A; Li et al. 2022 (ViTDet).
    """

    config: ImageEncoderConfig
    remat: bool = False
    implementation: Implementation = "auto"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], *, train: bool = False
    ) -> Float[Array, "b gh gw d"]:
        """Embeds images of any size that is a multiple of the patch size.

        Raises:
          ValueError: if height or width is not a multiple of the patch size.
        """
        cfg = self.config
        if images.shape[1] % cfg.patch_size or images.shape[2] % cfg.patch_size:
            raise ValueError(
                f"images of {images.shape[1]} x {images.shape[2]} pixels: height and width must be "
                f"multiples of the patch size {cfg.patch_size}"
            )
        tokens = PatchEmbed(cfg.patch_size, cfg.embed_dim, self.dtype, name="patch_embed")(images)
        positions = self.param(
            "pos_embed", nn.initializers.truncated_normal(0.02), (*cfg.grid, cfg.embed_dim)
        )
        grid = tokens.shape[1:3]
        tokens = tokens + resize_positions(positions, grid).astype(tokens.dtype)

        block_class = nn.remat(EncoderBlock, static_argnums=(2,)) if self.remat else EncoderBlock
        for index in range(cfg.depth):
            everywhere = index in cfg.global_attention_blocks
            window = 0 if everywhere else cfg.window_size
            tokens = block_class(
                num_heads=cfg.num_heads,
                mlp_rate=cfg.mlp_rate,
                window_size=window,
                table_grid=cfg.grid if everywhere else (window, window),
                drop_path_rate=cfg.drop_path_rate * index / max(cfg.depth - 1, 1),
                implementation=self.implementation,
                dtype=self.dtype,
                name=f"block_{index:02d}",
            )(tokens, train)

        x = nn.Conv(cfg.output_dim, (1, 1), use_bias=False, dtype=self.dtype, name="neck_conv1")(
            tokens
        )
        x = layer_norm(1e-6, self.dtype, "neck_norm1")(x)
        x = nn.Conv(cfg.output_dim, (3, 3), use_bias=False, dtype=self.dtype, name="neck_conv2")(x)
        return layer_norm(1e-6, self.dtype, "neck_norm2")(x)
