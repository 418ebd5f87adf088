"""Masked autoencoding as He et al. 2022 pre-train, which its three sizes share."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import common

# ImageNet-1K's training images, which the paper pre-trains on; its epochs are of so many.
NUM_IMAGES = 1_281_167
BATCH_SIZE = 4096
STEPS_PER_EPOCH = NUM_IMAGES // BATCH_SIZE


def mae_config(*, variant: str, images: str, fsdp: int) -> ConfigDict:
    """Pre-training of a variant's encoder on images alone.

    Figures are those of appendix A.1, table 8, and of section 4; "code" marks what the published
    command has (PRETRAIN.md of facebookresearch/mae).

    Args:
      variant: which encoder. The published ViT-H has patches of 14 pixels, which are resized to 16
        afterwards; here it has 16 from the start.
      images: TRAIN or TRAIN:VAL, see ``image_sources``.
      fsdp: devices that share one copy of the state.
    """
    train, val = image_sources(images, f"configs/mae_{variant}.py")
    config = common.base_config("reconstruct")
    config.model = {
        "variant": variant,
        "image_size": (224, 224),
        # "automatic mixed precision" in the code, which is float16 there.
        "dtype": "bfloat16",
        "remat": "products",
    }
    config.autoencoder = {
        "mask_rate": 0.75,  # section 4.1
        "normalize_pixels": True,  # code: --norm_pix_loss
        # Table 1 (a) and (b): 8 blocks, 512 wide; 16 heads in the code.
        "decoder_dim": 512,
        "decoder_depth": 8,
        "decoder_heads": 16,
    }
    config.data = {
        "sources": (train,),
        "batch_size": BATCH_SIZE,
        # RandomResizedCrop and flips, no other augmentation; the least area is the code's.
        "crop_area_rates": (0.2, 1.0),
        "hflip_rate": 0.5,
        "num_workers": 8,
    }
    config.optimizer = {
        # Linear rule: 1.5e-4 for each 256 images.
        "peak_learning_rate": 1.5e-4 * BATCH_SIZE / 256,
        "warmup_steps": 40 * STEPS_PER_EPOCH,
        "schedule": "cosine",
        "layer_decay": 1.0,
        "weight_decay": 0.05,
        "beta1": 0.9,
        "beta2": 0.95,
    }
    config.sharding.fsdp = fsdp
    config.train = {
        # Code: 800 epochs in the command, and as good as 1,600 in the paper's figure 7.
        "num_steps": 800 * STEPS_PER_EPOCH,
        "log_every": 50,
        "eval_every": 20 * STEPS_PER_EPOCH if val else 0,
    }
    config.checkpoint = {"every_steps": 1000, "keep": 3, "keep_period": 100 * STEPS_PER_EPOCH}
    config.evals = reconstruction_of(val)
    return common.complete(config)


def image_sources(argument: str, config: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Sources of images to train on and to evaluate on, of a config's argument.

    Args:
      argument: TRAIN or TRAIN:VAL; each a folder (tree) of pictures, a tar of them, or a folder or
        glob of tars. A data set of TensorFlow's is its version folder, with ArrayRecord files.
      config: what takes it, for messages.

    Raises:
      FileNotFoundError: there is none.
    """
    if not argument:
        raise FileNotFoundError(
            f"{config} takes pictures: --config {config}:TRAIN, or {config}:TRAIN:VAL to evaluate "
            "on others; each a folder of pictures, a tar, or a glob of tars"
        )
    train, val = common.split_argument(argument)
    return _source(train, "train"), _source(val, "val") if val else None


def _source(path: str, name: str) -> dict[str, Any]:
    is_prepared = Path(path, "dataset_info.json").is_file()
    return {"kind": "tfds_images" if is_prepared else "images", "path": path, "name": name}


def reconstruction_of(source: dict[str, Any] | None) -> dict[str, Any]:
    """The evaluations on a source of images; none without one."""
    if source is None:
        return {}
    return {"val": {"kind": "reconstruction", "sources": (source,), "max_images": 1024}}
