"""A masked autoencoder: the encoder sees a quarter of the patches, a decoder paints the others.

What it learns is where training for promptable segmentation starts from: the decoder is thrown
away, the encoder gets windows and relative positions (``weights.mae``).

Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Bool, Float, Int
from sam_jax.models.image_encoder import (
    BlockKind,
    EncoderBlocks,
    ImageEncoderConfig,
    PatchEmbed,
    check_multiple,
)
from sam_jax.models.layers import Dense, Remat, as_float32, layer_norm
from sam_jax.ops.attention import Implementation
from sam_jax.ops.full_precision import broadcast_to
from sam_jax.ops.images import RGB, ImageChannels
from sam_jax.ops.positional import sincos_positions

_NORM_EPSILON = 1e-6
# Added to the variance of a patch's pixels.
_PIXEL_EPSILON = 1e-6
_TOKEN_INIT = nn.initializers.normal(0.02)
# Attention of all with all without relative positions; tokens are one row of the blocks' grid.
_PLAIN = BlockKind(window_size=0, table_grid=None)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Options of pre-training, beside the shape of the image encoder.

    Attributes:
      mask_rate: part of an image's patches that the encoder does not see.
      normalize_pixels: whether the target is a patch's pixels without their mean and deviation,
        rather than the pixels.
      decoder_dim: width of the decoder.
      decoder_depth: its blocks.
      decoder_heads: attention heads of each.
      decoder_mlp_rate: hidden width of a block's MLP over ``decoder_dim``.
    """

    mask_rate: float = 0.75
    normalize_pixels: bool = True
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decoder_mlp_rate: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate must be between 0 and 1, got {self.mask_rate}")
        if self.decoder_heads < 1 or self.decoder_dim % self.decoder_heads or self.decoder_dim % 4:
            raise ValueError(
                f"decoder_dim {self.decoder_dim} is not divisible by 4 and by decoder_heads "
                f"{self.decoder_heads}"
            )


class PatchMask(NamedTuple):
    """The patches of each image that are seen and those that are not, by number, row by row.

    Attributes:
      kept: those that the encoder sees, in random order.
      dropped: those that it does not.
      restore: the place of every patch in ``kept`` followed by ``dropped``.
    """

    kept: Int[Array, "b v"]
    dropped: Int[Array, "b u"]
    restore: Int[Array, "b k"]

    @property
    def is_dropped(self) -> Bool[Array, "b k"]:
        """True for patches that the encoder does not see."""
        return self.restore >= self.kept.shape[1]


def random_masking(noise: Float[Array, "b k"], mask_rate: float) -> PatchMask:
    """The mask that drops the patches with the largest noise.

    Args:
      noise: random numbers, one for each patch.
      mask_rate: see ``AutoencoderConfig``; what is kept is rounded down.
    """
    num_kept = kept_patches(noise.shape[1], mask_rate)
    shuffled = jnp.argsort(noise, axis=1)
    return PatchMask(shuffled[:, :num_kept], shuffled[:, num_kept:], jnp.argsort(shuffled, axis=1))


def kept_patches(num_patches: int, mask_rate: float) -> int:
    """The number of an image's patches that the encoder sees."""
    return int(num_patches * (1 - mask_rate))


def patchify(images: Float[Array, "b h w channels"], patch_size: int) -> Float[Array, "b k c"]:
    """Pixels of each patch: row by row, and so within a patch, c = channels * patch_size^2."""
    return rearrange(images, "b (gh i) (gw j) c -> b (gh gw) (i j c)", i=patch_size, j=patch_size)


def unpatchify(
    patches: Float[Array, "b k c"], grid: tuple[int, int], patch_size: int
) -> Float[Array, "b h w channels"]:
    """The images that ``patchify`` was given."""
    return rearrange(
        patches,
        "b (gh gw) (i j c) -> b (gh i) (gw j) c",
        gh=grid[0],
        gw=grid[1],
        i=patch_size,
        j=patch_size,
    )


def blanked(
    images: Float[Array, "b h w channels"], mask: PatchMask, encoder: ImageEncoderConfig
) -> Float[Array, "b h w channels"]:
    """Normalised images whose dropped patches are zero, a grey, for people to look at."""
    patches = patchify(images, encoder.patch_size)
    shown = jnp.where(mask.is_dropped[..., None], 0.0, patches)
    return unpatchify(shown, encoder.grid, encoder.patch_size)


class PixelStatistics(NamedTuple):
    """Mean and deviation of the pixels of each patch, all channels together.

    The variance is the unbiased one, and has a little added that keeps plain patches finite.
    """

    mean: Float[Array, "b k 1"]
    deviation: Float[Array, "b k 1"]

    @classmethod
    def of(cls, patches: Float[Array, "b k c"]) -> "PixelStatistics":
        """Statistics of patches as ``patchify`` cuts them."""
        variance = jnp.var(patches, axis=-1, keepdims=True, ddof=1)
        return cls(jnp.mean(patches, axis=-1, keepdims=True), jnp.sqrt(variance + _PIXEL_EPSILON))


class VisiblePatchEncoder(nn.Module):
    """The image encoder as it is pre-trained: plain attention, of the visible patches alone.

    Its parameters have the names of ``ImageEncoderViT``'s, but for tables of positions, which are
    fixed sines here, and for the class token and the last norm, which segmentation has no use for.

    Attributes:
      config: the shape; every block is global here, and none has relative positions.
      blocks: how they compute.
    """

    config: ImageEncoderConfig
    blocks: EncoderBlocks

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w channels"], kept: Int[Array, "b v"]
    ) -> Float[Array, "b 1+v d"]:
        """Encoded tokens of the class and of the kept patches, in their order."""
        cfg, dtype = self.config, self.blocks.dtype
        grid = PatchEmbed(cfg.patch_size, cfg.embed_dim, dtype, name="patch_embed")(images)
        grid = grid + sincos_positions(cfg.grid, cfg.embed_dim).astype(dtype)
        visible = _take(rearrange(grid, "b gh gw d -> b (gh gw) d"), kept)
        # Its position is zero.
        class_token = self.param("class_token", _TOKEN_INIT, (cfg.embed_dim,))
        first = broadcast_to(class_token, (len(images), 1, cfg.embed_dim), dtype)
        tokens = jnp.concatenate([first, visible], axis=1)
        tokens = self.blocks.apply(
            tokens[:, None],
            [_PLAIN] * cfg.depth,
            num_heads=cfg.num_heads,
            mlp_rate=cfg.mlp_rate,
            is_initializing=self.is_initializing(),
        )[:, 0]
        return layer_norm(_NORM_EPSILON, dtype, "norm")(tokens)


class PixelDecoder(nn.Module):
    """The decoder that pre-training throws away: pixels of every patch from the visible ones.

    Attributes:
      config: its shape.
      grid: rows and columns of patches.
      patch_size: side of a patch in pixels.
      num_channels: of the images.
      blocks: how its blocks compute.
    """

    config: AutoencoderConfig
    grid: tuple[int, int]
    patch_size: int
    num_channels: int
    blocks: EncoderBlocks

    @nn.compact
    def __call__(
        self, visible: Float[Array, "b t d"], restore: Int[Array, "b k"]
    ) -> Float[Array, "b k c"]:
        """Predictions for all patches, float32; for those that were seen as well.

        Args:
          visible: from ``VisiblePatchEncoder``, the class token first.
          restore: see ``PatchMask``.
        """
        cfg, dtype = self.config, self.blocks.dtype
        dim, num_images = cfg.decoder_dim, len(visible)
        embedded = Dense(dim, dtype, name="embed")(visible)
        mask_token = self.param("mask_token", _TOKEN_INIT, (dim,))
        num_dropped = restore.shape[1] - (visible.shape[1] - 1)
        dropped = broadcast_to(mask_token, (num_images, num_dropped, dim), dtype)
        patches = _take(jnp.concatenate([embedded[:, 1:], dropped], axis=1), restore)
        positions = sincos_positions(self.grid, dim).reshape(-1, dim).astype(dtype)
        tokens = jnp.concatenate([embedded[:, :1], patches + positions], axis=1)
        tokens = self.blocks.apply(
            tokens[:, None],
            [_PLAIN] * cfg.decoder_depth,
            num_heads=cfg.decoder_heads,
            mlp_rate=cfg.decoder_mlp_rate,
            is_initializing=self.is_initializing(),
        )[:, 0]
        tokens = layer_norm(_NORM_EPSILON, jnp.float32, "norm")(tokens[:, 1:])
        return Dense(self.num_channels * self.patch_size**2, jnp.float32, name="prediction")(tokens)


def _take(tokens: Float[Array, "b t d"], indices: Int[Array, "b s"]) -> Float[Array, "b s d"]:
    """An image's tokens of these numbers."""
    return jnp.take_along_axis(tokens, indices[..., None], axis=1)


class MaskedAutoencoder(nn.Module):
    """An image encoder with the decoder that pre-trains it.

    Attributes:
      encoder: shape of the image encoder, for images of its size alone.
      config: what pre-training adds to it.
      channels: of the images, with the statistics that they are normalised by.
      remat: see ``layers.remat_block``.
      scan: see ``ImageEncoderViT``.
      attention: see ``ops.attention.grid_attention``.
      dtype: type of the computation; parameters, predictions and losses are float32.

    Source: He et al. 2022, section 3.
    """

    encoder: ImageEncoderConfig
    config: AutoencoderConfig = AutoencoderConfig()
    channels: ImageChannels = RGB
    remat: Remat = "none"
    scan: bool = False
    attention: Implementation = "auto"
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        blocks = EncoderBlocks(self.remat, self.scan, self.attention, self.dtype)
        self.image_encoder = VisiblePatchEncoder(self.encoder, blocks)
        self.pixel_decoder = PixelDecoder(
            self.config,
            self.encoder.grid,
            self.encoder.patch_size,
            self.channels.count,
            blocks,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return self.encoder.image_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        gh, gw = self.encoder.grid
        return gh * gw

    @property
    def num_dropped(self) -> int:
        """Patches of an image that are dropped, and predicted."""
        return self.num_patches - kept_patches(self.num_patches, self.config.mask_rate)

    def encode(
        self, images: Float[Array, "b h w channels"], kept: Int[Array, "b v"]
    ) -> Float[Array, "b 1+v d"]:
        """Tokens of the class and of the kept patches; see ``VisiblePatchEncoder``."""
        check_multiple(images, self.encoder.patch_size)
        return self.image_encoder(images, kept)

    def __call__(
        self, images: Float[Array, "b h w channels"], noise: Float[Array, "b k"]
    ) -> tuple[Float[Array, "b k c"], PatchMask]:
        """Predictions for all patches, and which of them were dropped.

        Args:
          images: normalised (``ops.images.normalize_images``).
          noise: see ``random_masking``.
        """
        mask = random_masking(noise, self.config.mask_rate)
        return self.pixel_decoder(self.encode(images, mask.kept), mask.restore), mask

    def reconstruct(
        self, variables: Any, images: Float[Array, "b h w channels"], noise: Float[Array, "b k"]
    ) -> tuple[Float[Array, "b k c"], PatchMask]:
        """``__call__`` of a model that is not bound, with its variables."""
        predictions, mask = self.apply(variables, images, noise)
        assert isinstance(mask, PatchMask)
        return predictions, mask

    def errors(
        self,
        images: Float[Array, "b h w channels"],
        predictions: Float[Array, "b k c"],
        mask: PatchMask,
    ) -> Float[Array, "b u"]:
        """Mean squared errors of the dropped patches; seen ones take no part in the loss."""
        patches = patchify(images, self.encoder.patch_size)
        target = patches
        if self.config.normalize_pixels:
            mean, deviation = PixelStatistics.of(patches)
            target = (patches - mean) / deviation
        predicted, target = (_take(x, mask.dropped) for x in (predictions, target))
        return jnp.mean(jnp.square(predicted - target), axis=-1)

    def reconstruction(
        self,
        images: Float[Array, "b h w channels"],
        predictions: Float[Array, "b k c"],
        mask: PatchMask,
    ) -> Float[Array, "b h w channels"]:
        """Images whose dropped patches are as predicted, for people to look at.

        Predictions of normalised pixels get the patch's own mean and deviation back, which nobody
        predicted.
        """
        patches = patchify(images, self.encoder.patch_size)
        if self.config.normalize_pixels:
            mean, deviation = PixelStatistics.of(patches)
            predictions = predictions * deviation + mean
        shown = jnp.where(mask.is_dropped[..., None], predictions, patches)
        return unpatchify(shown, self.encoder.grid, self.encoder.patch_size)


def init_variables(model: MaskedAutoencoder, key: Array) -> dict:
    """Fresh variables, ``{"params": ..., "constants": {}}``, all float32.

    Works under ``jax.eval_shape``. Kernels are drawn as published: uniformly, by Glorot and
    Bengio's rule, filters of the patches as those of a dense layer.
    """
    return {"params": jax.jit(lambda key: _fresh_params(model, key))(key), "constants": {}}


def _fresh_params(model: MaskedAutoencoder, key: Array) -> dict:
    images = jnp.zeros((1, *model.image_size, model.channels.count), jnp.float32)
    noise = jnp.zeros((1, model.num_patches), jnp.float32)
    leaves, structure = jax.tree.flatten(model.init(key, images, noise)["params"])
    xavier = nn.initializers.xavier_uniform()
    drawn = [
        xavier(key, leaf.shape) if leaf.ndim == 2 else leaf
        for key, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    ]
    params: dict = as_float32(jax.tree.unflatten(structure, drawn))
    return params
