"""Fine-tuning trained weights on a data set of one's own, whatever is trained of them.

No publication has figures for that: each is decided here, and tried as docs/finetuning.md says.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from configs import common, mobile_sam
from sam_jax.buckets import DataPath, data_path
from sam_jax.errors import ConfigError
from sam_jax.model_config import model_config_of
from sam_jax.models.tiny_vit import TinyViTConfig
from sam_jax.weights.load import shape_of

# Of data that come without a split, what is trained on; the rest is evaluated on.
_TRAIN_SHARE = 0.8
_FORMS = (
    "a COCO JSON with a folder images beside it; a folder with train.json, perhaps val.json, and "
    "images; a folder with images and masks; or a folder with such folders, train and perhaps val"
)


def finetune_config(
    argument: str, config_file: str, *, trainable: tuple[str, ...], peak_learning_rate: float
) -> ConfigDict:
    """What all fine-tuning shares: data, weights, prompts, schedule, the best model by validation.

    Args:
      argument: ``DATA:WEIGHTS``.
      config_file: of the recipe, for messages.
      trainable: see ``train.trainable``.
      peak_learning_rate: after warm-up.
    """
    data, weights = common.split_argument(argument)
    if not data or not weights:
        raise ConfigError(
            f"{config_file} takes data and weights: --config {config_file}:DATA:WEIGHTS. DATA is "
            f"{_FORMS}. WEIGHTS is what sam-jax inspect takes; found {argument!r}"
        )
    train, val = split_of(data)
    shape = shape_of(weights)
    config = common.base_config()
    config.model = dataclasses.asdict(model_config_of(shape))
    # Dropped units and paths cost more steps than a run of some hundred has.
    config.model.decoder.dropout_rate = 0.0
    config.model.drop_path_rate = 0.0
    if not isinstance(shape.image_encoder, TinyViTConfig):
        config.model.encoder.drop_path_rate = 0.0
    config.data = {
        "sources": (train,),
        # Small enough for one GPU, or a CPU.
        "batch_size": 4,
        "max_masks": 8,
        # Two views of each image, which kept embeddings can have.
        "hflip_rate": 0.5,
        # One logit's 4 x 4 pixels; smaller masks have nothing to be learned from.
        "min_mask_area_px": 16,
    }
    # Few rounds: the weights know what a correction is, and each round costs as much as the first.
    config.prompts = {
        "num_corrections": 2,
        "random_mask_round": False,
        "final_mask_round": False,
        # The paper's 20 pixels are of 1024.
        "box_noise_max_px": 20.0 * max(shape.image_encoder.image_size) / 1024,
    }
    config.optimizer = {
        "peak_learning_rate": peak_learning_rate,
        "warmup_steps": 20,  # a twenty-fifth of the run
        # Ends at nothing, however many steps are asked for.
        "schedule": "cosine",
        # The paper's of ViT-H and ViT-L, wherever the encoder is trained.
        "layer_decay": 0.8,
        "weight_decay": 0.05,  # He et al. 2022 fine-tune with it (table 9)
        # Gradients of four images differ more than those of 256.
        "clip_norm": 1.0,
    }
    is_tiny = isinstance(shape.image_encoder, TinyViTConfig)
    config.sharding.rules = mobile_sam.SHARDING_RULES if is_tiny else common.SHARDING_RULES
    config.sharding.cpu_devices = 2
    config.train = {
        # 40 epochs of 50 images; `patience` ends a run that gains nothing sooner.
        "num_steps": 500,
        "init_from": weights,
        "trainable": trainable,
        "remat_rounds": False,
        "log_every": 10,
        "eval_every": 50,
        # Weights that are better before than after are worth knowing about, and kept.
        "eval_before": True,
        # One click is what fine-tuning changes the most; see docs/finetuning.md for other prompts.
        "watch": "val/mean/center_1",
        "patience": 4,
    }
    config.checkpoint = {"every_steps": 50}
    config.evals = {
        "val": {
            "sources": (val,),
            "protocols": ("center", "box"),
            "num_clicks": (1, 3),
            # Some are drawn: an evaluation is to be short beside the steps before it.
            "max_images": 40,
            "max_masks_per_image": 16,
        }
    }
    return common.complete(config)


def split_of(data: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sources to train on and to evaluate on, of data in any of four forms.

    Where there is nothing to evaluate on, a fifth of the images is held out.

    Raises:
      ConfigError: if there is nothing of these forms.
    """
    path = data_path(data)
    if (path / "train.json").is_file():
        path = path / "train.json"
    if path.is_file() and path.suffix == ".json":
        val = path.with_name("val.json")
        has_val = path.name == "train.json" and val.is_file()
        return _split(_coco(path), _coco(val) if has_val else None)
    if (path / "train" / "images").is_dir():
        has_val = (path / "val" / "images").is_dir()
        return _split(_masks(path / "train"), _masks(path / "val") if has_val else None)
    if (path / "images").is_dir() and (path / "masks").is_dir():
        return _split(_masks(path), None)
    raise ConfigError(f"{data} is no data to train on: expected {_FORMS}")


def _coco(path: DataPath) -> dict[str, Any]:
    images = path.parent / "images"
    return {
        "kind": "coco",
        "path": str(path),
        "images": str(images if images.is_dir() else path.parent),
    }


def _masks(folder: DataPath) -> dict[str, Any]:
    return {
        "kind": "mask_folder",
        "path": str(folder / "images"),
        "masks": str(folder / "masks"),
    }


def _split(
    train: dict[str, Any], val: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    if val is None:
        train, val = (
            train | {"share": (0.0, _TRAIN_SHARE)},
            train | {"share": (_TRAIN_SHARE, 1.0)},
        )
    return train | {"name": "train"}, val | {"name": "val"}
