"""The mask decoder: masks and their predicted quality from embeddings."""

import dataclasses
from typing import no_type_check

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Bool, Float
from sam_jax.models.layers import Mlp, gelu, layer_norm
from sam_jax.models.prompt_encoder import PromptEmbeddings
from sam_jax.models.two_way_transformer import TwoWayTransformer

NUM_MULTIMASK = 3


@dataclasses.dataclass(frozen=True)
class MaskDecoderConfig:
    """Shape of a mask decoder.

    Attributes:
      depth: layers of the two-way transformer.
      num_heads: its attention heads.
      mlp_dim: hidden width of its MLPs.
      dropout_rate: probability with which its branches' outputs are zeroed in training.
      iou_head_dim: hidden width of the quality head.
    """

    depth: int = 2
    num_heads: int = 8
    mlp_dim: int = 2048
    dropout_rate: float = 0.1
    iou_head_dim: int = 256


@no_type_check  # JAX's transformations fill a pytree with placeholders
@flax.struct.dataclass
class MaskPrediction:
    """Candidates for each object.

    Attributes:
      low_res_logits: mask logits, four per cell and side, unbounded; above 0 is foreground.
      iou_predictions: what the model believes the IoU of each candidate to be; a plain regression,
        so it may leave [0, 1].
    """

    low_res_logits: Float[Array, "b p m lh lw"]
    iou_predictions: Float[Array, "b p m"]


@no_type_check
@flax.struct.dataclass
class Attended:
    """Objects after tokens and cells attended to each other, before their masks are drawn.

    Attributes:
      mask_tokens: of all four candidates, from which the filters of their masks are made.
      cells: of the image as every object sees it.
      iou_predictions: of the wanted candidates, see ``MaskPrediction``.
    """

    mask_tokens: Float[Array, "b p k d"]
    cells: Float[Array, "b p gh gw d"]
    iou_predictions: Float[Array, "b p m"]


class MaskDecoder(nn.Module):
    """Mask candidates of every prompted object.

    Four output tokens make masks: the first is used where the prompt leaves no doubt, the other
    three where several objects fit it.

    Source: Kirillov et al. 2023, section 3 and appendix A.
    """

    config: MaskDecoderConfig
    embed_dim: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        cfg, dim = self.config, self.embed_dim
        normal = nn.initializers.normal(1.0)
        self.output_tokens = self.param("output_tokens", normal, (2 + NUM_MULTIMASK, dim))
        self.transformer = TwoWayTransformer(
            depth=cfg.depth,
            num_heads=cfg.num_heads,
            mlp_dim=cfg.mlp_dim,
            dropout_rate=cfg.dropout_rate,
            dtype=self.dtype,
        )
        widths = (cfg.iou_head_dim, cfg.iou_head_dim, 1 + NUM_MULTIMASK)
        self.iou_head = Mlp(widths, nn.relu, self.dtype)
        self.hyper_networks = HyperNetworks(dim // 8, self.dtype)
        self.upscaling = Upscaling(dim, self.dtype)

    def __call__(
        self,
        image_embeddings: Float[Array, "b gh gw d"],
        prompts: PromptEmbeddings,
        *,
        multimask_output: bool,
        train: bool = False,
    ) -> MaskPrediction:
        """Three candidates per object, or the single one, in float32."""
        attended = self.attend(
            image_embeddings, prompts, multimask_output=multimask_output, train=train
        )
        return MaskPrediction(
            low_res_logits=self.draw(attended, multimask_output=multimask_output),
            iou_predictions=attended.iou_predictions,
        )

    def attend(
        self,
        image_embeddings: Float[Array, "b gh gw d"],
        prompts: PromptEmbeddings,
        *,
        multimask_output: bool,
        train: bool = False,
    ) -> Attended:
        """All but the masks: about two thirds of the arithmetic, and how good they would be."""
        gh, gw = image_embeddings.shape[1:3]
        b, p = prompts.sparse.shape[:2]
        output_tokens = self.output_tokens.astype(self.dtype)
        tokens, tokens_valid = _with_output_tokens(
            jnp.broadcast_to(output_tokens, (b, p, *output_tokens.shape)), prompts
        )
        cells = image_embeddings[:, None].astype(self.dtype) + prompts.dense
        tokens, cells = self.transformer(
            tokens,
            rearrange(cells, "b p h w d -> b p (h w) d"),
            rearrange(prompts.image_pe, "h w d -> (h w) d"),
            tokens_valid,
            train=train,
        )
        iou_predictions = self.iou_head(tokens[:, :, 0])[..., _wanted(multimask_output)]
        return Attended(
            mask_tokens=tokens[:, :, 1 : 2 + NUM_MULTIMASK],
            cells=rearrange(cells, "b p (h w) d -> b p h w d", h=gh, w=gw),
            iou_predictions=iou_predictions.astype(jnp.float32),
        )

    def draw(self, attended: Attended, *, multimask_output: bool) -> Float[Array, "b p m lh lw"]:
        """Low-resolution logits of the candidates."""
        filters = self.hyper_networks(attended.mask_tokens, _wanted(multimask_output))
        pixels = self.upscaling(attended.cells)
        # Sub-pixels stay apart from the grid until only one number per candidate is left of them:
        # putting 32 channels in order would move far more memory than putting one.
        logits = jnp.einsum(
            "bphwijklc,bpmc->bphwijklm", pixels, filters, preferred_element_type=jnp.float32
        )
        return rearrange(logits, "b p h w i j k l m -> b p m (h i k) (w j l)")


def _wanted(multimask_output: bool) -> slice:
    return slice(1, None) if multimask_output else slice(0, 1)


def _with_output_tokens(
    output_tokens: Float[Array, "b p o d"], prompts: PromptEmbeddings
) -> tuple[Float[Array, "b p t d"], Bool[Array, "b p t"]]:
    tokens = jnp.concatenate([output_tokens, prompts.sparse], axis=2)
    always = jnp.ones(output_tokens.shape[:3], bool)
    return tokens, jnp.concatenate([always, prompts.sparse_valid], axis=2)


class HyperNetworks(nn.Module):
    """One three-layer MLP for each mask token, which makes the filter of its mask."""

    output_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, mask_tokens: Float[Array, "b p k d"], wanted: slice
    ) -> Float[Array, "b p m c"]:
        dim = mask_tokens.shape[-1]
        indices = range(mask_tokens.shape[2]) if self.is_initializing() else range(4)[wanted]
        filters = [
            Mlp((dim, dim, self.output_dim), nn.relu, self.dtype, name=f"mlp_{index}")(
                mask_tokens[:, :, index]
            )
            for index in indices
        ]
        filters = jnp.stack(filters, axis=2)
        return filters[:, :, wanted] if self.is_initializing() else filters


class SplitCells(nn.Module):
    """Each cell split into 2 x 2: a transposed convolution with kernel and stride 2.

    Its kernels do not overlap, so it is a dense layer per cell.
    """

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, cells: Float[Array, "*batch d"]) -> Float[Array, "*batch 2 2 c"]:
        split = nn.DenseGeneral(
            (2, 2, self.channels), use_bias=False, dtype=self.dtype, name="conv"
        )
        # Unlike a dense layer's, the bias is the same for the four parts.
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        return split(cells) + bias.astype(self.dtype)


class Upscaling(nn.Module):
    """Cells split into 4 x 4 sub-pixels of an eighth of the channels.

    ``i j`` are the sub-pixels of the first split and ``k l`` those of the second.
    """

    embed_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, cells: Float[Array, "b p gh gw d"]) -> Float[Array, "b p gh gw 2 2 2 2 c"]:
        x = SplitCells(self.embed_dim // 4, self.dtype, name="split1")(cells)
        x = gelu(layer_norm(1e-6, self.dtype, "norm")(x))
        return gelu(SplitCells(self.embed_dim // 8, self.dtype, name="split2")(x))
