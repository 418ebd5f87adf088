"""The published variants, and small ones for modest hardware."""

import dataclasses

from sam_jax.models.image_encoder import ImageEncoderConfig
from sam_jax.models.mask_decoder import MaskDecoderConfig
from sam_jax.models.sam import SamConfig

# The small ones keep the published design: patches of 16 pixels, one block in three global. Their
# windows divide the grid, so none of their work goes into padding, and their decoder is half as
# wide, since at 256 pixels it and not the encoder is what a training step spends its time on.
_SMALL_DECODER = MaskDecoderConfig(num_heads=8, mlp_dim=512, iou_head_dim=128)

VARIANTS: dict[str, SamConfig] = {
    "vit_ti": SamConfig(
        ImageEncoderConfig(
            image_size=(256, 256),
            embed_dim=192,
            num_heads=3,
            window_size=8,
            output_dim=128,
        ),
        _SMALL_DECODER,
    ),
    "vit_s": SamConfig(
        ImageEncoderConfig(image_size=(512, 512), embed_dim=384, num_heads=6, window_size=8),
    ),
    "vit_b": SamConfig(),
    "vit_l": SamConfig(
        ImageEncoderConfig(
            embed_dim=1024, depth=24, num_heads=16, global_attention_blocks=(5, 11, 17, 23)
        ),
    ),
    "vit_h": SamConfig(
        ImageEncoderConfig(
            embed_dim=1280, depth=32, num_heads=16, global_attention_blocks=(7, 15, 23, 31)
        ),
    ),
}


def build_config(
    variant: str,
    *,
    image_size: tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
    encoder: dict | None = None,
    decoder: dict | None = None,
) -> SamConfig:
    """The shape of a variant with some of its fields changed.

    Args:
      variant: a key of ``VARIANTS``.
      image_size: height and width of the model input in pixels, if not the variant's own.
      drop_path_rate: see ``ImageEncoderConfig``.
      encoder: other fields of ``ImageEncoderConfig`` to change.
      decoder: fields of ``MaskDecoderConfig`` to change.

    Raises:
      ValueError: if there is no such variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    base = VARIANTS[variant]
    encoder_changes = {"drop_path_rate": drop_path_rate, **(encoder or {})}
    if image_size is not None:
        encoder_changes["image_size"] = tuple(image_size)
    return dataclasses.replace(
        base,
        image_encoder=dataclasses.replace(base.image_encoder, **encoder_changes),
        mask_decoder=dataclasses.replace(base.mask_decoder, **(decoder or {})),
    )
