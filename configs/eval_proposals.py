"""Object proposals: section 7.3 of the paper, mask AR@1000 on LVIS or any COCO file.

python eval.py --config configs/eval_proposals.py:TRUTH.json --checkpoint WEIGHTS [--out OUT]

TRUTH.json has the pictures in `images` beside it; a folder stands for the `val.json` in it. An
image takes 4,096 points and 12,288 masks: `--config.evals.proposals.max_images=10` draws some. The
paper's ablation of a single output:

    --config.evals.proposals.multimask_output=False --config.evals.proposals.points_per_side=128
    --config.evals.proposals.box_nms_thresh=0.95 --config.evals.proposals.ranking=random
"""

from ml_collections import ConfigDict

from configs.common import eval_section
from configs.eval_instances import truth_file
from sam_jax.evaluation.detection.proposals import ProposalsConfig


def get_config(argument: str = "") -> ConfigDict:
    """The evaluation of proposals on a file."""
    truth = truth_file(argument, "configs/eval_proposals.py")
    options = {"truth": str(truth), "images": str(truth.parent / "images")}
    section = eval_section("proposals", ProposalsConfig, **options)
    return ConfigDict({"evals": {"proposals": section}})
