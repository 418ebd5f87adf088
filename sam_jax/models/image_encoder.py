"""The image encoder: a plain vision transformer with windows, as in ViTDet."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Float
from sam_jax.models.layers import Dense, Mlp, NormWeights, gelu, layer_norm
from sam_jax.ops import window_cut_kernel
from sam_jax.ops.attention import Implementation, choose, grid_attention
from sam_jax.ops.full_precision import add_shared, multiply
from sam_jax.ops.placement import BATCH, TENSOR, WEIGHTS, Placement, Spread
from sam_jax.ops.resize import resize_positions
from sam_jax.ops.windows import window_partition, window_unpartition

_NORM_EPSILON = 1e-6
Remat: TypeAlias = Literal["none", "products", "blocks"]


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
      placement: the devices; those that share an image have some of the heads each.
    """

    num_heads: int
    table_grid: tuple[int, int]
    implementation: Implementation = "auto"
    dtype: DTypeLike = jnp.float32
    placement: Placement = Placement()

    @nn.compact
    def __call__(self, tokens: Float[Array, "b gh gw d"]) -> Float[Array, "b gh gw d"]:
        dim = tokens.shape[-1]
        head_dim = dim // self.num_heads
        num_heads = self.num_heads // self.placement.num_tensor
        qkv = Dense(3 * num_heads * head_dim, dtype=self.dtype, name="qkv")(tokens)
        rel_pos_h, rel_pos_w = (
            self.param(name, nn.initializers.zeros, (2 * size - 1, head_dim))
            for name, size in zip(("rel_pos_h", "rel_pos_w"), self.table_grid, strict=True)
        )
        out = grid_attention(
            checkpoint_name(qkv, "product"),
            rel_pos_h,
            rel_pos_w,
            num_heads,
            implementation=self.implementation,
            placement=self.placement,
        )
        out = Dense(dim, dtype=self.dtype, name="proj")(checkpoint_name(out, "product"))
        return self.placement.summed(checkpoint_name(out, "product"))


class EncoderBlock(nn.Module):
    """One transformer block; ``window_size`` 0 means attention over the whole grid."""

    num_heads: int
    mlp_rate: float
    window_size: int
    table_grid: tuple[int, int]
    implementation: Implementation = "auto"
    dtype: DTypeLike = jnp.float32
    placement: Placement = Placement()

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b gh gw d"],
        branch_scales: Float[Array, "2 b"] | None = None,
    ) -> Float[Array, "b gh gw d"]:
        """The next block's tokens.

        Args:
          tokens: of the block before.
          branch_scales: factors of the attention's and the MLP's branch, see ``drop_paths``.
        """

        def scaled(branch, which):
            if branch_scales is None:
                return branch
            return multiply(branch, branch_scales[which, :, None, None, None])

        attention = RelativePositionAttention(
            self.num_heads,
            self.table_grid,
            self.implementation,
            self.dtype,
            self.placement,
            name="attn",
        )
        dim = tokens.shape[-1]
        if self._cuts_in_kernel(tokens):
            norms = [NormWeights(name=name)(dim) for name in ("norm1", "norm2")]
            interpret = self.placement.platform != "tpu"
            options: Any = {"epsilon": _NORM_EPSILON, "interpret": interpret}
            windows, tokens = window_cut_kernel.norm_and_cut(
                tokens, *norms[0], self.window_size, **options
            )
            by_image = (tokens.shape[0], -1, *windows.shape[2:])
            windows = scaled(attention(windows).reshape(by_image), 0).reshape(windows.shape)
            tokens, branch = window_cut_kernel.join_and_norm(tokens, windows, *norms[1], **options)
        else:
            branch = layer_norm(_NORM_EPSILON, self.dtype, "norm1")(tokens)
            if self.window_size:
                windows = attention(window_partition(branch, self.window_size))
                branch = window_unpartition(windows, tokens.shape[1:3])
            else:
                branch = attention(branch)
            tokens = tokens + scaled(branch, 0)
            branch = layer_norm(_NORM_EPSILON, self.dtype, "norm2")(tokens)
        hidden = int(dim * self.mlp_rate) // self.placement.num_tensor
        branch = Mlp((hidden, dim), gelu, self.dtype, name="mlp")(branch)
        return tokens + scaled(self.placement.summed(branch), 1)

    def _cuts_in_kernel(self, tokens: Array) -> bool:
        """Whether a kernel cuts windows: where another is their attention."""
        _, *grid, dim = tokens.shape
        if not self.window_size or not window_cut_kernel.supports(
            (grid[0], grid[1]), self.window_size, dim
        ):
            return False
        form = self.implementation
        if form == "auto":
            heads = self.num_heads // self.placement.num_tensor
            window = (self.window_size, self.window_size)
            form = choose(window, heads, dim // self.num_heads, self.dtype, self.placement)
        return form == "window_kernel"


def drop_paths(key: Array, rate: float, depth: int, num_images: int) -> Float[Array, "depth 2 b"]:
    """Factors of every block's two branches: 0 where an image skips it, else what makes up for it.

    The probability grows linearly from 0 at the first block to ``rate`` at the last.

    Source: Huang et al. 2016 (stochastic depth), per sample.
    """
    kept_rates = 1.0 - rate * np.arange(depth, dtype=np.float32)[:, None, None] / max(depth - 1, 1)
    kept = jax.random.bernoulli(key, kept_rates, (depth, 2, num_images))
    return jnp.where(kept, 1.0 / np.maximum(kept_rates, np.finfo(np.float32).tiny), 0.0)


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
        return Dense(self.embed_dim, dtype=self.dtype, name="proj")(patches)


class ImageEncoderViT(nn.Module):
    """Image embeddings, one vector per patch, of normalised images.

    Attributes:
      config: the shape.
      remat: what the backward pass computes again instead of keeping it, per block: "none" keeps
        everything; "products" keeps what the large products made and computes norms and
        activations again; "blocks" keeps only the tokens between blocks.
      scan: whether consecutive blocks of the same kind run as one loop over their stacked
        parameters. It compiles several times faster; each step copies its weights once more. The
        parameters' tree is the same.
      implementation: see ``ops.attention.grid_attention``.
      dtype: type of the computation; parameters are float32.
      placement: the devices.

    Source: Kirillov et al. 2023, section 3 and appendix A; Li et al. 2022 (ViTDet).
    """

    config: ImageEncoderConfig
    remat: Remat = "none"
    scan: bool = False
    implementation: Implementation = "auto"
    dtype: DTypeLike = jnp.float32
    placement: Placement = Placement()

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
        if not self.is_initializing():
            tokens = self.placement.constrain(tokens, BATCH)
            positions = self.placement.constrain(positions)
        tokens = add_shared(tokens, resize_positions(positions, grid))

        branch_scales = None
        if train and cfg.drop_path_rate:
            key = self.make_rng("dropout")
            branch_scales = drop_paths(key, cfg.drop_path_rate, cfg.depth, images.shape[0])
        if self.is_initializing():
            for index in range(cfg.depth):
                # One image, which cannot be spread.
                block = self._block(index, placement=Placement(), name=_block_name(index))
                tokens = block(tokens)
        else:
            tokens = self._run_blocks(tokens, branch_scales)

        x = nn.Conv(cfg.output_dim, (1, 1), use_bias=False, dtype=self.dtype, name="neck_conv1")(
            tokens
        )
        x = layer_norm(_NORM_EPSILON, self.dtype, "neck_norm1")(x)
        x = nn.Conv(cfg.output_dim, (3, 3), use_bias=False, dtype=self.dtype, name="neck_conv2")(x)
        return layer_norm(_NORM_EPSILON, self.dtype, "neck_norm2")(x)

    def _block(self, index: int, **options: Any) -> EncoderBlock:
        cfg = self.config
        everywhere = index in cfg.global_attention_blocks
        window = 0 if everywhere else cfg.window_size
        return EncoderBlock(
            **{"placement": self.placement} | options,
            num_heads=cfg.num_heads,
            mlp_rate=cfg.mlp_rate,
            window_size=window,
            table_grid=cfg.grid if everywhere else (window, window),
            implementation=self.implementation,
            dtype=self.dtype,
        )

    def _run_blocks(self, tokens: Array, branch_scales: Array | None) -> Array:
        """All blocks, each run by every device on its own images with its own pieces of weights."""
        params = self.variables["params"]
        placement = self.placement
        for run in _runs(self.config) if self.scan else ([i] for i in range(self.config.depth)):
            # Outside the module tree: which parameters it gets is decided here.
            block = self._block(run[0], placement=placement.inside, parent=None)

            def apply_block(tokens, inputs, block=block):
                params, scales = inputs
                return block.apply({"params": self._whole(params)}, tokens, scales), None

            if self.remat != "none":
                kept = {"products": ("product",), "blocks": ()}[self.remat]
                apply_block = jax.checkpoint(
                    apply_block, policy=jax.checkpoint_policies.save_only_these_names(*kept)
                )

            def apply_run(tokens, params, scales, apply_block=apply_block):
                if jax.tree.leaves(params)[0].shape[0] == 1:
                    return apply_block(tokens, jax.tree.map(lambda x: x[0], (params, scales)))[0]
                return jax.lax.scan(apply_block, tokens, (params, scales))[0]

            stacked = jax.tree.map(
                lambda *leaves: jnp.stack(leaves), *(params[_block_name(index)] for index in run)
            )
            tokens = placement.on_each_device(
                apply_run,
                (
                    placement.spec(BATCH),
                    jax.tree_util.tree_map_with_path(
                        lambda path, _: placement.spec(None, *_stored(path)), stacked
                    ),
                    placement.spec(None, None, BATCH),
                ),
                placement.spec(BATCH),
            )(tokens, stacked, None if branch_scales is None else branch_scales[np.array(run)])
        return tokens

    def _whole(self, params: Any) -> Any:
        """A block's parameters as a device needs them, from the pieces that devices store."""
        placement = self.placement.inside
        num_parts, head_dim = placement.num_tensor, self.config.embed_dim // self.config.num_heads

        def whole(path, leaf):
            layer, kind = path[-2].key, path[-1].key
            if kind == "kernel":
                # In the type of the computation, before it travels between devices.
                leaf = placement.whole(leaf.astype(self.dtype))
            if num_parts == 1 or layer not in _STORED:
                return leaf
            if layer == "qkv":
                heads = rearrange(leaf, "... (three a c) -> ... three a c", three=3, c=head_dim)
                heads = placement.my_part(heads, heads.ndim - 2)
                return rearrange(heads, "... three a c -> ... (three a c)")
            if kind == "kernel":
                return leaf
            # A bias of hidden channels is cut like them; one of a sum is added in parts.
            return placement.my_part(leaf, 0) if layer == "dense_0" else leaf / num_parts

        return jax.tree_util.tree_map_with_path(whole, dict(params))


# How a block's kernels are stored: what a product reads is split over the devices that share the
# weights, and hidden channels and heads over those that share an image. A config's sharding rules
# should say the same, or weights travel twice.
_STORED: dict[str, tuple[Spread, ...]] = {
    "qkv": (WEIGHTS, None),
    "proj": ((TENSOR, WEIGHTS), None),
    "dense_0": (WEIGHTS, TENSOR),
    "dense_1": ((TENSOR, WEIGHTS), None),
}


def _stored(path: Any) -> tuple[Spread, ...]:
    layer, kind = path[-2].key, path[-1].key
    return _STORED.get(layer, ()) if kind == "kernel" else ()


def _block_name(index: int) -> str:
    return f"block_{index:02d}"


def _runs(config: ImageEncoderConfig) -> list[list[int]]:
    """Consecutive blocks of the same kind."""
    kinds = itertools.groupby(range(config.depth), lambda i: i in config.global_attention_blocks)
    return [list(indices) for _, indices in kinds]
