"""A run small enough for a test, as a config file that train.py takes."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common

# Settings under which it is compiled sooner: an object is prompted once; there is a layer of each
# kind.
ONE_ROUND = (
    "prompts.num_corrections=0",
    "prompts.random_mask_round=False",
    "prompts.final_mask_round=False",
)
ONE_LAYER = ("model.encoder.depth=1", "model.encoder.global_attention_blocks=()")


def get_config() -> ConfigDict:
    """A two-block model on 32-pixel shapes, with all of the paper's kinds of rounds."""
    config = common.base_config()
    config.model = {
        "variant": "vit_ti",
        "image_size": (32, 48),
        "drop_path_rate": 0.1,
        "encoder": {
            "patch_size": 8,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "global_attention_blocks": (1,),
            "window_size": 4,
            "output_dim": 16,
        },
        "decoder": {"depth": 1, "num_heads": 2, "mlp_dim": 16, "iou_head_dim": 16},
    }
    config.data = {
        "sources": ({"kind": "synthetic", "num_images": 40, "image_size": (40, 48), "seed": 0},),
        "batch_size": 8,
        "max_masks": 2,
        "num_workers": 0,
    }
    config.prompts = {
        "num_corrections": 1,
        "random_mask_round": True,
        "final_mask_round": True,
        "box_noise_max_px": 2.0,
    }
    config.losses = {"prompts_per_chunk": 1}
    config.optimizer = {"warmup_steps": 2, "peak_learning_rate": 1e-3, "accumulate_steps": 1}
    config.train = {
        "num_steps": 10,
        "log_every": 5,
        "eval_every": 10,
        "ema_decay": 0.7,
        # For the command line, which takes no key that is not here.
        "watch": placeholder(str),
    }
    config.checkpoint = {"every_steps": 2}
    config.evals = {
        "shapes": {
            "sources": ({"kind": "synthetic", "num_images": 3, "image_size": (40, 48), "seed": 1},),
            "protocols": ("center", "box"),
            "num_clicks": (1, 2),
            "prompts_per_call": 3,
        }
    }
    return config
