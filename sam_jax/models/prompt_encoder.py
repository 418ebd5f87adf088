"""The prompt encoder: points, boxes, text tokens and masks become embeddings."""

from typing import no_type_check

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Bool, DimSize, Float, Int
from sam_jax.models.layers import DenseParams, NormParams
from sam_jax.ops.full_precision import add_bias
from sam_jax.ops.mask_embedding import MaskEmbeddingWeights, add_mask_embeddings
from sam_jax.ops.positional import fourier_features, grid_fourier_features

# What a point means. The model has one learned embedding for each of the four kinds from
# BACKGROUND on, and another one for "not a point".
NOT_A_POINT, BACKGROUND, FOREGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = -1, 0, 1, 2, 3
NUM_POINT_KINDS = 4
_NORM_EPSILON = 1e-6
# Tokens, and which of them an object has.
_Embedded = tuple[Float[Array, "b p t d"], Bool[Array, "b p t"]]


@no_type_check  # JAX's transformations fill a pytree with placeholders
@flax.struct.dataclass
class Prompts:
    """Prompts for each object; every kind of prompt may be absent (None).

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
class SparseEmbeddings:
    """Embeddings of points, boxes and text tokens.

    Attributes:
      tokens: one per point, box corner or text token; the count of objects is 1 if there is no such
        prompt at all.
      valid: which of them exist.
    """

    tokens: Float[Array, "b p t d"]
    valid: Bool[Array, "b p t"]


class PromptEncoder(nn.Module):
    """Sparse embeddings of points, boxes and text; dense embeddings of masks.

    Attributes:
      embed_dim: channels of the embeddings, those of the image embeddings.
      mask_channels: channels in the middle of the mask branch.

    Source: Kirillov et al. 2023, appendix A.
    """

    embed_dim: int = 256
    mask_channels: int = 16
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        normal = nn.initializers.normal(1.0)
        self.point_kinds = self.param("point_kinds", normal, (NUM_POINT_KINDS, self.embed_dim))
        self.not_a_point = self.param("not_a_point", normal, (self.embed_dim,))
        self.no_mask = self.param("no_mask", normal, (self.embed_dim,))
        self.mask_downscaling = MaskDownscaling(self.embed_dim, self.mask_channels)
        # Not a parameter: an optimizer that decays weights would shrink it although it has no
        # gradient.
        self.frequencies = self.variable(
            "constants",
            "frequencies",
            lambda: normal(self.make_rng("params"), (2, self.embed_dim // 2)),
        )

    def __call__(
        self, prompts: Prompts, image_size: tuple[int, int], grid: tuple[int, int]
    ) -> tuple[SparseEmbeddings, Float[Array, "b #p gh gw d"]]:
        """Sparse and dense embeddings of prompts; see the methods of these names."""
        sparse = self.sparse_prompt_embeddings(prompts, image_size)
        return sparse, self.dense_prompt_embeddings(prompts, grid)

    def sparse_prompt_embeddings(
        self, prompts: Prompts, image_size: tuple[int, int], num_images: DimSize = 1
    ) -> SparseEmbeddings:
        """Embeddings of points, boxes and text tokens.

        Args:
          prompts: see ``Prompts``.
          image_size: height and width in pixels of the padded model input, the frame of the
            coordinates.
          num_images: of the batch, where there is no such prompt.

        Raises:
          ValueError: if a kind of prompt comes without its validity, or points without labels.
        """
        _check_complete(prompts)
        embedded = self._embed_sparse(prompts, image_size)
        if not embedded:
            nothing = jnp.zeros((num_images, 1, 0, self.embed_dim), self.dtype)
            embedded = [(nothing, jnp.zeros((num_images, 1, 0), bool))]
        tokens, valid = (jnp.concatenate(parts, axis=2) for parts in zip(*embedded, strict=True))
        return SparseEmbeddings(tokens.astype(self.dtype), valid)

    def dense_prompt_embeddings(
        self, prompts: Prompts, grid: tuple[int, int]
    ) -> Float[Array, "b #p gh gw d"]:
        """Embeddings of masks, one for each image token; the same for all objects without one.

        Args:
          prompts: see ``Prompts``.
          grid: rows and columns of image tokens.
        """
        b = 1 if prompts.mask_logits is None else prompts.mask_logits.shape[0]
        image = jnp.zeros((b, *grid, self.embed_dim), self.dtype)
        return self.add_dense_prompt_embeddings(image, prompts)

    def add_dense_prompt_embeddings(
        self, image_embeddings: Float[Array, "b gh gw d"], prompts: Prompts
    ) -> Float[Array, "b #p gh gw d"]:
        """``image_embeddings + dense_prompt_embeddings``, as one operation.

        The axis of objects has size 1 where no object has a mask, so that nothing is copied.
        """
        # Also without a mask: a module's parameters are made where it is first called.
        weights = self.mask_downscaling()
        image_embeddings = image_embeddings.astype(self.dtype)
        if prompts.mask_logits is None:
            return add_bias(image_embeddings[:, None], self.no_mask)
        return add_mask_embeddings(
            weights,
            image_embeddings,
            _zero_invalid(prompts.mask_logits, prompts.mask_valid),
            prompts.mask_valid,
            self.no_mask,
            norm_epsilon=_NORM_EPSILON,
        )

    def image_pe(self, grid: tuple[int, int]) -> Float[Array, "gh gw d"]:
        """Positional encoding of the image tokens."""
        return grid_fourier_features(grid, self.frequencies.value).astype(self.dtype)

    def _embed_sparse(self, prompts: Prompts, image_size: tuple[int, int]) -> list[_Embedded]:
        """Tokens of each kind of prompt, and which of them an object has.

        As in the published model, an object has the tokens of its points, then those of its box's
        two corners. One with points and no box has a token in the place of the box that says "not
        a point". Where others of the batch have a box, that is the place of the first corner.
        """
        embedded = []
        if prompts.point_coords is not None:
            embedded.append(self._embed_clicks(prompts, image_size))
        if prompts.boxes_xyxy is not None:
            embedded.append(self._embed_boxes(prompts, image_size))
        elif prompts.point_coords is not None:
            has_points = _any_point(prompts)
            shape = (*has_points.shape, self.embed_dim)
            embedded.append((jnp.broadcast_to(self.not_a_point, shape), has_points))
        if prompts.text_tokens is not None:
            text = _zero_invalid(prompts.text_tokens, prompts.text_valid)
            embedded.append((text, prompts.text_valid))
        return embedded

    def _embed_clicks(self, prompts: Prompts, image_size):
        coords = _zero_invalid(prompts.point_coords, prompts.point_valid)
        points = self._embed_points(coords, prompts.point_labels, image_size)
        return points, prompts.point_valid

    def _embed_boxes(self, prompts: Prompts, image_size):
        boxes = _zero_invalid(prompts.boxes_xyxy, prompts.box_valid)
        corners = rearrange(boxes, "b p (corner xy) -> b p corner xy", xy=2)
        labels = jnp.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT])
        labels = jnp.broadcast_to(labels, corners.shape[:-1])
        has_box = prompts.box_valid[..., None]
        has_first = has_box
        if prompts.point_coords is not None:
            labels = jnp.where(has_box, labels, NOT_A_POINT)
            has_first = has_box | _any_point(prompts)
        valid = jnp.concatenate([has_first, has_box], axis=-1)
        return self._embed_points(corners, labels, image_size), valid

    def _embed_points(self, coords, labels, image_size):
        height, width = image_size
        # Half a pixel takes the index of a pixel to its centre.
        coords_01 = (coords + 0.5) / jnp.array([width, height], jnp.float32)
        kinds = self.point_kinds[jnp.clip(labels, 0, NUM_POINT_KINDS - 1)]
        points = fourier_features(coords_01, self.frequencies.value) + kinds
        return jnp.where((labels == NOT_A_POINT)[..., None], self.not_a_point, points)


class MaskDownscaling(nn.Module):
    """Parameters of the branch that embeds masks: two strided convolutions and a pointwise one."""

    embed_dim: int
    channels: int

    @nn.compact
    def __call__(self) -> MaskEmbeddingWeights:
        quarter, channels = self.channels // 4, self.channels
        return MaskEmbeddingWeights(
            *DenseParams(quarter, name="conv1")(4),
            NormParams(name="norm1")(quarter),
            *DenseParams(channels, name="conv2")(4 * quarter),
            NormParams(name="norm2")(channels),
            *DenseParams(self.embed_dim, name="conv3")(channels),
        )


def _any_point(prompts: Prompts) -> Bool[Array, "b p 1"]:
    return jnp.any(prompts.point_valid, axis=-1, keepdims=True)


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
