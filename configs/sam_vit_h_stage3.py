"""SAM for automatic masks: the model with which the paper's data engine made SA-1B.

python train.py --config configs/sam_vit_h_stage3.py:'TARS' --workdir DIR --distributed

Appendix B of Kirillov et al. 2023 says in what it differs from ViT-H's recipe: a mask decoder of
three layers, prompts of points and masks only, four points for each mask, large-scale jitter,
177,656 iterations, and data of the engine's first two stages, which were not released. The paper
does not say where the learning rate falls: here at the same parts of the run as ViT-H's. Not run at
full size: this file states the recipe, tests check that it builds.
"""

from ml_collections import ConfigDict

from configs.sam_recipe import paper_config

NUM_STEPS = 177_656  # (P) appendix B


def get_config(tars: str = "sa_*.tar") -> ConfigDict:
    """The recipe; see `sam_recipe` for what it shares with the others, and for the marks."""
    config = paper_config(
        tars=tars,
        variant="vit_h",
        # (P) ViT-H's, but for what appendix B changes.
        batch_size=256,
        num_steps=NUM_STEPS,
        peak_learning_rate=8e-4,
        # (J) At the same parts of the run as ViT-H's.
        step_boundaries=(round(NUM_STEPS * 60_000 / 90_000), round(NUM_STEPS * 86_666 / 90_000)),
        layer_decay=0.8,
        drop_path_rate=0.4,
        fsdp=16,
    )
    # (P) Appendix B, all that follows.
    config.model.decoder = {"depth": 3}
    config.prompts.box_rate = 0.0
    # With the first point there are four.
    config.prompts.num_corrections = 3
    # Large-scale jitter is Ghiasi et al.'s 0.1 to 2, which appendix A names.
    config.data.scale_jitter = (0.1, 2.0)
    return config
