"""Segment Anything: one encoder call per image, any number of prompts after it."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Float, UInt32
from sam_jax.models.image_encoder import ImageEncoderConfig, ImageEncoderViT, drop_path_scales
from sam_jax.models.layers import Remat, as_float32
from sam_jax.models.mask_decoder import (
    MaskDecoder,
    MaskDecoderConfig,
    MaskPrediction,
    TransformerOutput,
)
from sam_jax.models.prompt_encoder import PromptEncoder, Prompts
from sam_jax.models.tiny_vit import TinyViT, TinyViTConfig
from sam_jax.ops.attention import Implementation
from sam_jax.ops.images import RGB, ImageChannels
from sam_jax.tracing import shapes_once

# The parts of ``Sam`` that answer prompts; the other is the image encoder.
PROMPTED_PARTS = ("prompt_encoder", "mask_decoder")


@dataclasses.dataclass(frozen=True)
class SamConfig:
    """Shape of a whole model; ``models.variants`` holds the published and the small ones.

    Attributes:
      image_encoder: shape of the image encoder, whose ``output_dim`` is also the width of prompt
        embeddings and decoder.
      mask_decoder: shape of the mask decoder.
      mask_channels: channels in the middle of the branch that embeds masks.
      channels: of the images, with the statistics that they are normalised by.
    """

    image_encoder: ImageEncoderConfig | TinyViTConfig = ImageEncoderConfig()
    mask_decoder: MaskDecoderConfig = MaskDecoderConfig()
    mask_channels: int = 16
    channels: ImageChannels = RGB

    def __post_init__(self):
        encoder = self.image_encoder
        for side in encoder.image_size:
            if side % encoder.patch_size:
                raise ValueError(
                    f"image_size {encoder.image_size} is not a multiple of the patch size "
                    f"{encoder.patch_size}"
                )


class Sam(nn.Module):
    """The promptable segmentation model.

    ``encode`` and ``decode`` are separate and embeddings are arguments, so there is no state that
    could belong to another image::

        embeddings = model.apply(variables, images, method=Sam.encode)
        masks = model.apply(variables, embeddings, prompts, multimask_output=True,
                            method=Sam.decode)

    Variables have two collections: ``params``, which is trained, and ``constants``, the fixed
    random frequencies of the positional encoding.

    Attributes:
      config: the shape.
      remat: see ``layers.remat_block``.
      scan: see ``ImageEncoderViT``.
      attention: which form of the encoder's attention to use.
      dtype: type of the computation; parameters, logits and predicted IoU are float32.

    Source: Kirillov et al. 2023, "Segment Anything", arXiv 2304.02643.
    """

    config: SamConfig
    remat: Remat = "none"
    scan: bool = False
    attention: Implementation = "auto"
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        cfg = self.config
        self.image_encoder: ImageEncoderViT | TinyViT
        if isinstance(cfg.image_encoder, TinyViTConfig):
            self.image_encoder = TinyViT(cfg.image_encoder, self.remat, self.dtype)
        else:
            self.image_encoder = ImageEncoderViT(
                cfg.image_encoder, self.remat, self.scan, self.attention, self.dtype
            )
        dim = cfg.image_encoder.output_dim
        self.prompt_encoder = PromptEncoder(dim, cfg.mask_channels, self.dtype)
        self.mask_decoder = MaskDecoder(cfg.mask_decoder, dim, self.dtype)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the model input that the positions are made for."""
        return self.config.image_encoder.image_size

    @property
    def low_res_size(self) -> tuple[int, int]:
        """Height and width of low-resolution logits at ``image_size``."""
        gh, gw = self.config.image_encoder.grid
        return 4 * gh, 4 * gw

    def encode(
        self,
        images: Float[Array, "b h w c"],
        path_scales: Float[Array, "depth 2 b"] | None = None,
    ) -> Float[Array, "b gh gw d"]:
        """Image embeddings of normalised, zero-padded images (``ops.images.normalize_images``).

        Args:
          images: of any size that is a multiple of the patch size.
          path_scales: from ``draw_path_scales``; None outside of training.
        """
        return self.image_encoder(images, path_scales)

    def draw_path_scales(self, key: Array, num_images: int) -> Float[Array, "depth 2 b"] | None:
        """Factors of the encoder's residual branches for a training step, see ``encode``."""
        encoder = self.config.image_encoder
        if isinstance(encoder, TinyViTConfig):
            return None
        return drop_path_scales(key, encoder, num_images)

    def decode(
        self,
        image_embeddings: Float[Array, "b gh gw d"],
        prompts: Prompts,
        *,
        multimask_output: bool,
        dropout_seeds: UInt32[Array, "b p"] | None = None,
    ) -> MaskPrediction:
        """Mask candidates for the prompted objects of embedded images.

        Args:
          image_embeddings: from ``encode``.
          prompts: at least one kind, or the decoder answers one empty prompt per image.
          multimask_output: three candidates, for prompts that leave room for doubt (the paper: one
            single prompt), or one, from a token of its own (the paper's fourth).
          dropout_seeds: of each object, in training; None for no dropout.
        """
        return self.mask_decoder(
            **self._decoder_inputs(image_embeddings, prompts),
            multimask_output=multimask_output,
            dropout_seeds=dropout_seeds,
        )

    def run_transformer(
        self,
        image_embeddings: Float[Array, "b gh gw d"],
        prompts: Prompts,
        *,
        multimask_output: bool,
    ) -> TransformerOutput:
        """The first part of ``decode``, which tells how good the masks would be."""
        return self.mask_decoder.run_transformer(
            **self._decoder_inputs(image_embeddings, prompts), multimask_output=multimask_output
        )

    def predict_masks(
        self, output: TransformerOutput, *, multimask_output: bool
    ) -> Float[Array, "b p m lh lw"]:
        """The second part of ``decode``: low-resolution logits, for those worth the work."""
        return self.mask_decoder.predict_masks(output, multimask_output=multimask_output)

    def _decoder_inputs(self, image_embeddings: Array, prompts: Prompts) -> dict[str, Any]:
        """Arguments of the mask decoder, by name, for prompted objects of embedded images."""
        b, gh, gw, _ = image_embeddings.shape
        patch, encoder = self.config.image_encoder.patch_size, self.prompt_encoder
        image_size = gh * patch, gw * patch
        return {
            "image_embeddings": encoder.add_dense_prompt_embeddings(image_embeddings, prompts),
            "image_pe": encoder.image_pe((gh, gw)),
            "sparse_prompt_embeddings": encoder.sparse_prompt_embeddings(
                prompts, image_size, num_images=b
            ),
        }

    def __call__(
        self, images: Float[Array, "b h w c"], prompts: Prompts, *, multimask_output: bool
    ) -> MaskPrediction:
        """``encode`` and ``decode`` in one call."""
        return self.decode(self.encode(images), prompts, multimask_output=multimask_output)


def init_variables(model: Sam, key: Array) -> dict:
    """Fresh variables of a model: ``{"params": ..., "constants": ...}``, all float32.

    Works under ``jax.eval_shape``, for sizes and shardings without memory.
    """
    height, width = model.image_size
    prompts = Prompts(
        point_coords=jnp.zeros((1, 1, 1, 2), jnp.float32),
        point_labels=jnp.ones((1, 1, 1), jnp.int32),
        point_valid=jnp.ones((1, 1, 1), bool),
    )
    images = jnp.zeros((1, height, width, model.config.channels.count), jnp.float32)
    init = jax.jit(model.init, static_argnames="multimask_output")
    variables: dict = as_float32(init(key, images, prompts, multimask_output=True))
    return variables


def variable_shapes(config: SamConfig) -> dict[str, Any]:
    """Shapes and types of a model's variables, as a tree of ``jax.ShapeDtypeStruct``."""
    shapes: dict[str, Any] = shapes_once(
        lambda: init_variables(Sam(config), jax.random.key(0)), repr(config)
    )
    return shapes
