"""SAM with ViT-L on SA-1B, the paper's recipe: 128 devices of 80 GB in the paper.

python train.py --config configs/sam_vit_l.py:'TARS' --workdir DIR --distributed

TARS is a glob of SA-1B's tars, on a disk or in a bucket: 'gs://bucket/sa_*.tar'. Where the rate
falls is said for ViT-H alone; here it does at the same parts of the run. Not run here at full size:
this file states the recipe, tests check that it builds.
"""

from ml_collections import ConfigDict

from configs.sam_recipe import paper_config


def get_config(tars: str = "sa_*.tar") -> ConfigDict:
    """The recipe; see `sam_recipe` for what the sizes share, and for the marks."""
    return paper_config(
        tars=tars,
        variant="vit_l",
        # (P) "Training recipe".
        batch_size=128,
        num_steps=180_000,
        peak_learning_rate=4e-4,
        # (J) ViT-H's 60,000 and 86,666 of 90,000, in as many parts of the run.
        step_boundaries=(120_000, 173_332),
        layer_decay=0.8,
        drop_path_rate=0.4,
        fsdp=8,  # (J) memory, see docs/scaling.md
    )
