"""Fine-tuning the mask decoder, and low-rank adapters of the encoder's attention.

python train.py --config configs/finetune_lora.py:DATA:WEIGHTS --workdir runs/mine
sam-jax convert runs/mine/best adapters.safetensors --only-adapters
sam-jax convert WEIGHTS mine.safetensors --with-adapters adapters.safetensors

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
        "configs/finetune_lora.py",
        trainable=("lora", "decoder"),
        # Twice that of the others, as adapters start from nothing.
        peak_learning_rate=2e-4,
    )
    # Small ranks do for attention: Hu et al. 2021, section 7.2.
    config.lora.rank = 8
    # Adapters of all blocks start from no change: the first has no more to lose than the last.
    config.optimizer.layer_decay = 1.0
    # Sizes about those that the weights know; kept embeddings could not have it.
    config.data.scale_jitter = (0.75, 1.5)
    return config
