"""A small model from scratch on images with mask PNGs: about an hour on two CPU cores.

python train.py --config configs/small_folder.py:FOLDER --workdir runs/mine

FOLDER holds `train/images`, `train/masks`, `val/images` and `val/masks`. The masks of `cat.jpg` are
`cat.png` (every colour but black is one object), or one file for each: `cat_*.png` or `cat/*.png`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs.small_recipe import small_config


def get_config(folder: str = "") -> ConfigDict:
    """The recipe for the masks in a folder."""
    if not (folder and Path(folder).is_dir()):
        raise FileNotFoundError(
            f"configs/small_folder.py takes the folder of the images and masks: --config "
            f"configs/small_folder.py:FOLDER; found {folder!r}, which is no folder"
        )

    def sources(split: str) -> tuple[dict, ...]:
        images, masks = f"{folder}/{split}/images", f"{folder}/{split}/masks"
        return ({"kind": "mask_folder", "name": split, "path": images, "masks": masks},)

    return small_config(sources("train"), sources("val"))
