"""The mask decoder: masks and their predicted quality from embeddings."""

import dataclasses
from typing import no_type_check

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Float, UInt32
from sam_jax.models.layers import Mlp, NormParams
from sam_jax.models.prompt_encoder import SparseEmbeddings
from sam_jax.models.two_way_transformer import TwoWayTransformer
from sam_jax.ops.full_precision import broadcast_to
from sam_jax.ops.mask_prediction import UpscalingWeights, predict_masks

NUM_MULTIMASK = 3
NUM_MASK_TOKENS = 1 + NUM_MULTIMASK
_NORM_EPSILON = 1e-6


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
      low_res_logits: mask logits, four per image token and side, unbounded; above 0 is foreground.
      iou_predictions: what the model believes the IoU of each candidate to be; a plain regression,
        so it may leave [0, 1].
    """

    low_res_logits: Float[Array, "b p m lh lw"]
    iou_predictions: Float[Array, "b p m"]


@no_type_check
@flax.struct.dataclass
class TransformerOutput:
    """Objects after tokens and image tokens attended to each other, before masks are predicted.

    Attributes:
      mask_tokens: of all four candidates, from which the filters of their masks are made.
      image_tokens: of the image as every object sees it.
      iou_predictions: of the wanted candidates, see ``MaskPrediction``.
    """

    mask_tokens: Float[Array, "b p 4 d"]
    image_tokens: Float[Array, "b p gh gw d"]
    iou_predictions: Float[Array, "b p m"]


class MaskDecoder(nn.Module):
    """Mask candidates of every prompted object.

    Four output tokens make masks: three where several objects fit the prompt, and one where it
    leaves no doubt, which is the paper's fourth and stands first, as in the published weights.

    Source: Kirillov et al. 2023, section 3 and appendix A.
    """

    config: MaskDecoderConfig
    embed_dim: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        cfg, dim = self.config, self.embed_dim
        normal = nn.initializers.normal(1.0)
        self.output_tokens = self.param("output_tokens", normal, (1 + NUM_MASK_TOKENS, dim))
        self.transformer = TwoWayTransformer(
            depth=cfg.depth,
            num_heads=cfg.num_heads,
            mlp_dim=cfg.mlp_dim,
            dropout_rate=cfg.dropout_rate,
            dtype=self.dtype,
        )
        widths = (cfg.iou_head_dim, cfg.iou_head_dim, NUM_MASK_TOKENS)
        # Candidates are chosen and ranked by predictions that differ in their third digit, which
        # numbers near 1 do not have in half precision.
        self.iou_head = Mlp(widths, nn.relu, self.dtype, exact_output=True)
        self.hyper_networks = HyperNetworks(dim // 8, self.dtype)
        self.upscaling = Upscaling(dim)

    def __call__(
        self,
        image_embeddings: Float[Array, "b #p gh gw d"],
        image_pe: Float[Array, "gh gw d"],
        sparse_prompt_embeddings: SparseEmbeddings,
        *,
        multimask_output: bool,
        dropout_seeds: UInt32[Array, "b p"] | None = None,
    ) -> MaskPrediction:
        """Three candidates per object, or the single one, in float32.

        Args:
          image_embeddings: with the dense prompt embeddings added; shared by an image's objects
            where none has a mask.
          image_pe: positional encoding of the image.
          sparse_prompt_embeddings: of points, boxes and text.
          multimask_output: three, or one.
          dropout_seeds: of each object, in training; None for no dropout.
        """
        output = self.run_transformer(
            image_embeddings,
            image_pe,
            sparse_prompt_embeddings,
            multimask_output=multimask_output,
            dropout_seeds=dropout_seeds,
        )
        return MaskPrediction(
            low_res_logits=self.predict_masks(output, multimask_output=multimask_output),
            iou_predictions=output.iou_predictions,
        )

    def run_transformer(
        self,
        image_embeddings: Float[Array, "b #p gh gw d"],
        image_pe: Float[Array, "gh gw d"],
        sparse_prompt_embeddings: SparseEmbeddings,
        *,
        multimask_output: bool,
        dropout_seeds: UInt32[Array, "b p"] | None = None,
    ) -> TransformerOutput:
        """All but the masks: two thirds of the arithmetic, and how good the masks would be."""
        prompts = sparse_prompt_embeddings
        b, p = prompts.tokens.shape[:2]
        output_tokens = broadcast_to(
            self.output_tokens, (b, p, *self.output_tokens.shape), self.dtype
        )
        always = jnp.ones(output_tokens.shape[:3], bool)
        tokens, image_tokens = self.transformer(
            jnp.concatenate([output_tokens, prompts.tokens], axis=2),
            rearrange(image_embeddings, "b p h w d -> b p (h w) d"),
            rearrange(image_pe, "h w d -> (h w) d"),
            jnp.concatenate([always, prompts.valid], axis=2),
            dropout_seeds=dropout_seeds,
        )
        iou_predictions = self.iou_head(tokens[:, :, 0])[..., _wanted(multimask_output)]
        gh, gw = image_pe.shape[:2]
        return TransformerOutput(
            mask_tokens=tokens[:, :, 1 : 1 + NUM_MASK_TOKENS],
            image_tokens=rearrange(image_tokens, "b p (h w) d -> b p h w d", h=gh, w=gw),
            iou_predictions=iou_predictions,
        )

    def predict_masks(
        self, output: TransformerOutput, *, multimask_output: bool
    ) -> Float[Array, "b p m lh lw"]:
        """Low-resolution logits of the candidates: upscaled image tokens times their filters."""
        filters = self.hyper_networks(output.mask_tokens, _wanted(multimask_output))
        return predict_masks(
            self.upscaling(), output.image_tokens, filters, norm_epsilon=_NORM_EPSILON
        )


def _wanted(multimask_output: bool) -> slice:
    return slice(1, None) if multimask_output else slice(0, 1)


class HyperNetworks(nn.Module):
    """One three-layer MLP for each mask token, which makes the filter of its mask."""

    output_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, mask_tokens: Float[Array, "b p 4 d"], wanted: slice
    ) -> Float[Array, "b p m c"]:
        dim, indices = mask_tokens.shape[-1], range(NUM_MASK_TOKENS)
        # All have parameters; only what is wanted is computed.
        indices = indices if self.is_initializing() else indices[wanted]
        filters = [
            Mlp((dim, dim, self.output_dim), nn.relu, self.dtype, name=f"mlp_{index}")(
                mask_tokens[:, :, index]
            )
            for index in indices
        ]
        filters = jnp.stack(filters, axis=2)
        return filters[:, :, wanted] if self.is_initializing() else filters


class Upscaling(nn.Module):
    """Parameters of the two transposed convolutions that upscale image tokens by four."""

    embed_dim: int

    @nn.compact
    def __call__(self) -> UpscalingWeights:
        dim = self.embed_dim
        return UpscalingWeights(
            *ConvTransposeParams(dim // 4, name="split1")(dim),
            NormParams(name="norm")(dim // 4),
            *ConvTransposeParams(dim // 8, name="split2")(dim // 4),
        )


class ConvTransposeParams(nn.Module):
    """Kernel and bias of a transposed convolution with kernel and stride 2."""

    channels: int

    @nn.compact
    def __call__(self, input_dim: int) -> tuple[Float[Array, "d 2 2 c"], Float[Array, " c"]]:
        kernel = _KernelParam(self.channels, name="conv")(input_dim)
        return kernel, self.param("bias", nn.initializers.zeros, (self.channels,))


class _KernelParam(nn.Module):
    """The kernel of a transposed convolution, at ``conv/kernel`` in the parameters' tree."""

    channels: int

    @nn.compact
    def __call__(self, input_dim: int) -> Float[Array, "d 2 2 c"]:
        init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        return self.param("kernel", init, (input_dim, 2, 2, self.channels))
