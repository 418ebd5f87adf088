"""A tiny model on procedural shapes: minutes on two CPU cores.

python train.py --config configs/demo.py --workdir runs/demo
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The whole recipe; `make demo` runs it."""
    config = common.base_config()
    config.model = {
        "variant": "vit_ti",
        "image_size": (128, 128),
        "encoder": {
            "patch_size": 8,
            "depth": 6,
            "embed_dim": 128,
            "num_heads": 4,
            "global_attention_blocks": (1, 3, 5),
            "output_dim": 64,
        },
        "decoder": {"mlp_dim": 256, "iou_head_dim": 64, "dropout_rate": 0.0},
        "dtype": "float32",
    }
    config.data = {
        "sources": (
            {"kind": "synthetic", "num_images": 20_000, "image_size": (128, 128), "seed": 0},
        ),
        "batch_size": 16,
        "max_masks": 4,
        "hflip_rate": 0.5,
    }
    config.prompts = {
        "num_corrections": 1,
        "random_mask_round": False,
        "final_mask_round": False,
        "box_noise_max_px": 3.0,
    }
    config.optimizer = {
        "peak_learning_rate": 1e-3,
        "warmup_steps": 50,
        "schedule": "cosine",
        "layer_decay": 1.0,
        "clip_norm": 1.0,
    }
    config.train = {"num_steps": 800, "log_every": 25}
    config.checkpoint = {"every_steps": 200}
    config.evals = {
        "synthetic": {
            "sources": (
                {"kind": "synthetic", "num_images": 64, "image_size": (128, 128), "seed": 1},
            ),
            "protocols": ("center", "box"),
            "num_clicks": (1, 2, 3, 5),
        }
    }
    return config
