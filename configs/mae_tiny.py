"""Masked autoencoding of the small model's encoder: minutes on two CPU cores.

python train.py --config configs/mae_tiny.py:TRAIN:VAL --workdir runs/mae_tiny
python train.py --config configs/small_coco.py:FOLDER --workdir runs/small_coco \
    --config.train.init_from=runs/mae_tiny

TRAIN and VAL are folders of pictures, tars or globs of tars; VAL may be left out.
"""

from ml_collections import ConfigDict

from configs import common
from configs.mae_recipe import image_sources, reconstruction_of
from configs.small_recipe import ENCODER


def get_config(images: str = "") -> ConfigDict:
    """The recipe on folders, tars or globs of pictures."""
    train, val = image_sources(images, "configs/mae_tiny.py")
    return tiny_config((train,), reconstruction_of(val))


def tiny_config(sources: tuple[dict, ...], evals: dict[str, dict]) -> ConfigDict:
    """The recipe on any sources.

    Args:
      sources: to train on; masks that they have are not looked at.
      evals: see ``reconstruction_of``.
    """
    config = common.base_config("reconstruct")
    # At half of the size at which it is to segment, as the paper's 224 pixels are few beside 1024.
    config.model = {"variant": "vit_ti", "image_size": (128, 128), "encoder": ENCODER}
    config.autoencoder = {"decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4}
    config.data = {
        "sources": sources,
        "batch_size": 64,
        "crop_area_rates": (0.2, 1.0),
        "hflip_rate": 0.5,
    }
    # The paper's rate is for 4096 images, and a small model bears more.
    config.optimizer = {
        "peak_learning_rate": 2e-3,
        "warmup_steps": 100,
        "schedule": "cosine",
        "layer_decay": 1.0,
        "weight_decay": 0.05,
        "beta2": 0.95,
    }
    config.sharding.cpu_devices = 2
    config.train = {"num_steps": 2000, "log_every": 50, "eval_every": 500}
    config.checkpoint = {"every_steps": 500}
    config.evals = evals
    return common.complete(config)
