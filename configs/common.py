"""Fragments that several recipes share."""

from ml_collections import ConfigDict

# Where the large arrays are split over the devices that share one copy of the state: the input
# channels of every product. What is left whole is small.
FSDP_RULES = (
    (r"image_encoder/pos_embed$", (None, None, "fsdp")),
    (r"image_encoder/patch_embed/proj/kernel$", ("fsdp", None)),
    (r"image_encoder/block_\d+/(attn/(qkv|proj)|mlp/dense_\d)/kernel$", ("fsdp", None)),
    (r"image_encoder/neck_conv\d/kernel$", ("fsdp", None)),
    (r"mask_decoder/.*/(dense_\d|[qkv]_proj|out_proj)/kernel$", ("fsdp", None)),
    (r"mask_decoder/upscaling/split\d/conv/kernel$", ("fsdp", None, None, None)),
)


def base_config() -> ConfigDict:
    """Every section, with what no recipe changes."""
    config = ConfigDict()
    config.model = ConfigDict({"variant": "vit_b", "dtype": "float32"})
    config.data = ConfigDict()
    config.prompts = ConfigDict()
    config.losses = ConfigDict()
    config.optimizer = ConfigDict()
    config.sharding = ConfigDict({"data": -1, "fsdp": 1, "rules": FSDP_RULES, "cpu_devices": None})
    config.train = ConfigDict()
    config.checkpoint = ConfigDict()
    config.evals = ConfigDict()
    return config
