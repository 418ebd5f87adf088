"""SAM with ViT-H on SA-1B, the paper's recipe: 256 devices of 80 GB and 68 hours in the paper.

python train.py --config configs/sam_vit_h.py:'TARS' --workdir DIR --distributed

TARS is a glob of SA-1B's tars, on a disk or in a bucket: 'gs://bucket/sa_*.tar'. Not run here at
full size: this file states the recipe, tests check that it builds.
"""

from ml_collections import ConfigDict

from configs.sam_recipe import paper_config


def get_config(tars: str = "sa_*.tar") -> ConfigDict:
    """The recipe; see `sam_recipe` for what the sizes share, and for the marks."""
    return paper_config(
        tars=tars,
        variant="vit_h",
        # (P) "Training recipe", the boundaries as well.
        batch_size=256,
        num_steps=90_000,
        peak_learning_rate=8e-4,
        step_boundaries=(60_000, 86_666),
        layer_decay=0.8,
        drop_path_rate=0.4,
        fsdp=16,  # (J) memory, see docs/scaling.md
    )
