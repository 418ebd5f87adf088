"""Masks from clicks on the paper's 23 data sets, or on sets of your own: section 7.1 of the paper.

python eval.py --config configs/eval_clicks.py:FOLDER --checkpoint WEIGHTS [--out OUT]

FOLDER holds the paper's sets, each in a folder of its name: `sam-jax datasets` lists them, `sam-jax
datasets NAME` says how one must lie. Those that are not there are named at the start.
`FOLDER:LVIS,DRAM` takes these two alone. Where none of the 23 is there, FOLDER holds sets of your
own, each with `val.json`, COCO's form, and `images/`.

Of a set with more than 15,000 masks images are drawn until they have 10,000, by the seed 0;
`--config.evals.clicks.seed=1` draws others, `--config.evals.clicks.target_masks=1000` fewer. Faces
are not blurred, as the paper's were.
"""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from configs import common, small_coco
from sam_jax.buckets import data_path
from sam_jax.errors import ConfigError
from sam_jax.evaluation.zero_shot_sets import NAMES, sets_in

_log = logging.getLogger(__name__)


def get_config(argument: str = "") -> ConfigDict:
    """The paper's experiment on the sets of a folder, given as FOLDER or FOLDER:NAME,NAME."""
    folder, names = common.split_argument(argument)
    if not (folder and data_path(folder).is_dir()):
        raise FileNotFoundError(
            "configs/eval_clicks.py takes the folder of the data sets: --config "
            f"configs/eval_clicks.py:FOLDER; found {folder!r}, which is no folder"
        )
    wanted = tuple(name.strip() for name in names.split(",") if name.strip())
    is_papers = any(Path(folder, name).is_dir() for name in NAMES)
    return common.only_evals(
        {
            "clicks": {
                "kind": "prompts",
                "sources": _papers(folder, wanted) if is_papers else _own(folder, wanted),
                "protocols": ("center", "random"),
                "num_clicks": (1, 2, 3, 5, 9),
                "target_masks": 10_000,
                "images_per_call": 4,
                "prompts_per_call": 16,
            }
        }
    )


def _papers(folder: str, wanted: tuple[str, ...]) -> tuple[dict, ...]:
    """Sources of the paper's sets that are there; says which are not."""
    found, missing = sets_in(folder, wanted)
    if missing:
        _log.warning(
            "%s: %d of %d data sets are missing, and no part of the mean: %s",
            *(folder, len(missing), len(found) + len(missing)),
            ", ".join(one.name for one in missing),
        )
    if not found:
        raise ConfigError(f"{folder} has none of {', '.join(one.name for one in missing)}")
    others = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    if others := [name for name in others if name not in NAMES and not name.startswith(".")]:
        _log.warning(
            "%s: %d other folders are none of the paper's 23 data sets, and not evaluated on: %s",
            *(folder, len(others), ", ".join(others)),
        )
    return tuple(one.source(Path(folder, one.name)) for one in found)


def _own(folder: str, wanted: tuple[str, ...]) -> tuple[dict, ...]:
    """Sources of all sets in COCO's layout, or of those that are wanted."""
    found = small_coco.sources(folder, "val", "configs/eval_clicks.py")
    unknown = sorted(set(wanted) - {source["name"] for source in found})
    if unknown:
        raise ConfigError(
            f"{folder} has no data set {', '.join(unknown)}; there are "
            f"{', '.join(source['name'] for source in found)}"
        )
    return tuple(source for source in found if not wanted or source["name"] in wanted)
