"""Fine-tuning the mask decoder alone, on image embeddings that are computed once.

python train.py --config configs/finetune_decoder.py:DATA:WEIGHTS --workdir runs/mine

DATA is a COCO JSON with a folder `images` beside it, a folder with `train.json`, `val.json` and
`images`, or a folder with `images` and `masks` (as configs/small_folder.py reads them); without a
`val` of its own a fifth of the images is held out. WEIGHTS are published SAM, MobileSAM, your own.
docs/finetuning.md has the rest: prompts of one kind, image sizes, what fits where.

Embeddings are kept in runs/embeddings, 2 MiB for each view of an image at 1024 x 1024, and used
again by all runs from the same weights.
"""

from ml_collections import ConfigDict

from configs.finetune_recipe import finetune_config


def get_config(argument: str = "") -> ConfigDict:
    """The recipe for ``DATA:WEIGHTS``."""
    config = finetune_config(
        argument,
        "configs/finetune_decoder.py",
        trainable=("decoder",),
        # An eighth of the paper's rate: the weights are to be kept.
        peak_learning_rate=1e-4,
    )
    config.train.embedding_cache = "runs/embeddings"
    return config
