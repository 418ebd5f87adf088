"""Training a small model from scratch on a CPU, whatever the data."""

from ml_collections import ConfigDict

from configs import common

# Changes of vit_ti's.
ENCODER = {
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "global_attention_blocks": (1, 3),
    "output_dim": 64,
}


def small_config(train: tuple[dict, ...], val: tuple[dict, ...]) -> ConfigDict:
    """About an hour on two cores, 6 to 8 images/s.

    Args:
      train: sources to train on, drawn from equally often, whatever their sizes.
      val: sources to evaluate on, the same ways of naming them.
    """
    config = common.base_config()
    config.model = {
        "variant": "vit_ti",
        "encoder": ENCODER,
        "decoder": {"num_heads": 4, "mlp_dim": 256, "iou_head_dim": 64, "dropout_rate": 0.0},
    }
    config.data = {
        "sources": train,
        "batch_size": 8,
        "max_masks": 6,
        "hflip_rate": 0.5,
        "scale_jitter": (0.5, 2.0),
        "color_jitter": 0.3,
        "min_mask_area_px": 16,
    }
    # Fewer rounds than the paper's eleven: on a CPU more images teach more than more rounds. The
    # paper's 20 pixels are of 1024.
    config.prompts = {
        "num_corrections": 2,
        "random_mask_round": False,
        "final_mask_round": False,
        "box_noise_max_px": 5.0,
    }
    # In a run this short, the paper's weights spend a third of it on predicting nothing at all.
    config.losses = {
        "focal_weight": 5.0,
        "focal_alpha": 0.5,
        "iou_weight": 2.0,
        "all_iou_predictions": True,
    }
    config.optimizer = {
        "peak_learning_rate": 1.5e-3,
        "warmup_steps": 100,
        "schedule": "cosine",
        "layer_decay": 1.0,
        "weight_decay": 0.05,
        "beta2": 0.98,
        "clip_norm": 1.0,
    }
    config.sharding.cpu_devices = 2
    config.train = {"num_steps": 3000, "remat_rounds": False, "log_every": 20}
    config.checkpoint = {"every_steps": 100}
    config.evals = {
        "val": {
            "sources": val,
            "num_clicks": (1, 3, 5),
            "baselines": ("disk", "box_filled", "box_ellipse", "box_grabcut"),
            "max_images": 40,
            "max_masks_per_image": 16,
        }
    }
    return common.complete(config)
