"""Fine-tuning all parameters, those of early blocks the more slowly.

python train.py --config configs/finetune_full.py:DATA:WEIGHTS --workdir runs/mine

DATA is a COCO JSON with a folder `images` beside it, a folder with `train.json`, `val.json` and
`images`, or a folder with `images` and `masks` (as configs/small_folder.py reads them); without a
`val` of its own a fifth of the images is held out. WEIGHTS are published SAM, MobileSAM, your own.
docs/finetuning.md has the rest: prompts of one kind, image sizes, what fits where.
"""

from ml_collections import ConfigDict

from configs.finetune_recipe import finetune_config


def get_config(argument: str = "") -> ConfigDict:
    """The recipe for ``DATA:WEIGHTS``."""
    config = finetune_config(
        argument,
        "configs/finetune_full.py",
        trainable=("all",),
        # An eighth of the paper's rate: the weights are to be kept.
        peak_learning_rate=1e-4,
    )
    # Sizes about those that the weights know; kept embeddings could not have it.
    config.data.scale_jitter = (0.75, 1.5)
    return config
