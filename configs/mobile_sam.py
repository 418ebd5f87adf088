"""Fine-tuning MobileSAM on COCO-layout data sets, from its published weights.

python train.py --config configs/mobile_sam.py:FOLDER --config.train.init_from=mobile_sam.pt \
  --workdir runs/mobile_sam

FOLDER holds one folder per data set, each with `train.json`, `val.json` and `images/`. On a CPU,
--config.model.image_size='(512, 512)' takes a quarter of the time.

No publication has figures for that: each is decided here.
"""

from ml_collections import ConfigDict

from configs import common, small_coco

# Ten million parameters: whole on every device.
SHARDING_RULES = ((r"image_encoder/", ()), (r"mask_decoder/.*/kernel$", ()))


def get_config(folder: str = "") -> ConfigDict:
    """The recipe for the data sets in a folder."""
    config = common.base_config()
    config.model.variant = "mobile_sam"
    # The weights were made without, and the published code has none.
    config.model.decoder = {"dropout_rate": 0.0}
    config.data = {
        "sources": small_coco.sources(folder, "train", "configs/mobile_sam.py"),
        # Small enough for one GPU, or a CPU.
        "batch_size": 4,
        "max_masks": 8,
        # Few images, unlike SA-1B: flips, and sizes about those that the weights know.
        "hflip_rate": 0.5,
        "scale_jitter": (0.75, 1.5),
        # One logit's 4 x 4 pixels; smaller masks have nothing to be learned from.
        "min_mask_area_px": 16,
    }
    # Few rounds: the weights know what a correction is, and each round costs as much as the first.
    config.prompts = {"num_corrections": 2, "random_mask_round": False, "final_mask_round": False}
    config.optimizer = {
        # An eighth of the paper's rate, as weights are to be kept; its layer decay.
        "peak_learning_rate": 1e-4,
        "warmup_steps": 50,  # a twentieth of the run
        # Ends at nothing, however many steps are asked for.
        "schedule": "cosine",
        "layer_decay": 0.8,
        "weight_decay": 0.05,  # He et al. 2022 fine-tune with it (table 9)
        # Gradients of four images differ more than those of 256.
        "clip_norm": 1.0,
    }
    config.sharding.rules = SHARDING_RULES
    config.sharding.cpu_devices = 2
    # For some hundred images; more of them bear more steps.
    config.train = {"num_steps": 1000, "remat_rounds": False, "log_every": 10}
    config.checkpoint = {"every_steps": 100}
    config.evals = {
        "val": {
            "sources": small_coco.sources(folder, "val", "configs/mobile_sam.py"),
            "num_clicks": (1, 3, 5),
            # Some are drawn: an evaluation is to be short beside the steps before it.
            "max_images": 40,
            "max_masks_per_image": 16,
        }
    }
    return common.complete(config)
