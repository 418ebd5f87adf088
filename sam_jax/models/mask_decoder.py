"""The mask decoder: masks and their predicted quality from embeddings."""

import dataclasses
import functools
from typing import no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Bool, Float, UInt32
from sam_jax.models.layers import Mlp, NormWeights, gelu
from sam_jax.models.prompt_encoder import PromptEmbeddings
from sam_jax.models.two_way_transformer import TwoWayTransformer
from sam_jax.ops import cell_kernel
from sam_jax.ops.cells import SUBPIXELS, to_image
from sam_jax.ops.full_precision import add_shared, broadcast_to
from sam_jax.ops.placement import Kernels
from sam_jax.ops.tpu_kernel import WORTH_KEEPING, kernel_gelu, product

NUM_MULTIMASK = 3
# Of the norm between the two splits of a cell.
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
    kernels: Kernels = "none"

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
            kernels=self.kernels,
        )
        widths = (cfg.iou_head_dim, cfg.iou_head_dim, 1 + NUM_MULTIMASK)
        # Candidates are chosen and ranked by predictions that differ in their third digit, which
        # numbers near 1 do not have in half precision.
        self.iou_head = Mlp(widths, nn.relu, self.dtype, exact_output=True)
        self.hyper_networks = HyperNetworks(dim // 8, self.dtype)
        self.upscaling = Upscaling(dim, self.dtype, self.kernels)

    def __call__(
        self,
        prompts: PromptEmbeddings,
        *,
        multimask_output: bool,
        dropout_seeds: UInt32[Array, "b p"] | None = None,
    ) -> MaskPrediction:
        """Three candidates per object, or the single one, in float32."""
        attended = self.attend(
            prompts,
            multimask_output=multimask_output,
            dropout_seeds=dropout_seeds,
        )
        return MaskPrediction(
            low_res_logits=self.draw(attended, multimask_output=multimask_output),
            iou_predictions=attended.iou_predictions,
        )

    def attend(
        self,
        prompts: PromptEmbeddings,
        *,
        multimask_output: bool,
        dropout_seeds: UInt32[Array, "b p"] | None = None,
    ) -> Attended:
        """All but the masks: about two thirds of the arithmetic, and how good they would be."""
        gh, gw = prompts.cells.shape[2:4]
        b, p = prompts.sparse.shape[:2]
        tokens, tokens_valid = _with_output_tokens(
            broadcast_to(self.output_tokens, (b, p, *self.output_tokens.shape), self.dtype), prompts
        )
        if self.kernels != "none" and tokens.shape[2] % 2:
            # Kernels take pairs of tokens; one that nobody attends to changes nothing.
            tokens, tokens_valid = (
                jnp.pad(x, ((0, 0), (0, 0), (0, 1), *((0, 0),) * (x.ndim - 3)))
                for x in (tokens, tokens_valid)
            )
        tokens, cells = self.transformer(
            tokens,
            rearrange(prompts.cells, "b q h w d -> b q (h w) d"),
            rearrange(prompts.image_pe, "h w d -> (h w) d"),
            tokens_valid,
            dropout_seeds=dropout_seeds,
        )
        iou_predictions = self.iou_head(tokens[:, :, 0])[..., _wanted(multimask_output)]
        return Attended(
            mask_tokens=tokens[:, :, 1 : 2 + NUM_MULTIMASK],
            cells=rearrange(cells, "b p (h w) d -> b p h w d", h=gh, w=gw),
            iou_predictions=iou_predictions,
        )

    def draw(self, attended: Attended, *, multimask_output: bool) -> Float[Array, "b p m lh lw"]:
        """Low-resolution logits of the candidates."""
        filters = self.hyper_networks(attended.mask_tokens, _wanted(multimask_output))
        return self.upscaling(attended.cells, filters)


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
    """Kernel and bias of a transposed convolution with kernel and stride 2.

    Its kernels do not overlap, so it is a dense layer that makes 2 x 2 parts of each cell; the bias
    is the same for the four, and float32, as ``ops.full_precision`` takes it.
    """

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, input_dim: int) -> tuple[Float[Array, "d 2 2 c"], Float[Array, " c"]]:
        conv = _SplitKernel(self.channels, name="conv")(input_dim)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        return conv.astype(self.dtype), bias


class _SplitKernel(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, input_dim: int) -> Float[Array, "d 2 2 c"]:
        init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        return self.param("kernel", init, (input_dim, 2, 2, self.channels))


class Upscaling(nn.Module):
    """Logits of candidates: cells are split into 4 x 4 sub-pixels of few channels, and filtered.

    ``i j`` are the sub-pixels of the first split and ``k l`` those of the second. They stay apart
    from the grid until only one number per candidate is left of them: putting 32 channels in order
    would move far more memory than putting one.
    """

    embed_dim: int
    dtype: DTypeLike = jnp.float32
    kernels: Kernels = "none"

    @nn.compact
    def __call__(
        self, cells: Float[Array, "b p gh gw d"], filters: Float[Array, "b p m c"]
    ) -> Float[Array, "b p m lh lw"]:
        middle = self.embed_dim // 4
        first = SplitCells(middle, self.dtype, name="split1")(self.embed_dim)
        norm = NormWeights(name="norm")(middle)
        second = SplitCells(self.embed_dim // 8, self.dtype, name="split2")(middle)
        cells = cells.astype(self.dtype)
        num_cells = cells.shape[2] * cells.shape[3]
        if self.kernels != "none" and cell_kernel.supports(num_cells, self.embed_dim // 2):
            interpret = self.kernels == "interpreted"
            return _draw_in_kernel(cells, filters, first, norm, second, interpret=interpret)
        return _draw_by_axes(cells, filters, first, norm, second)


def _draw_by_axes(cells, filters, first, norm, second):
    """Sub-pixels as axes of their own."""
    kernel, bias = first
    x = add_shared(jnp.einsum("bphwd,dijc->bphwijc", cells, kernel), bias)
    # Statistics in float32, and exact: E[x^2] - E[x]^2 loses digits where the mean is large.
    centred = x.astype(jnp.float32)
    centred -= jnp.mean(centred, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    scale, shift = norm
    x = centred * jax.lax.rsqrt(variance + _NORM_EPSILON) * scale + shift
    kernel, bias = second
    x = jnp.einsum("bphwijd,dklc->bphwijklc", gelu(x.astype(cells.dtype)), kernel)
    x = add_shared(x, bias)
    logits = jnp.einsum(
        "bphwijklc,bpmc->bphwijklm", gelu(x), filters, preferred_element_type=jnp.float32
    )
    return rearrange(logits, "b p h w i j k l m -> b p m (h i k) (w j l)")


def _draw_in_kernel(cells, filters, first, norm, second, *, interpret):
    """Sub-pixels side by side: products with zeros in them, for what each does by itself."""
    b, _, gh, gw, dim = cells.shape
    num_masks = filters.shape[2]
    # The mean over channels is linear in the cells, so centred kernels make centred results.
    kernel, bias = (
        (x - jnp.mean(x, axis=-1, keepdims=True)) for x in (y.astype(jnp.float32) for y in first)
    )
    kernel = rearrange(kernel, "d i j c -> d (i j c)").astype(cells.dtype)
    middle = bias.size
    means = np.kron(np.eye(4), np.full((middle, middle), 1 / middle)).astype(cells.dtype)
    # Two sub-pixels of the first split fill 128 lanes.
    second_kernel, second_bias = second
    twice = jnp.eye(2, dtype=second_kernel.dtype)
    second_kernel = jnp.einsum("dklc,jJ->jdJklc", second_kernel, twice)
    second_kernel = rearrange(second_kernel, "j d J k l c -> (j d) (J k l c)")
    weights = (kernel, *(jnp.tile(x, 4)[None] for x in (bias, *norm)))
    weights += (second_kernel, jnp.tile(second_bias, 8)[None])
    # From places j k l of a half of the sub-pixels to rows k and columns j l.
    places = rearrange(np.eye(8), "(j k l) s -> (k j l) s", j=2, k=2).astype(filters.dtype)
    filters = jnp.einsum("bpmc,Ss->bpscmS", filters, places)
    logits = cell_kernel.over_cells(
        cell_kernel.CellFunction(
            functools.partial(_draw_cells, num_masks),
            out_rows=SUBPIXELS * num_masks,
            name="draw_cells",
            flops_per_cell=2 * dim * (3 * dim + SUBPIXELS * num_masks),
        ),
        weights,
        (rearrange(filters, "b p s c m S -> (b p) (s c) (m S)"),),
        rearrange(cells, "b p h w d -> (b p) (h w) d"),
        constants=(jnp.asarray(means),),
        out_dtype=jnp.float32,
        interpret=interpret,
    )
    logits = rearrange(logits, "(b p) (m s) n -> b p m s n", b=b, m=num_masks)
    return to_image(checkpoint_name(logits, WORTH_KEEPING), (gh, gw))


def _draw_cells(num_masks, weights, own, cells, given):
    """Logits ``[m 16, cells]`` of some cells of one object."""
    kernel, bias, scale, shift, second_kernel, second_bias = weights
    (filters,), (means,) = own, given.constants
    dtype = cells.dtype
    centred = product(cells, kernel, (1, 0)) + bias
    # Means over the channels of each sub-pixel, for each of its channels.
    variance = product(jnp.square(centred).astype(dtype), means, (1, 0))
    x = centred * jax.lax.rsqrt(variance + _NORM_EPSILON) * scale + shift
    x = kernel_gelu(x, dtype)
    half = x.shape[1] // 2
    halves = []
    for part in (x[:, :half], x[:, half:]):
        pixels = product(part.astype(dtype), second_kernel, (1, 0)) + second_bias
        pixels = kernel_gelu(pixels, dtype)
        halves.append(product(filters, pixels.astype(dtype), (0, 1)))
    rows = SUBPIXELS // 2
    return jnp.concatenate(
        [part[rows * m : rows * m + rows] for m in range(num_masks) for part in halves]
    )
