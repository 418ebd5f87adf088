"""The paper's recipe, which its three sizes share."""

from ml_collections import ConfigDict

from configs import common


def paper_config(
    *,
    variant: str,
    tars: str,
    batch_size: int,
    num_steps: int,
    peak_learning_rate: float,
    step_boundaries: tuple[int, int],
    layer_decay: float,
    drop_path_rate: float,
    fsdp: int,
) -> ConfigDict:
    """Training on SA-1B as in appendix A of Kirillov et al. 2023.

    Args:
      variant: which model.
      tars: SA-1B as released, a glob of its tars.
      batch_size: images per step.
      num_steps: optimizer steps.
      peak_learning_rate: after warm-up.
      step_boundaries: steps at which the rate falls to a tenth.
      layer_decay: of the learning rate, from block to block.
      drop_path_rate: of the last block.
      fsdp: devices that share one copy of the state.
    """
    config = common.base_config()
    config.model = {
        "variant": variant,
        "drop_path_rate": drop_path_rate,
        "dtype": "bfloat16",
        # Fits a v5e with an image of its own, even ViT-H; "blocks" takes half of the memory.
        "remat": "products",
    }
    config.data = {
        "sources": ({"kind": "sa1b", "path": tars},),
        "batch_size": batch_size,
        "max_masks": 64,
        "max_area_rate": 0.9,
        "num_workers": 8,
    }
    config.prompts = {
        "box_rate": 0.5,
        "box_noise_rate": 0.1,
        "box_noise_max_px": 20.0,
        "num_corrections": 8,
        "random_mask_round": True,
        "final_mask_round": True,
    }
    config.losses = {
        "focal_weight": 20.0,
        "dice_weight": 1.0,
        "iou_weight": 1.0,
        "prompts_per_chunk": 8,
    }
    config.optimizer = {
        "peak_learning_rate": peak_learning_rate,
        "warmup_steps": 250,
        "schedule": "step",
        "step_boundaries": step_boundaries,
        "step_rate": 0.1,
        "layer_decay": layer_decay,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.999,
    }
    config.sharding.fsdp = fsdp
    config.train = {"num_steps": num_steps, "log_every": 50, "eval_every": 0}
    config.checkpoint = {"every_steps": 1000, "keep": 3, "keep_period": 30_000}
    return common.complete(config)
