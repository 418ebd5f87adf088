"""The config section ``model``: a variant with changes, how it computes, what it builds."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax.numpy as jnp

from sam_jax.configuration import from_mapping
from sam_jax.errors import ConfigError
from sam_jax.models.layers import Remat
from sam_jax.models.masked_autoencoder import (
    AutoencoderConfig,
    MaskedAutoencoder,
    kept_patches,
)
from sam_jax.models.sam import Sam, SamConfig
from sam_jax.models.tiny_vit import TinyViTConfig
from sam_jax.models.variants import VARIANTS
from sam_jax.ops.attention import Implementation
from sam_jax.ops.dispatch import Kernels
from sam_jax.ops.images import RGB, ImageChannels


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model to build, and how it computes.

    Attributes:
      variant: a key of ``models.variants.VARIANTS``.
      image_size: height and width of the model input in pixels; None for the variant's own.
      drop_path_rate: see ``ImageEncoderConfig``; a TinyViT drops no paths.
      encoder: other fields of ``ImageEncoderConfig`` or ``TinyViTConfig`` that differ from the
        variant's.
      decoder: fields of ``MaskDecoderConfig`` that differ from the variant's.
      mask_channels: see ``SamConfig``.
      in_channels: channels of the images, whose values are taken as files store them; None for
        8-bit RGB, which all pictures are made. 3 and 1 are numbers, too: RGB or grey without
        stretching to 8 bits.
      pixel_mean: mean of each channel, by which images are normalised, in the units of the files;
        ``sam-jax channels`` computes it. None, for 8-bit RGB alone, is ImageNet's.
      pixel_std: deviation of each channel, likewise.
      remat: see ``layers.remat_block``.
      scan: see ``ImageEncoderViT``; not for a TinyViT.
      attention: see ``ops.attention.grid_attention``; not for a TinyViT.
      kernels: whether operations may use TPU kernels, see ``ops.dispatch``: "auto" (on a TPU, those
        that agree with the plain form there), "none", or "interpret" for tests.
      dtype: of the computation, "float32" or "bfloat16"; parameters are float32.
    """

    variant: str = "vit_b"
    image_size: tuple[int, int] | None = None
    drop_path_rate: float = 0.0
    encoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mask_channels: int = SamConfig.mask_channels
    in_channels: int | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    remat: Remat = "none"
    scan: bool = False
    attention: Implementation = "auto"
    kernels: Kernels = "auto"
    dtype: str = "float32"

    @property
    def sam(self) -> SamConfig:
        """The shape of the model.

        Raises:
          ConfigError: if there is no such variant or field, the shape is impossible, or statistics
            of channels are missing or no such.
        """
        if self.variant not in VARIANTS:
            raise ConfigError(
                f"model.variant = {self.variant!r} does not exist; there are {', '.join(VARIANTS)}"
            )
        base = VARIANTS[self.variant]
        encoder = dict(self.encoder)
        if self.drop_path_rate:
            encoder = {"drop_path_rate": self.drop_path_rate, **encoder}
        if self.image_size is not None:
            encoder["image_size"] = self._checked_image_size
        try:
            return dataclasses.replace(
                base,
                image_encoder=_changed(base.image_encoder, encoder, "model.encoder"),
                mask_decoder=_changed(base.mask_decoder, self.decoder, "model.decoder"),
                mask_channels=self.mask_channels,
                channels=self.channels,
            )
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"config.model: {error}") from None

    @property
    def _checked_image_size(self) -> tuple[int, int]:
        size = self.image_size
        if not isinstance(size, Sequence) or len(size) != 2 or min(size) < 1:
            raise ConfigError(
                f"model.image_size = {size!r}: expected height and width in pixels, as in "
                '--config.model.image_size="(512, 512)"'
            )
        return size[0], size[1]

    @property
    def channels(self) -> ImageChannels:
        """The channels of the images.

        Raises:
          ConfigError: if their statistics are missing or no such.
        """
        given = {"pixel_mean": self.pixel_mean, "pixel_std": self.pixel_std}
        if self.in_channels is not None:
            for name, value in given.items():
                if value is None:
                    raise ConfigError(
                        f"model.{name} is None with model.in_channels = {self.in_channels}: "
                        "expected a number for each channel, in the units of the files; "
                        "`sam-jax channels FILES` computes them, and prints the options to paste"
                    )
        try:
            return ImageChannels(
                self.in_channels,
                **{name: value for name, value in given.items() if value is not None},
            )
        except ValueError as error:
            raise ConfigError(f"model.{error}") from None


def model_config_of(shape: SamConfig) -> ModelConfig:
    """A config that builds a model of the given shape, every field of it written out."""
    encoder = shape.image_encoder
    return ModelConfig(
        variant="mobile_sam" if isinstance(encoder, TinyViTConfig) else "vit_b",
        image_size=encoder.image_size,
        drop_path_rate=getattr(encoder, "drop_path_rate", 0.0),
        encoder=dataclasses.asdict(encoder),
        decoder=dataclasses.asdict(shape.mask_decoder),
        mask_channels=shape.mask_channels,
        # ImageNet's are the default.
        **{} if shape.channels == RGB else _channel_options(shape.channels),
    )


def _channel_options(channels: ImageChannels) -> dict[str, Any]:
    return {
        "in_channels": channels.in_chans,
        "pixel_mean": channels.pixel_mean,
        "pixel_std": channels.pixel_std,
    }


def _changed(base: Any, changes: Mapping[str, Any], section: str) -> Any:
    return from_mapping(type(base), dataclasses.asdict(base) | dict(changes), section)


def build_model(config: ModelConfig) -> Sam:
    """The model that a config describes.

    Raises:
      ConfigError: see ``ModelConfig.sam``; or the type of computation is not known.
    """
    _check_choices(config)
    shape = config.sam
    if isinstance(shape.image_encoder, TinyViTConfig):
        for name, value in (("scan", False), ("attention", "auto")):
            if (found := getattr(config, name)) != value:
                raise ConfigError(
                    f"model.{name} = {found!r} is for a vision transformer's blocks, which "
                    f"{config.variant} has not; leave it at {value!r}"
                )
    return Sam(
        shape,
        config.remat,
        config.scan,
        config.attention,
        jnp.dtype(config.dtype),
    )


def build_autoencoder(config: ModelConfig, autoencoder: AutoencoderConfig) -> MaskedAutoencoder:
    """The masked autoencoder that pre-trains the encoder of the model that a config describes.

    Raises:
      ConfigError: see ``build_model``; or the encoder is no vision transformer, drops paths, or
        would see all patches or none.
    """
    _check_choices(config)
    encoder = config.sam.image_encoder
    if isinstance(encoder, TinyViTConfig):
        raise ConfigError(
            f"model.variant = {config.variant!r} has convolutions, which see the patches that a "
            "masked autoencoder must not see; take a vision transformer, as 'vit_b'"
        )
    if encoder.drop_path_rate:
        raise ConfigError(
            f"model.drop_path_rate = {encoder.drop_path_rate} is not for masked autoencoders, "
            "which are trained without; leave it at 0"
        )
    gh, gw = encoder.grid
    if not 0 < kept_patches(gh * gw, autoencoder.mask_rate) < gh * gw:
        raise ConfigError(
            f"autoencoder.mask_rate = {autoencoder.mask_rate} leaves the encoder "
            f"{kept_patches(gh * gw, autoencoder.mask_rate)} of {gh * gw} patches; it must see "
            "some, and not all"
        )
    return MaskedAutoencoder(
        encoder,
        autoencoder,
        config.channels,
        config.remat,
        config.scan,
        config.attention,
        jnp.dtype(config.dtype),
    )


def _check_choices(config: ModelConfig) -> None:
    """Raises ConfigError for options of the computation that there are not."""
    if config.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"model.dtype = {config.dtype!r} must be 'float32' or 'bfloat16'")
    for name, kinds in (("remat", Remat), ("attention", Implementation), ("kernels", Kernels)):
        if (value := getattr(config, name)) not in get_args(kinds):
            raise ConfigError(
                f"model.{name} = {value!r} must be one of {', '.join(get_args(kinds))}"
            )
