"""A small model from scratch on COCO-layout data sets: about an hour on two CPU cores.

python train.py --config configs/small_coco.py:FOLDER --workdir runs/small_coco

FOLDER holds one folder per data set, each with `train.json`, `val.json` and `images/`.
"""

from ml_collections import ConfigDict

from configs.small_recipe import small_config
from sam_jax.buckets import data_path


def get_config(folder: str = "") -> ConfigDict:
    """The recipe for the data sets in a folder."""
    train, val = (sources(folder, split, "configs/small_coco.py") for split in ("train", "val"))
    return small_config(train, val)


def sources(folder: str, split: str, config: str) -> tuple[dict, ...]:
    """Sources of a split of all data sets in a folder, for a config of this name."""
    root = data_path(folder)
    if not (folder and root.is_dir()):
        raise FileNotFoundError(
            f"{config} takes the folder of the data sets: --config {config}:FOLDER; found "
            f"{folder!r}, which is no folder"
        )
    found = sorted(path.parent for path in root.glob(f"*/{split}.json"))
    if not found:
        raise FileNotFoundError(f"no */{split}.json in {folder}")
    return tuple(
        {
            "kind": "coco",
            "name": dataset.name,
            "path": str(dataset / f"{split}.json"),
            "images": str(dataset / "images"),
        }
        for dataset in found
    )
