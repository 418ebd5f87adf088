"""Masks from boxes, scored as a detector's would be: sections 7.4 and D.4 of the paper.

python eval.py --config configs/eval_instances.py:TRUTH.json --checkpoint WEIGHTS [--out OUT]

TRUTH.json has COCO's or LVIS's form, with the pictures in `images` beside it; a folder stands for
the `val.json` in it. By default boxes are the truth's own, and these with noise. Boxes of a
detector, as COCO's results or as Hugging Face's pipelines answer, are scored in their place by

python eval.py --config configs/eval_instances.py:TRUTH.json,BOXES.json --checkpoint WEIGHTS

Pictures elsewhere: `--config.evals.detector.images=FOLDER`. The paper asks twice, the second time
with the first mask; harnesses of other models do not: `--config.evals.detector.refine=False`. The
paper's boxes for LVIS are those of a score above 0.02: `--config.evals.detector.min_score=0.02`.
"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from configs.common import eval_section
from sam_jax.evaluation.detection.instances import InstancesConfig


def get_config(argument: str = "") -> ConfigDict:
    """Evaluations of a truth's own boxes and noisy ones, or of a detector's."""
    name, _, boxes = argument.partition(",")
    truth = truth_file(name, "configs/eval_instances.py")
    images = truth.parent / "images"
    options = {"truth": str(truth), "images": str(images), "rules": rules_of(truth)}
    kinds = {"detector": boxes} if boxes else {"truth": "truth", "jittered": "jittered"}
    return ConfigDict(
        {
            "evals": {
                kind: eval_section("instances", InstancesConfig, **options, boxes=source)
                for kind, source in kinds.items()
            }
        }
    )


def truth_file(name: str, config: str) -> Path:
    """The JSON that a config of this name is given, or the `val.json` in a folder."""
    path = Path(name)
    if name and path.is_dir():
        path = path / "val.json"
    if not (name and path.is_file()):
        raise FileNotFoundError(
            f"{config} takes a JSON of COCO's or LVIS's form: --config {config}:TRUTH.json; found "
            f"{name!r}, which is none"
        )
    return path


def rules_of(truth: Path) -> str:
    """LVIS's rules for a file with its lists of categories, else COCO's."""
    images = json.loads(truth.read_bytes()).get("images", [])
    return "lvis" if any("neg_category_ids" in image for image in images) else "coco"
