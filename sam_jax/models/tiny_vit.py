"""The image encoder of MobileSAM: TinyViT, convolutions first and then attention in windows."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Float
from sam_jax.models.image_encoder import check_multiple, neck
from sam_jax.models.layers import LECUN_NORMAL, Dense, Mlp, Remat, gelu, layer_norm, remat_block
from sam_jax.ops.bias_attention import bias_attention
from sam_jax.ops.convolution import conv, depthwise_conv
from sam_jax.ops.windows import window_partition, window_unpartition

_NORM_EPSILON = 1e-5
# Strides of the two convolutions before the first stage, and of the step to each next stage.
_PATCH_STRIDE = 4
MERGE_STRIDES = (2, 2, 1)
_NUM_STAGES = 1 + len(MERGE_STRIDES)


@dataclasses.dataclass(frozen=True)
class TinyViTConfig:
    """Shape of a TinyViT image encoder.

    Attributes:
      image_size: height and width in pixels of the input; others work, as there is no table of
        absolute positions.
      embed_dims: width of each of the four stages.
      depths: blocks of each stage.
      num_heads: attention heads of each stage; that of the first, which has none, is not used.
      window_sizes: sides of windows in tokens, likewise.
      mlp_rate: hidden width of an MLP over its stage's width.
      expand_rate: hidden width of the first stage's convolutions over its width.
      output_dim: channels of the image embeddings.
    """

    image_size: tuple[int, int] = (1024, 1024)
    embed_dims: Sequence[int] = (64, 128, 160, 320)
    depths: Sequence[int] = (2, 2, 6, 2)
    num_heads: Sequence[int] = (2, 4, 5, 10)
    window_sizes: Sequence[int] = (7, 7, 14, 7)
    mlp_rate: float = 4.0
    expand_rate: float = 4.0
    output_dim: int = 256

    def __post_init__(self):
        stages = {"embed_dims", "depths", "num_heads", "window_sizes"}
        lengths = {name: len(getattr(self, name)) for name in sorted(stages)}
        if set(lengths.values()) != {_NUM_STAGES}:
            raise ValueError(f"expected values for {_NUM_STAGES} stages, found {lengths}")
        for dim, heads in zip(self.embed_dims[1:], self.num_heads[1:], strict=True):
            if dim % heads:
                raise ValueError(f"embed_dims {dim} is not divisible by num_heads {heads}")

    def __str__(self) -> str:
        return (
            f"TinyViT of {list(self.depths)} blocks of widths {list(self.embed_dims)}, "
            f"{list(self.num_heads[1:])} heads, windows of {list(self.window_sizes[1:])}"
        )

    @property
    def patch_size(self) -> int:
        """Pixels per side of a token of the image embeddings."""
        return _PATCH_STRIDE * int(np.prod(MERGE_STRIDES))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image embeddings."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


class Conv(nn.Module):
    """A convolution with a bias, zero-padded by half its kernel.

    The published model has a batch normalisation here in place of the bias. Its statistics do not
    change once the model is trained, so it is a factor and a shift, which checkpoints are read
    with: the convolution's kernel is multiplied, and the bias is the shift (``weights.names``).

    Attributes:
      features: channels of the output.
      kernel_size: side of the kernel in pixels.
      stride: pixels between outputs.
    """

    features: int
    kernel_size: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow d"]:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", LECUN_NORMAL, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return conv(x.astype(self.dtype), kernel, bias, self.stride)


class DepthwiseConv(nn.Module):
    """A 3 x 3 convolution of each channel by itself, with a bias as ``Conv``.

    Attributes:
      stride: pixels between outputs.
    """

    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow c"]:
        kernel = self.param("kernel", LECUN_NORMAL, (3, 3, 1, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return depthwise_conv(x.astype(self.dtype), kernel, bias, self.stride)


class PatchEmbed(nn.Module):
    """A vector for each 4 x 4 pixels, by two convolutions of stride 2."""

    embed_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b gh gw d"]:
        x = Conv(self.embed_dim // 2, 3, stride=2, dtype=self.dtype, name="conv1")(images)
        return Conv(self.embed_dim, 3, stride=2, dtype=self.dtype, name="conv2")(gelu(x))


class MBConv(nn.Module):
    """An inverted bottleneck: wide in the middle, where each channel is convolved by itself.

    Source: Sandler et al. 2018 (MobileNetV2).
    """

    hidden_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        branch = gelu(Dense(self.hidden_dim, self.dtype, name="conv1")(x))
        branch = gelu(DepthwiseConv(dtype=self.dtype, name="conv2")(branch))
        return gelu(x + Dense(x.shape[-1], self.dtype, name="conv3")(branch))


class PatchMerging(nn.Module):
    """The step to the next stage: other channels, and a quarter of the tokens for stride 2."""

    features: int
    stride: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow d"]:
        x = gelu(Dense(self.features, self.dtype, name="conv1")(x))
        x = gelu(DepthwiseConv(self.stride, self.dtype, name="conv2")(x))
        return Dense(self.features, self.dtype, name="conv3")(x)


class WindowAttention(nn.Module):
    """Multi-head self-attention in a window, with a learned bias for each distance.

    Distances have no direction: a table has an entry for every number of rows and of columns.
    """

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, windows: Float[Array, "n s s d"]) -> Float[Array, "n s s d"]:
        size, dim = windows.shape[1], windows.shape[-1]
        qkv = Dense(3 * dim, self.dtype, name="qkv")(windows)
        table = self.param("attention_biases", nn.initializers.zeros, (self.num_heads, size, size))
        return Dense(dim, self.dtype, name="proj")(bias_attention(qkv, table))


class TinyViTBlock(nn.Module):
    """A transformer block in windows, with a convolution between attention and MLP."""

    num_heads: int
    window_size: int
    mlp_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        # The padding is normalised with the tokens, and takes part in the attention.
        windows = window_partition(x, self.window_size)
        windows = layer_norm(_NORM_EPSILON, self.dtype, "norm1")(windows)
        windows = WindowAttention(self.num_heads, self.dtype, name="attn")(windows)
        x = x + window_unpartition(windows, x.shape[1:3])
        x = DepthwiseConv(dtype=self.dtype, name="local_conv")(x)
        branch = layer_norm(_NORM_EPSILON, self.dtype, "norm2")(x)
        return x + Mlp((self.mlp_dim, x.shape[-1]), gelu, self.dtype, name="mlp")(branch)


class TinyViT(nn.Module):
    """Image embeddings, one vector per 16 x 16 pixels, of normalised images.

    Attributes:
      config: the shape.
      remat: see ``layers.remat_block``.
      dtype: type of the computation; parameters are float32.

    Source: Wu et al. 2022 (TinyViT), as used in Zhang et al. 2023 (MobileSAM).
    """

    config: TinyViTConfig
    remat: Remat = "none"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], path_scales: None = None
    ) -> Float[Array, "b gh gw d"]:
        """Embeds images of any size that is a multiple of 16.

        Args:
          images: normalised, zero-padded.
          path_scales: None, as no paths are dropped.

        Raises:
          ValueError: if height or width is not a multiple of 16.
        """
        cfg = self.config
        check_multiple(images, cfg.patch_size)
        conv_block, transformer_block = (
            remat_block(block_class, self.remat) for block_class in (MBConv, TinyViTBlock)
        )
        x = PatchEmbed(cfg.embed_dims[0], self.dtype, name="patch_embed")(images)
        for stage, (dim, depth) in enumerate(zip(cfg.embed_dims, cfg.depths, strict=True)):
            for index in range(depth):
                name = f"stage_{stage}_block_{index}"
                if stage == 0:
                    x = conv_block(int(dim * cfg.expand_rate), self.dtype, name=name)(x)
                else:
                    x = transformer_block(
                        cfg.num_heads[stage],
                        cfg.window_sizes[stage],
                        int(dim * cfg.mlp_rate),
                        self.dtype,
                        name=name,
                    )(x)
            if stage < len(MERGE_STRIDES):
                x = PatchMerging(
                    cfg.embed_dims[stage + 1],
                    MERGE_STRIDES[stage],
                    self.dtype,
                    name=f"stage_{stage}_merge",
                )(x)
        return neck(x, cfg.output_dim, self.dtype)
