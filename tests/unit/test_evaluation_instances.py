"""Instances from boxes and proposals, end to end on made-up pictures and a tiny model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam_jax.data.corruption import NoObjectsError
from sam_jax.errors import ConfigError
from sam_jax.evaluation.detection import instances, proposals
from sam_jax.evaluation.detection.instances import InstancesConfig, InstancesFromBoxes
from sam_jax.evaluation.detection.proposals import ObjectProposals, ProposalsConfig
from sam_jax.evaluation.evaluation import Evaluation, Report
from sam_jax.inference.predictor import Predictor
from sam_jax.models.sam import Sam
from tests.golden.tiny import SHALLOW, random_variables
from tests.unit.scenes import CATEGORIES, SIDE, annotations, quiet

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCENES = [
    {
        "id": 3,
        "truths": [(2, (0, 0, 60, 96), False), (9, (40, 40, 32, 7), False)],
        "negative": [5],
        "not_exhaustive": [9],
    },
    {"id": 1, "truths": [], "negative": [], "not_exhaustive": []},
    {
        "id": 2,
        "truths": [(5, (4, 8, 97, 60), False), (5, (8, 0, 7, 7), False), (2, (9, 9, 33, 33), True)],
        "negative": [],
        "not_exhaustive": [],
    },
    {"id": 7, "truths": [(2, (0, 0, 33, 33), False)], "negative": [], "not_exhaustive": []},
]


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """COCO's form; the picture of image 7 is damaged."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for scene in SCENES:
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{scene['id']}.png")
    (tmp_path / "images" / "7.png").write_bytes(b"nothing")
    return written(tmp_path, federated=False)


def written(folder: Path, *, federated: bool) -> Path:
    content = annotations(SCENES)
    for image in content["images"]:
        if not federated:
            del image["neg_category_ids"], image["not_exhaustive_category_ids"]
    path = folder / ("lvis.json" if federated else "val.json")
    path.write_text(json.dumps(content))
    return path


def predictor_for(evaluation: Evaluation) -> Predictor:
    return Predictor(Sam(SHALLOW), random_variables(SHALLOW), evaluation.buckets(1))


def evaluated(evaluation: Evaluation) -> tuple[list[dict[str, Any]], Report]:
    predictor = predictor_for(evaluation)
    records = list(evaluation.records(predictor, range(len(evaluation))))
    # Records are kept as JSON.
    records = json.loads(json.dumps(records, allow_nan=False))
    return records, evaluation.report(records, 1.0)


def test_boxes_of_the_truth(truth: Path, tmp_path: Path, capsys: Any) -> None:
    results = tmp_path / "results.json"
    config = InstancesConfig(str(truth), boxes_per_call=2, results=str(results))
    evaluation = InstancesFromBoxes(config)
    records, report = evaluated(evaluation)
    assert [record["image_id"] for record in records] == [1, 2, 3, 7]
    assert [len(record.get("counts", [])) for record in records] == [0, 2, 2, 0]
    assert records[3]["skipped"][0] == "unreadable image"
    content = report.as_json()
    assert content["counts"] == {"images": 3, "boxes": 4, "objects": 4}
    assert content["left_out"] == {"images skipped (unreadable image)": 1}
    report.print_table()
    assert "Mask AP (%), COCO's rules, prompt: box and mask" in capsys.readouterr().out
    assert report.pictures["examples"].ndim == 3

    # pycocotools gives the same from the file of results, of the images that could be used.
    with quiet():
        coco = COCO(truth)
        theirs = COCOeval(coco, coco.loadRes(str(results)), "segm")
        theirs.params.imgIds = [1, 2, 3]
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    flat = report.as_flat_dict()
    for name, stat in zip(("AP", "AP50", "AP75", "AP_small"), theirs.stats, strict=False):
        assert flat[name] == pytest.approx(stat, abs=1e-12)
    assert flat["AR"] == pytest.approx(theirs.stats[8], abs=1e-12)
    # The mean IoU is that of each box's mask and the object that the box is of.
    ious = []
    masks = {a["id"]: coco.annToRLE(a) for a in coco.anns.values() if not a["iscrowd"]}
    by_image = {
        (a["image_id"], a["category_id"], i)
        for i, a in coco.anns.items()
        if i in masks and a["image_id"] != 7
    }
    found = json.loads(results.read_text())
    for image, category, number in sorted(by_image):
        mask = next(r for r in found if (r["image_id"], r["category_id"]) == (image, category))
        found.remove(mask)
        ious.append(coco_mask.iou([mask["segmentation"]], [masks[number]], [0])[0, 0])
    assert flat["mIoU"] == pytest.approx(np.mean(ious))


def test_figures_follow_from_records_and_settings_alone(truth: Path) -> None:
    evaluation = InstancesFromBoxes(InstancesConfig(str(truth), boxes="jittered"))
    records, report = evaluated(evaluation)
    settings = json.loads(json.dumps(evaluation.settings))
    weighted = instances.measures(records, settings)
    assert weighted(np.ones(4)) == {**weighted(np.ones(4)), **report.as_flat_dict()}
    without = weighted(np.array([0.0, 0.0, 1.0, 1.0]))
    assert without["mIoU"] == pytest.approx(np.mean(records[2]["own_ious"]))
    # Noise is the same for a box, whatever else is evaluated; and another one with another seed.
    (alone,) = evaluation.records(predictor_for(evaluation), [2])
    assert alone["own_ious"] == records[2]["own_ious"]
    other = InstancesFromBoxes(InstancesConfig(str(truth), boxes="jittered", seed=1))
    (record,) = other.records(predictor_for(other), [2])
    assert record["own_ious"] != records[2]["own_ious"]


def test_boxes_of_a_detector(truth: Path, tmp_path: Path) -> None:
    boxes = tmp_path / "boxes.json"
    found = [
        {"image_id": image, "bbox": [2, 2, 40, 50], "score": score, "category_id": category}
        for image, score, category in (
            (3, 0.5, 2),
            (3, 0.7, 9),
            (2, 0.7, 5),
            (2, 0.1, 5),
            (2, 0.7, 77),
            (99, 0.7, 5),
        )
    ]
    boxes.write_text(json.dumps(found))
    config = InstancesConfig(str(truth), boxes=str(boxes), min_score=0.2, refine=False)
    evaluation = InstancesFromBoxes(config)
    records, report = evaluated(evaluation)
    assert [record.get("category_ids") for record in records] == [[], [5], [2, 9], None]
    assert records[2]["scores"] == [0.5, 0.7]
    assert "mIoU" not in report.as_flat_dict()
    left_out = report.as_json()["left_out"]
    assert left_out["boxes with a score below 0.2"] == 1
    assert left_out["boxes of categories that are not in the truth"] == 1
    assert left_out["boxes of images that are not in the truth"] == 1
    # Labels are the names of the truth's categories, file names those of its pictures.
    corners = {"xmin": 2, "ymin": 2, "xmax": 42, "ymax": 52}
    by_name = {"3.png": [{"score": 0.5, "label": "2", "box": corners}]}
    boxes.write_text(json.dumps(by_name))
    named = InstancesFromBoxes(InstancesConfig(str(truth), boxes=str(boxes), refine=False))
    (record,) = named.records(predictor_for(named), [2])
    assert record["counts"] == records[2]["counts"][:1]
    assert named.settings["boxes_digest"] != evaluation.settings["boxes_digest"]
    for content, words in (
        ({"nowhere.png": []}, "none of its images is in"),
        ({"3.png": [{"score": 1, "label": "cow", "box": corners}]}, "no box to prompt with"),
        (
            {"3.png": [{"score": 1, "label": "2", "box": corners | {"xmin": 300, "xmax": 400}}]},
            "outside",
        ),
    ):
        boxes.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=words):
            InstancesFromBoxes(InstancesConfig(str(truth), boxes=str(boxes)))


def test_lvis_file(truth: Path) -> None:
    path = written(truth.parent, federated=True)
    evaluation = InstancesFromBoxes(InstancesConfig(str(path), rules="lvis"))
    records, report = evaluated(evaluation)
    # A category that nobody looked for in an image is not scored there; 5 is known not to be in 3.
    assert [matches[0] for matches in records[2]["matches"]] == [2, 9]
    flat = report.as_flat_dict()
    assert {"AP_rare", "AP_common", "AP_frequent"} <= flat.keys()
    for rules, file, words in (("coco", path, "has LVIS's"), ("lvis", truth, "has not LVIS's")):
        with pytest.raises(ConfigError, match=words):
            InstancesFromBoxes(InstancesConfig(str(file), rules=rules))


def test_proposals(truth: Path, capsys: Any) -> None:
    path = written(truth.parent, federated=True)
    config = ProposalsConfig(str(path), points_per_side=4, points_per_batch=8, max_proposals=20)
    evaluation = ObjectProposals(config)
    records, report = evaluated(evaluation)
    assert [record["image_id"] for record in records] == [1, 2, 3, 7]
    assert all(r["num_proposals"] == min(20, r["num_masks"]) for r in records[:3])
    assert records[0]["found"] == {}
    assert set(records[2]["found"]) == {"all", "small", "medium", "rare", "frequent"}
    assert len(records[1]["best_counts"]) == records[1]["num_objects"] == 2
    content = report.as_json()
    assert content["counts"]["objects"] == 4
    assert content["left_out"] == {"images skipped (unreadable image)": 1}
    assert {"AR", "AR_small", "AR_medium", "AR_rare"} <= report.as_flat_dict().keys()
    assert proposals.measures(records, evaluation.settings)(np.ones(4)) == report.as_flat_dict()
    report.print_table()
    assert "Mask AR@20 (%): three masks of 4 x 4 points" in capsys.readouterr().out
    assert report.pictures["examples"].ndim == 3

    single = ObjectProposals(
        ProposalsConfig(
            str(path),
            points_per_side=4,
            points_per_batch=8,
            multimask_output=False,
            box_nms_thresh=1.0,
            ranking="random",
            max_proposals=5,
        )
    )
    (record,) = single.records(predictor_for(single), [2])
    assert (record["num_masks"], record["num_proposals"]) == (16, 5)


def test_what_cannot_be(truth: Path, tmp_path: Path) -> None:
    for wrong, words in (
        ({"rules": "voc"}, "rules is 'voc'"),
        ({"jitter_rate": 0.0}, "jitter_rate"),
        ({"max_images": 0}, "max_images"),
        ({"min_score": 0.5}, "min_score is for a detector's boxes"),
    ):
        with pytest.raises(ConfigError, match=words):
            InstancesConfig(str(truth), **wrong)
    for wrong, words in (
        ({"ranking": "best"}, "ranking is 'best'"),
        ({"max_proposals": 0}, "max_proposals"),
        ({"max_images": 0}, "max_images"),
    ):
        with pytest.raises(ConfigError, match=words):
            ProposalsConfig(str(truth), **wrong)
    content = json.loads(truth.read_text())
    truth.write_text(json.dumps(content | {"annotations": []}))
    evaluation = ObjectProposals(ProposalsConfig(str(truth), points_per_side=1))
    with pytest.raises(NoObjectsError, match="has no object to be found"):
        evaluated(evaluation)
    assert {category["id"] for category in content["categories"]} == set(CATEGORIES)
