"""Configs of the evaluations of boxes and proposals: what they ask for, and that it fits."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from sam_jax.configuration import from_mapping
from sam_jax.evaluation.detection.instances import InstancesConfig
from sam_jax.evaluation.detection.proposals import ProposalsConfig

CLASSES: dict[str, Any] = {"instances": InstancesConfig, "proposals": ProposalsConfig}


def built(name: str, argument: str) -> dict[str, Any]:
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    sections = config.to_dict()["evals"]
    found = {}
    for key, section in sections.items():
        kind = section.pop("kind")
        found[key] = from_mapping(CLASSES[kind], section, f"evals.{key}")
    return found


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    path = tmp_path / "val.json"
    path.write_text(json.dumps({"images": [{"neg_category_ids": []}]}))
    return path


def test_instances(truth: Path) -> None:
    found = built("eval_instances", str(truth.parent))
    assert {key: config.boxes for key, config in found.items()} == {
        "truth": "truth",
        "jittered": "jittered",
    }
    assert all(c.rules == "lvis" and c.truth == str(truth) and c.refine for c in found.values())
    assert found["truth"].images == str(truth.parent / "images")
    truth.write_text("{}")
    (config,) = built("eval_instances", f"{truth},boxes.json").values()
    assert (config.boxes, config.rules) == ("boxes.json", "coco")


def test_proposals(truth: Path) -> None:
    (config,) = built("eval_proposals", str(truth)).values()
    assert config == ProposalsConfig(str(truth), str(truth.parent / "images"))
    options = config.automatic_options()
    assert (options.points_per_side, options.box_nms_thresh) == (64, 0.9)
    assert (options.pred_iou_thresh, options.stability_score_thresh) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["eval_instances", "eval_proposals"])
def test_files_that_are_not_there(name: str, tmp_path: Path) -> None:
    get_config = importlib.import_module(f"configs.{name}").get_config
    for argument in ("", str(tmp_path), "nowhere.json"):
        with pytest.raises(FileNotFoundError, match=rf"configs/{name}\.py takes a JSON"):
            get_config(argument)
