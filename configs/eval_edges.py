"""Zero-shot edge detection on BSDS500, section 7.2 of the paper: 20 s an image on a CPU.

python eval.py --config configs/eval_edges.py:FOLDER --checkpoint CHECKPOINT

FOLDER holds `images` and `groundTruth`. Of BSDS500 as it comes it is `BSDS500/data`, with
`--config.evals.edges.split=test`. `--config.evals.edges.maps=FOLDER` keeps every edge map.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import common


def get_config(folder: str = "") -> ConfigDict:
    """The paper's experiment on the images of a folder."""
    if not (folder and Path(folder).is_dir()):
        raise FileNotFoundError(
            "configs/eval_edges.py takes the folder of images and annotations: --config "
            f"configs/eval_edges.py:FOLDER; found {folder!r}, which is no folder"
        )
    return common.only_evals({"edges": {"kind": "edges", "path": folder}})
