"""Segment Anything: one encoder call per image, any number of prompts after it."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Float, UInt32
from sam_jax.models.image_encoder import ImageEncoderConfig, ImageEncoderViT, Remat
from sam_jax.models.mask_decoder import (
    Attended,
    MaskDecoder,
    MaskDecoderConfig,
    MaskPrediction,
)
from sam_jax.models.prompt_encoder import PromptEmbeddings, PromptEncoder, Prompts
from sam_jax.ops.attention import Implementation
from sam_jax.ops.placement import BATCH, Placement

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
    """

    image_encoder: ImageEncoderConfig = ImageEncoderConfig()
    mask_decoder: MaskDecoderConfig = MaskDecoderConfig()
    mask_channels: int = 16

    def __post_init__(self):
        encoder = self.image_encoder
        for side in encoder.image_size:
            if side % encoder.patch_size:
                raise ValueError(
                    f"image_size {encoder.image_size} is not a multiple of the patch size "
                    f"{encoder.patch_size}"
                )
        if encoder.embed_dim % encoder.num_heads:
            raise ValueError(
                f"embed_dim {encoder.embed_dim} is not divisible by num_heads {encoder.num_heads}"
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
      remat, scan: see ``ImageEncoderViT``.
      attention: which form of the encoder's attention to use.
      dtype: type of the computation; parameters, logits and predicted IoU are float32.
      placement: the devices.

    Source: Kirillov et al. 2023, "Segment Anything", arXiv 2304.02643.
    """

    config: SamConfig
    remat: Remat = "none"
    scan: bool = False
    attention: Implementation = "auto"
    dtype: DTypeLike = jnp.float32
    placement: Placement = Placement()

    def setup(self) -> None:
        cfg = self.config
        self.image_encoder = ImageEncoderViT(
            cfg.image_encoder,
            self.remat,
            self.scan,
            self.attention,
            self.dtype,
            self.placement,
        )
        dim, kernels = cfg.image_encoder.output_dim, self.placement.kernels
        self.prompt_encoder = PromptEncoder(dim, cfg.mask_channels, self.dtype, kernels)
        self.mask_decoder = MaskDecoder(cfg.mask_decoder, dim, self.dtype, kernels)

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
        self, images: Float[Array, "b h w 3"], *, train: bool = False
    ) -> Float[Array, "b gh gw d"]:
        """Image embeddings of normalised, zero-padded images (``ops.images.normalize_images``).

        Training needs a ``dropout`` key for the dropped paths.
        """
        return self.image_encoder(images, train=train)

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
            single prompt), or the one of the fourth token.
          dropout_seeds: of each object, in training; None for no dropout.
        """
        return self.mask_decoder(
            self._embed(image_embeddings, prompts),
            multimask_output=multimask_output,
            dropout_seeds=dropout_seeds,
        )

    def attend(
        self,
        image_embeddings: Float[Array, "b gh gw d"],
        prompts: Prompts,
        *,
        multimask_output: bool,
    ) -> Attended:
        """The first part of ``decode``, which tells how good the masks would be."""
        embedded = self._embed(image_embeddings, prompts)
        return self.mask_decoder.attend(embedded, multimask_output=multimask_output)

    def draw(self, attended: Attended, *, multimask_output: bool) -> Float[Array, "b p m lh lw"]:
        """The second part of ``decode``: low-resolution logits, for those worth the work."""
        return self.mask_decoder.draw(attended, multimask_output=multimask_output)

    def _embed(self, image_embeddings: Array, prompts: Prompts) -> PromptEmbeddings:
        patch = self.config.image_encoder.patch_size
        gh, gw = image_embeddings.shape[1:3]
        return self.prompt_encoder(image_embeddings, prompts, (gh * patch, gw * patch))

    def __call__(
        self, images: Float[Array, "b h w 3"], prompts: Prompts, *, multimask_output: bool
    ) -> MaskPrediction:
        """``encode`` and ``decode`` in one call."""
        return self.decode(self.encode(images), prompts, multimask_output=multimask_output)


def decode_on_each_device(model: Sam) -> Callable[..., MaskPrediction]:
    """``Sam.decode``, by each device of the model's placement on its own images.

    Returns:
      a function of variables, embeddings, prompts and ``multimask_output``.
    """
    placement = model.placement
    decoder = model.clone(placement=placement.inside)
    by_image = placement.spec(BATCH)

    def decode_on_device(variables, image_embeddings, prompts, multimask_output):
        decode = placement.on_each_device(
            functools.partial(decoder.apply, multimask_output=multimask_output, method="decode"),
            [PartitionSpec(), by_image, by_image],
            by_image,
        )
        return decode(variables, image_embeddings, prompts)

    return decode_on_device


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
    images = jnp.zeros((1, height, width, 3), jnp.float32)
    variables = jax.jit(model.init, static_argnames="multimask_output")(
        key, images, prompts, multimask_output=True
    )
    # With JAX's 64 bits turned on, Flax makes float64.
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)
