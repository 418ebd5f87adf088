"""Masked autoencoding of SAM's ViT-H encoder: where training of configs/sam_vit_h.py starts from.

python train.py --config configs/mae_vit_h.py:'TRAIN:VAL' --workdir runs/mae_vit_h --distributed
python train.py --config configs/sam_vit_h.py:'TARS' --workdir DIR \
    --config.train.init_from=runs/mae_vit_h

TRAIN and VAL are folders of pictures, tars or globs of tars; VAL may be left out. Not run here at
full size: this file states the recipe, tests check that it builds.
"""

from ml_collections import ConfigDict

from configs.mae_recipe import mae_config


def get_config(images: str = "train:val") -> ConfigDict:
    """The recipe; see `mae_recipe.mae_config` for what the sizes share."""
    return mae_config(variant="vit_h", images=images, fsdp=8)
