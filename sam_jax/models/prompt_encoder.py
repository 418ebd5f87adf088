"""The prompt encoder: points, boxes, text tokens and masks become embeddings."""

from typing import no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Bool, Float, Int
from sam_jax.models.layers import NormWeights, Projection, gelu
from sam_jax.ops import map_kernel
from sam_jax.ops.cells import SUBPIXELS, to_cells
from sam_jax.ops.full_precision import add_bias, add_shared, broadcast_to, multiply
from sam_jax.ops.placement import Kernels
from sam_jax.ops.positional import fourier_features, grid_fourier_features
from sam_jax.ops.tpu_kernel import kernel_gelu, product

# What a point means. The model has one learned embedding for each of the four kinds from
# BACKGROUND on, and another one for "not a point".
NOT_A_POINT, BACKGROUND, FOREGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = -1, 0, 1, 2, 3
NUM_POINT_KINDS = 4
# Of the norms of the mask branch.
_NORM_EPSILON = 1e-6


@no_type_check  # JAX's transformations fill a pytree with placeholders
@flax.struct.dataclass
class Prompts:
    """What the user says about each object; every kind of prompt may be absent (None).

    Within a batch, an object without a certain kind has it marked invalid. Values at invalid
    places are ignored entirely: they change no output.

    Attributes:
      point_coords: ``(x, y)`` pixels of the resized, padded model input; pixel indices, the model
        adds the half pixel.
      point_labels: 1 foreground, 0 background, 2 and 3 the corners of a box given as points, -1
        for a token that stands for "no point" and is attended to, as clients of the published ONNX
        decoder send it.
      point_valid: which points exist.
      boxes_xyxy: corners in the same frame as the points.
      box_valid: which objects have a box.
      mask_logits: low-resolution logits as the decoder returns them, unbounded.
      mask_valid: which objects have a mask.
      text_tokens: embeddings already projected to the decoder's width, appended as they are: the
        place where a text encoder enters.
      text_valid: which text tokens exist.
    """

    point_coords: Float[Array, "b p n 2"] | None = None
    point_labels: Int[Array, "b p n"] | None = None
    point_valid: Bool[Array, "b p n"] | None = None
    boxes_xyxy: Float[Array, "b p 4"] | None = None
    box_valid: Bool[Array, "b p"] | None = None
    mask_logits: Float[Array, "b p lh lw"] | None = None
    mask_valid: Bool[Array, "b p"] | None = None
    text_tokens: Float[Array, "b p s d"] | None = None
    text_valid: Bool[Array, "b p s"] | None = None


@no_type_check  # JAX's transformations fill a pytree with placeholders
@flax.struct.dataclass
class PromptEmbeddings:
    """What the mask decoder takes in.

    Attributes:
      sparse: one token per point, box corner or text token; the count of objects is 1 if there is
        no sparse prompt at all.
      sparse_valid: which of them exist.
      cells: image embeddings with the dense embeddings of masks added; the axis of objects has size
        1 where all objects share one embedding, so that nothing is copied per object.
      image_pe: positional encoding of the grid.
    """

    sparse: Float[Array, "b p t d"]
    sparse_valid: Bool[Array, "b p t"]
    cells: Float[Array, "b q gh gw d"]
    image_pe: Float[Array, "gh gw d"]


class PromptEncoder(nn.Module):
    """Embeddings of prompts; those of masks are added to the image's.

    Attributes:
      embed_dim: channels of the embeddings, those of the image embeddings.
      mask_channels: channels in the middle of the mask branch.
      kernels: see ``Placement.kernels``.

    Source: Kirillov et al. 2023, appendix A.
    """

    embed_dim: int = 256
    mask_channels: int = 16
    dtype: DTypeLike = jnp.float32
    kernels: Kernels = "none"

    def setup(self) -> None:
        normal = nn.initializers.normal(1.0)
        self.point_kinds = self.param("point_kinds", normal, (NUM_POINT_KINDS, self.embed_dim))
        self.not_a_point = self.param("not_a_point", normal, (self.embed_dim,))
        self.no_mask = self.param("no_mask", normal, (self.embed_dim,))
        self.mask_downscaling = MaskDownscaling(
            self.embed_dim, self.mask_channels, self.dtype, self.kernels, name="mask_downscaling"
        )
        # Not a parameter: an optimizer that decays weights would shrink it although it has no
        # gradient.
        self.frequencies = self.variable(
            "constants",
            "frequencies",
            lambda: normal(self.make_rng("params"), (2, self.embed_dim // 2)),
        )

    def __call__(
        self,
        image_embeddings: Float[Array, "b gh gw d"],
        prompts: Prompts,
        image_size: tuple[int, int],
    ) -> PromptEmbeddings:
        """Embeds the prompts for the decoder.

        Args:
          image_embeddings: what masks are added to.
          prompts: see ``Prompts``.
          image_size: height and width in pixels of the padded model input, the frame of the
            coordinates.

        Raises:
          ValueError: if a kind of prompt comes without its validity, or points without labels.
        """
        _check_complete(prompts)
        sparse, valid = self._embed_sparse(prompts, image_size)
        b, gh, gw, _ = image_embeddings.shape
        if not sparse:
            sparse.append(jnp.zeros((b, 1, 0, self.embed_dim), self.dtype))
            valid.append(jnp.zeros((b, 1, 0), bool))
        image_pe = grid_fourier_features((gh, gw), self.frequencies.value)
        return PromptEmbeddings(
            sparse=jnp.concatenate(sparse, axis=2).astype(self.dtype),
            sparse_valid=jnp.concatenate(valid, axis=2),
            cells=self._add_masks(image_embeddings.astype(self.dtype), prompts),
            image_pe=image_pe.astype(self.dtype),
        )

    def _embed_sparse(self, prompts: Prompts, image_size):
        tokens, valid = [], []
        pad_valid = None
        if prompts.point_coords is not None:
            coords = _zero_invalid(prompts.point_coords, prompts.point_valid)
            tokens.append(self._embed_points(coords, prompts.point_labels, image_size))
            valid.append(prompts.point_valid)
            # The published model closes a list of points that comes without a box with one token
            # that says "not a point", and one that comes with a box with none.
            pad_valid = jnp.any(prompts.point_valid, axis=-1, keepdims=True)
        if prompts.boxes_xyxy is not None:
            boxes = _zero_invalid(prompts.boxes_xyxy, prompts.box_valid)
            corners = rearrange(boxes, "b p (corner xy) -> b p corner xy", xy=2)
            labels = jnp.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT])
            labels = jnp.broadcast_to(labels, corners.shape[:-1])
            if pad_valid is not None:
                # What has no box leaves the place of a corner to it: a token less for everybody.
                labels = jnp.where(prompts.box_valid[..., None], labels, NOT_A_POINT)
                pad_valid |= prompts.box_valid[..., None]
            tokens.append(self._embed_points(corners, labels, image_size))
            of_box = prompts.box_valid[..., None]
            valid += [of_box if pad_valid is None else pad_valid, of_box]
        elif pad_valid is not None:
            tokens.append(jnp.broadcast_to(self.not_a_point, (*pad_valid.shape, self.embed_dim)))
            valid.append(pad_valid)
        if prompts.text_tokens is not None:
            tokens.append(_zero_invalid(prompts.text_tokens, prompts.text_valid))
            valid.append(prompts.text_valid)
        return tokens, valid

    def _embed_points(self, coords, labels, image_size):
        height, width = image_size
        # Half a pixel takes the index of a pixel to its centre.
        coords_01 = (coords + 0.5) / jnp.array([width, height], jnp.float32)
        kinds = self.point_kinds[jnp.clip(labels, 0, NUM_POINT_KINDS - 1)]
        points = fourier_features(coords_01, self.frequencies.value) + kinds
        return jnp.where((labels == NOT_A_POINT)[..., None], self.not_a_point, points)

    def _add_masks(self, image_embeddings, prompts: Prompts):
        if prompts.mask_logits is None:
            if self.is_initializing():
                self.mask_downscaling(jnp.zeros((1, 1, SUBPIXELS, 1)))
            return add_bias(image_embeddings[:, None], self.no_mask)
        logits = _zero_invalid(to_cells(prompts.mask_logits), prompts.mask_valid)
        gh, gw = image_embeddings.shape[1:3]
        shared = rearrange(image_embeddings, "b h w d -> b (h w) d")
        cells = self.mask_downscaling.added_to(shared, logits, prompts.mask_valid, self.no_mask)
        return rearrange(cells, "b p (h w) d -> b p h w d", h=gh, w=gw)


def _zero_invalid(values: Float[Array, "b p ..."], valid: Bool[Array, "b p ..."]) -> Array:
    """Values, with zeros at invalid places.

    Those may hold anything, NaN included, which would pass through attention, since 0 * NaN is NaN,
    and through a later ``jnp.where`` to the gradients.
    """
    return jnp.where(jnp.expand_dims(valid, range(valid.ndim, values.ndim)), values, 0.0)


def _check_complete(prompts: Prompts) -> None:
    for kind, others in {
        "point_coords": ("point_labels", "point_valid"),
        "boxes_xyxy": ("box_valid",),
        "mask_logits": ("mask_valid",),
        "text_tokens": ("text_valid",),
    }.items():
        for other in others:
            if (getattr(prompts, kind) is None) != (getattr(prompts, other) is None):
                raise ValueError(f"prompts.{kind} and prompts.{other} must be given together")


class MaskDownscaling(nn.Module):
    """Dense embeddings of masks: two strided convolutions and a pointwise one.

    Kernel and stride are 2 twice over, so all of a cell's embedding comes of its own 16 sub-pixels,
    and the convolutions are small matrices on the one axis while cells fill the other.
    """

    embed_dim: int
    channels: int
    dtype: DTypeLike = jnp.float32
    kernels: Kernels = "none"

    def setup(self) -> None:
        quarter = self.channels // 4
        self.conv1 = Projection(quarter, dtype=self.dtype)
        self.norm1 = NormWeights()
        self.conv2 = Projection(self.channels, dtype=self.dtype)
        self.norm2 = NormWeights()
        self.conv3 = Projection(self.embed_dim, dtype=self.dtype)

    def __call__(self, mask_logits: Float[Array, "b p 16 cells"]) -> Float[Array, "b p cells d"]:
        """The embedding of each cell."""
        (kernel1, bias1), norm1, (kernel2, bias2), norm2, (kernel3, bias3) = self._weights()
        x = jnp.einsum("bpsn,sqc->bpqcn", mask_logits.astype(self.dtype), kernel1)
        x = self._normalised(add_shared(x, bias1[:, None]), norm1)
        x = jnp.einsum("bpqcn,qce->bpen", x, kernel2)
        x = self._normalised(add_shared(x, bias2[:, None]), norm2)
        return add_bias(jnp.einsum("bpcn,cd->bpnd", x, kernel3), bias3)

    def _normalised(self, x, norm):
        """LayerNorm over the axis before the last, and GELU."""
        scale, shift = (w[:, None] for w in norm)
        x = x.astype(jnp.float32)
        x -= jnp.mean(x, axis=-2, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=-2, keepdims=True)
        x = x * jax.lax.rsqrt(variance + _NORM_EPSILON) * scale + shift
        return gelu(x.astype(self.dtype))

    def _weights(self):
        """Kernels and biases; ``s`` are a cell's sub-pixels, ``q`` its quarters."""
        kernel, bias = self.conv1(4)
        # Each 2 x 2 of the 4 x 4 sub-pixels by itself: zeros for the others.
        kernel = rearrange(kernel, "(i j) c -> 1 i 1 j 1 1 c", i=2)
        kernel = multiply(kernel, np.eye(4, dtype=np.float32).reshape(2, 1, 2, 1, 2, 2, 1))
        first = rearrange(kernel, "h i w j H W c -> (h i w j) (H W) c"), bias
        kernel, bias = self.conv2(self.channels)
        second = rearrange(kernel, "(q c) e -> q c e", q=4), bias
        norms = self.norm1(self.channels // 4), self.norm2(self.channels)
        return first, norms[0], second, norms[1], self.conv3(self.channels)

    def added_to(
        self,
        shared: Float[Array, "b cells d"],
        mask_logits: Float[Array, "b p 16 cells"],
        mask_valid: Bool[Array, "b p"],
        no_mask: Float[Array, " d"],
    ) -> Float[Array, "b p cells d"]:
        """An image's cells, and what each object's mask, or that it has none, adds to them."""
        supported = map_kernel.supports(shared.shape[1], self.embed_dim, self.channels)
        if self.kernels == "none" or not supported:
            embedded = self(mask_logits)
            without = broadcast_to(no_mask, embedded.shape, embedded.dtype)
            embedded = jnp.where(mask_valid[..., None, None], embedded, without)
            return add_shared(embedded, shared[:, None])
        return map_kernel.add_of_maps(
            map_kernel.MapFunction(
                _embed_masks,
                name="embed_masks",
                flops_per_cell=2 * self.channels * (2 * SUBPIXELS + self.embed_dim),
            ),
            (*self._matrices(), no_mask[None]),
            mask_logits.astype(self.dtype),
            shared,
            mask_valid,
            interpret=self.kernels == "interpreted",
        )

    def _matrices(self):
        """What ``_embed_masks`` takes: three kernels, six columns, and a row."""
        (kernel1, bias1), norm1, (kernel2, bias2), norm2, (kernel3, bias3) = self._weights()
        # The mean over channels is linear in the logits, so centred kernels make centred results.
        kernel1, bias1, kernel2, bias2 = (
            x - jnp.mean(x, axis=-1, keepdims=True)
            for x in (y.astype(jnp.float32) for y in (kernel1, bias1, kernel2, bias2))
        )
        kernel1 = rearrange(kernel1, "s q c -> s (q c)")
        kernel2 = rearrange(kernel2, "q c e -> (q c) e")
        columns = (*(jnp.tile(x, 4) for x in (bias1, *norm1)), bias2, *norm2)
        return (
            *(x.astype(self.dtype) for x in (kernel1, kernel2, kernel3)),
            *(x.astype(jnp.float32)[:, None] for x in columns),
            bias3[None],
        )


def _embed_masks(weights, logits, is_valid):
    """Embeddings ``[cells, d]`` of some cells of one object; quarters are side by side."""
    kernels, columns, (bias3, no_mask) = weights[:3], weights[3:9], weights[9:]
    num_rows = columns[0].shape[0]
    row, other = (
        jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (num_rows,) * 2, axis), num_rows // 4)
        for axis in (0, 1)
    )
    means = jnp.where(row == other, 4 / num_rows, 0.0)

    def normalised(x, variance, scale, shift):
        x = x * jax.lax.rsqrt(variance + _NORM_EPSILON) * scale + shift
        return kernel_gelu(x, logits.dtype).astype(logits.dtype)

    x = product(kernels[0], logits, (0, 0)) + columns[0]
    x = normalised(x, product(means, jnp.square(x), (1, 0)), *columns[1:3])
    x = product(kernels[1], x, (0, 0)) + columns[3]
    x = normalised(x, jnp.mean(jnp.square(x), axis=0, keepdims=True), *columns[4:])
    embedded = product(x, kernels[2], (0, 0)) + bias3
    return jnp.where(is_valid, embedded, no_mask)
