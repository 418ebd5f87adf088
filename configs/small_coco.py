"""A small model from scratch on COCO-layout data sets: about an hour on two CPU cores.

python train.py --config configs/small_coco.py:FOLDER --workdir runs/small_coco

FOLDER holds one folder per data set, each with `train.json`, `val.json` and `images/`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs.small_recipe import small_config


def get_config(folder: str = "") -> ConfigDict:
    """The recipe for the data sets in a folder."""
    if not (folder and Path(folder).is_dir()):
        raise FileNotFoundError(
            f"configs/small_coco.py takes the folder of the data sets: --config "
            f"configs/small_coco.py:FOLDER; found {folder!r}, which is no folder"
        )

    def sources(split: str) -> tuple[dict, ...]:
        found = sorted(path.parent for path in Path(folder).glob(f"*/{split}.json"))
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

    return small_config(sources("train"), sources("val"))
