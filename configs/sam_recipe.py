"""The paper's recipe, which its three sizes share.

Each figure of configs/sam_*.py has its source: (P) Kirillov et al. 2023, appendix A under the
heading that is named; (OC) official code, that of SAM 2's training, where the paper is silent; (J)
decided here, with the reason.
"""

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
    # Sizes and the decoder's dropout of 0.1 (P, "Lightweight mask decoder", "Training recipe") are
    # the variant's.
    config.model = {
        "variant": variant,
        "drop_path_rate": drop_path_rate,
        # (OC) The paper is silent. Of products; logits and losses are float32.
        "dtype": "bfloat16",
        # (J) Fits a v5e with an image of its own, even ViT-H; "blocks" takes half of the memory.
        "remat": "products",
    }
    config.data = {
        "sources": ({"kind": "sa1b", "path": tars},),
        "batch_size": batch_size,
        # (P) "Training recipe": up to 64 random masks for each GPU, which has one image.
        "max_masks": 64,
        "max_area_rate": 0.9,  # (P) there: larger masks are dropped
        # (P) there: no augmentation for SA-1B. SAM 2's code flips.
        "hflip_rate": 0.0,
        "scale_jitter": None,
        "color_jitter": 0.0,
        "num_workers": 8,  # (J) decoding, see docs/scaling.md
    }
    # (P) "Training algorithm", all of it. How noise is cut off at 20 pixels is not said: the
    # deviate is clipped (J).
    config.prompts = {
        "box_rate": 0.5,
        "box_noise_rate": 0.1,
        "box_noise_max_px": 20.0,
        "num_corrections": 8,
        "random_mask_round": True,
        "final_mask_round": True,
    }
    config.losses = {
        # (P) "Losses".
        "focal_weight": 20.0,
        "dice_weight": 1.0,
        "iou_weight": 1.0,
        # (OC) The paper is silent; these are the focal loss's own authors' as well.
        "focal_alpha": 0.25,
        "focal_gamma": 2.0,
        # (OC) Silent. SA-1B has masks of 100 pixels of 1500, one or two of the logits'.
        "resolution": "image",
        # (OC) Silent: the sum. It matters to clipping alone.
        "over_rounds": "sum",
        # (J) Silent, and SAM 2 lets gradients pass. Eleven shallow graphs are cheaper than one.
        "feedback_gradient": False,
        # (P) backpropagates the candidate of the lowest loss alone; whether its IoU alone, it does
        # not say. (OC) The code's default, "consistent with SAM".
        "all_iou_predictions": False,
        "prompts_per_chunk": 8,  # (J) memory, the same numbers
    }
    config.optimizer = {
        # (P) "Training recipe", but for what is marked.
        "peak_learning_rate": peak_learning_rate,
        "warmup_steps": 250,
        "schedule": "step",
        "step_boundaries": step_boundaries,
        "step_rate": 0.1,
        "layer_decay": layer_decay,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.999,
        # (J) The paper mentions no clipping, and SAM 2's 0.1 goes with its own rates.
        "clip_norm": None,
    }
    config.sharding.fsdp = fsdp  # (J) as little as leaves room for an image on 16 GB
    # (P) num_steps. (J) No average of parameters, which the paper does not mention.
    config.train = {"num_steps": num_steps, "ema_decay": 0.0, "log_every": 50, "eval_every": 0}
    # (J) At most 1,000 steps are lost.
    config.checkpoint = {"every_steps": 1000, "keep": 3, "keep_period": 30_000}
    return common.complete(config)
