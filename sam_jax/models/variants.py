"""The published variants, and small ones for modest hardware."""

from sam_jax.models.image_encoder import ImageEncoderConfig
from sam_jax.models.mask_decoder import MaskDecoderConfig
from sam_jax.models.sam import SamConfig
from sam_jax.models.tiny_vit import TinyViTConfig

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
    # "vit_t" in MobileSAM's own registry.
    "mobile_sam": SamConfig(TinyViTConfig()),
}
