"""The image encoder: a plain vision transformer with windows, as in ViTDet."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Float
from sam_jax.models.layers import (
    Dense,
    Mlp,
    NormParams,
    Remat,
    gelu,
    layer_norm,
    remat_block,
    scan_modules,
)
from sam_jax.ops.attention import Implementation, grid_attention
from sam_jax.ops.full_precision import add_shared, multiply
from sam_jax.ops.remat import product_of
from sam_jax.ops.resize import resize_positions
from sam_jax.ops.windows import norm_partition, unpartition_add_norm

_NORM_EPSILON = 1e-6


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
      window_size: side of a window in patches.
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

    def __post_init__(self):
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}"
            )

    def __str__(self) -> str:
        return (
            f"{self.depth} blocks of width {self.embed_dim}, {self.num_heads} heads, windows of "
            f"{self.window_size}, global {list(self.global_attention_blocks)}"
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


class PatchEmbed(nn.Module):
    """A vector for each patch: a convolution with kernel and stride of a patch, as a product."""

    patch_size: int
    embed_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b gh gw d"]:
        patches = rearrange(
            images.astype(self.dtype),
            "b (gh i) (gw j) c -> b gh gw (i j c)",
            i=self.patch_size,
            j=self.patch_size,
        )
        return Dense(self.embed_dim, dtype=self.dtype, name="proj")(patches)


class RelativePositionAttention(nn.Module):
    """Multi-head self-attention of a grid with decomposed relative positions.

    Attributes:
      num_heads: attention heads.
      head_dim: channels of each.
      table_grid: rows and columns that the tables of relative positions are made for; None for
        attention without them.
      implementation: see ``ops.attention.grid_attention``.
    """

    num_heads: int
    head_dim: int
    table_grid: tuple[int, int] | None
    implementation: Implementation = "auto"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "b gh gw d"]) -> Float[Array, "b gh gw d"]:
        qkv = Dense(3 * self.num_heads * self.head_dim, dtype=self.dtype, name="qkv")(tokens)
        rel_pos_h = rel_pos_w = None
        if self.table_grid is not None:
            height, width = self.table_grid
            zeros = nn.initializers.zeros
            rel_pos_h = self.param("rel_pos_h", zeros, (2 * height - 1, self.head_dim))
            rel_pos_w = self.param("rel_pos_w", zeros, (2 * width - 1, self.head_dim))
        out = grid_attention(
            product_of(qkv),
            rel_pos_h,
            rel_pos_w,
            self.num_heads,
            implementation=self.implementation,
        )
        out = Dense(tokens.shape[-1], dtype=self.dtype, name="proj")(product_of(out))
        return product_of(out)


class EncoderBlock(nn.Module):
    """One transformer block: attention in windows, then an MLP, each normalised before it.

    ::

        tokens += unpartition(attn(partition(norm1(tokens))))
        tokens += mlp(norm2(tokens))

    Norms are taken together with what surrounds them, ``norm_partition`` and
    ``unpartition_add_norm``: all of it reads and writes tokens and computes next to nothing.

    Attributes:
      num_heads, head_dim: of the attention.
      mlp_dim: hidden width of the MLP.
      window_size: side of a window; 0 for attention over the whole grid.
      table_grid, implementation: see ``RelativePositionAttention``.
    """

    num_heads: int
    head_dim: int
    mlp_dim: int
    window_size: int
    table_grid: tuple[int, int] | None
    implementation: Implementation = "auto"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b gh gw d"],
        path_scales: Float[Array, "2 b"] | None = None,
    ) -> Float[Array, "b gh gw d"]:
        """The next block's tokens.

        Args:
          tokens: of the block before.
          path_scales: factors of the attention's and the MLP's branch, see ``drop_path_scales``.
        """
        dim, window_size = tokens.shape[-1], self.window_size
        norm1, norm2 = (NormParams(name=name)(dim) for name in ("norm1", "norm2"))
        attention = RelativePositionAttention(
            self.num_heads,
            self.head_dim,
            self.table_grid,
            self.implementation,
            self.dtype,
            name="attn",
        )
        mlp = Mlp((self.mlp_dim, dim), gelu, self.dtype, name="mlp")

        branch, tokens = norm_partition(tokens, norm1, window_size, epsilon=_NORM_EPSILON)
        branch = _scaled(attention(branch), path_scales, 0)
        tokens, branch = unpartition_add_norm(
            tokens, branch, norm2, window_size, epsilon=_NORM_EPSILON
        )
        return tokens + _scaled(mlp(branch), path_scales, 1)


def _scaled(branch: Array, path_scales: Array | None, which: int) -> Array:
    """A residual branch, of which an image may have several windows, times its image's factor."""
    if path_scales is None:
        return branch
    by_image = rearrange(branch, "(b n) h w d -> b n h w d", b=path_scales.shape[1])
    scaled = multiply(by_image, path_scales[which, :, None, None, None, None])
    return scaled.reshape(branch.shape)


def drop_path_scales(
    key: Array, config: ImageEncoderConfig, num_images: int
) -> Float[Array, "depth 2 b"] | None:
    """Factors of every block's two branches: 0 where an image skips it, else what makes up for it.

    The probability grows linearly from 0 at the first block to ``drop_path_rate`` at the last. None
    if that is 0.

    Source: Huang et al. 2016 (stochastic depth), per sample.
    """
    if not config.drop_path_rate:
        return None
    depth = config.depth
    places = np.arange(depth, dtype=np.float32)[:, None, None] / max(depth - 1, 1)
    kept_rates = 1.0 - config.drop_path_rate * places
    kept = jax.random.bernoulli(key, kept_rates, (depth, 2, num_images))
    return jnp.where(kept, 1.0 / np.maximum(kept_rates, np.finfo(np.float32).tiny), 0.0)


class BlockKind(NamedTuple):
    """Window and tables of a block, see ``EncoderBlock``; those alike may run as one loop."""

    window_size: int
    table_grid: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class EncoderBlocks:
    """Consecutive blocks of the calling module, and how they compute; see ``ImageEncoderViT``."""

    remat: Remat
    scan: bool
    implementation: Implementation
    dtype: DTypeLike

    def apply(
        self,
        tokens: Float[Array, "b gh gw d"],
        kinds: Sequence[BlockKind],
        *,
        num_heads: int,
        mlp_rate: float,
        is_initializing: bool,
        path_scales: Float[Array, "depth 2 b"] | None = None,
    ) -> Float[Array, "b gh gw d"]:
        """The last block's tokens.

        Args:
          tokens: of the first.
          kinds: of each block.
          num_heads, mlp_rate: see ``ImageEncoderConfig``.
          is_initializing: whether parameters are being made.
          path_scales: see ``drop_path_scales``.
        """
        dim = tokens.shape[-1]
        block_class = remat_block(EncoderBlock, self.remat)
        blocks = [
            block_class(
                num_heads=num_heads,
                head_dim=dim // num_heads,
                mlp_dim=int(dim * mlp_rate),
                window_size=kind.window_size,
                table_grid=kind.table_grid,
                implementation=self.implementation,
                dtype=self.dtype,
                name=f"block_{index:02d}",
            )
            for index, kind in enumerate(kinds)
        ]
        # Those that run as one loop: consecutive ones of the same kind, or each by itself.
        runs = [[index] for index in range(len(blocks))]
        if self.scan and not is_initializing:
            runs = [
                list(run) for _, run in itertools.groupby(range(len(blocks)), kinds.__getitem__)
            ]
        for run in runs:
            if len(run) > 1:
                scales = None if path_scales is None else path_scales[np.array(run)]
                tokens = scan_modules([blocks[index] for index in run], tokens, scales)
            else:
                scales = None if path_scales is None else path_scales[run[0]]
                tokens = blocks[run[0]](tokens, scales)
        return tokens


def check_multiple(images: Float[Array, "b h w c"], patch_size: int) -> None:
    """Raises ValueError unless height and width of images are multiples of the patch size."""
    _, height, width, _ = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"images of {height} x {width} pixels: height and width must be multiples of the patch "
            f"size {patch_size}"
        )


def neck(
    tokens: Float[Array, "b gh gw d"], output_dim: int, dtype: DTypeLike
) -> Float[Array, "b gh gw o"]:
    """Image embeddings of the last block's tokens; its layers are the calling module's."""
    x = nn.Conv(output_dim, (1, 1), use_bias=False, dtype=dtype, name="neck_conv1")(tokens)
    x = layer_norm(_NORM_EPSILON, dtype, "neck_norm1")(x)
    x = nn.Conv(output_dim, (3, 3), use_bias=False, dtype=dtype, name="neck_conv2")(x)
    return layer_norm(_NORM_EPSILON, dtype, "neck_norm2")(x)


class ImageEncoderViT(nn.Module):
    """Image embeddings, one vector per patch, of normalised images.

    Attributes:
      config: the shape.
      remat: see ``layers.remat_block``.
      scan: whether consecutive blocks of the same kind run as one loop over their stacked
        parameters. It compiles several times faster; each step copies its weights once more. The
        parameters' tree is the same, but linen's ``capture_intermediates`` does not see inside of
        a loop.
      implementation: see ``ops.attention.grid_attention``.
      dtype: type of the computation; parameters are float32.

    Source: Kirillov et al. 2023, section 3 and appendix A; Li et al. 2022 (ViTDet).
    """

    config: ImageEncoderConfig
    remat: Remat = "none"
    scan: bool = False
    implementation: Implementation = "auto"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b h w c"],
        path_scales: Float[Array, "depth 2 b"] | None = None,
    ) -> Float[Array, "b gh gw d"]:
        """Embeds images of any size that is a multiple of the patch size.

        Args:
          images: normalised, zero-padded.
          path_scales: see ``drop_path_scales``; None outside of training.

        Raises:
          ValueError: if height or width is not a multiple of the patch size.
        """
        cfg = self.config
        check_multiple(images, cfg.patch_size)
        tokens = PatchEmbed(cfg.patch_size, cfg.embed_dim, self.dtype, name="patch_embed")(images)
        positions = self.param(
            "pos_embed", nn.initializers.truncated_normal(0.02), (*cfg.grid, cfg.embed_dim)
        )
        tokens = add_shared(tokens, resize_positions(positions, tokens.shape[1:3]))

        windows = BlockKind(cfg.window_size, (cfg.window_size, cfg.window_size))
        whole = BlockKind(0, cfg.grid)
        tokens = EncoderBlocks(self.remat, self.scan, self.implementation, self.dtype).apply(
            tokens,
            [whole if i in cfg.global_attention_blocks else windows for i in range(cfg.depth)],
            num_heads=cfg.num_heads,
            mlp_rate=cfg.mlp_rate,
            is_initializing=self.is_initializing(),
            path_scales=path_scales,
        )
        return neck(tokens, cfg.output_dim, self.dtype)
