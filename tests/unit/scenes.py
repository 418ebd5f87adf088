"""Made-up images with true and predicted masks, for comparisons with published evaluations."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam_jax.evaluation.detection.average_precision import category_matches, counted

SIDE = 128
CATEGORIES = (2, 5, 9)
# Sides that give areas of every size, and on the borders between sizes.
SIDES = (1, 7, 32, 33, 60, 96, 97, 120)
Scene = dict[str, Any]


def rectangle(x: int, y: int, width: int, height: int) -> dict[str, Any]:
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    return coco_mask.encode(mask)


@st.composite
def scenes(draw: st.DrawFn, max_images: int = 4, max_truths: int = 4) -> list[Scene]:
    """Images with few places and scores, so that ties and duplicates are frequent."""
    corner = st.sampled_from((0, 4, 8))
    shape = st.tuples(corner, corner, st.sampled_from(SIDES), st.sampled_from(SIDES))
    category = st.sampled_from(CATEGORIES)
    truth = st.tuples(category, shape, st.booleans())
    found = st.tuples(category, shape, st.sampled_from((0.1, 0.2, 0.5, 0.9)))
    categories = st.sets(category)
    images = []
    for number in range(draw(st.integers(1, max_images))):
        truths = draw(st.lists(truth, max_size=max_truths))
        present = {t[0] for t in truths}
        images.append(
            {
                "id": number + 1,
                "truths": truths,
                "found": draw(st.lists(found, max_size=8)),
                "negative": sorted(draw(categories) - present),
                "not_exhaustive": sorted(draw(categories) & present),
            }
        )
    return images


def annotations(images: Sequence[Scene], *, crowds: bool = True) -> dict[str, Any]:
    """The truth as a COCO or LVIS file has it, with compressed RLEs as text."""
    records: list[dict[str, Any]] = []
    for image in images:
        for category, shape, is_crowd in image["truths"]:
            mask = rectangle(*shape)
            records.append(
                {
                    "id": len(records) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "segmentation": mask | {"counts": mask["counts"].decode()},
                    "area": int(coco_mask.area(mask)),
                    "bbox": coco_mask.toBbox(mask).tolist(),
                    "iscrowd": int(is_crowd and crowds),
                }
            )
    return {
        "images": [
            {
                "id": image["id"],
                "file_name": f"{image['id']}.png",
                "height": SIDE,
                "width": SIDE,
                "neg_category_ids": image["negative"],
                "not_exhaustive_category_ids": image["not_exhaustive"],
            }
            for image in images
        ],
        "annotations": records,
        "categories": [
            {"id": c, "name": str(c), "frequency": f, "image_count": 1, "instance_count": 1}
            for c, f in zip(CATEGORIES, "rcf", strict=True)
        ],
    }


def results(images: Sequence[Scene]) -> list[dict[str, Any]]:
    """What was found, in COCO's results form."""
    return [
        {
            "image_id": image["id"],
            "category_id": category,
            "segmentation": rectangle(*shape),
            "score": score,
        }
        for image in images
        for category, shape, score in image["found"]
    ]


def matches_of(image: Scene, rules: Any) -> list[Any]:
    """Our matches of an image, category by category."""
    found, truths = image["found"], image["truths"]
    kept = counted(
        rules, np.array([f[2] for f in found], float), np.array([f[0] for f in found], int)
    )
    found = [found[index] for index in kept]
    matches = []
    for category in CATEGORIES:
        ours = [f for f in found if f[0] == category]
        theirs = [t for t in truths if t[0] == category]
        if rules == "lvis" and not theirs and category not in image["negative"]:
            continue
        if not ours and not theirs:
            continue
        crowd = np.array([t[2] and rules == "coco" for t in theirs], bool)
        predicted, true = ([rectangle(*one[1]) for one in some] for some in (ours, theirs))
        ious = np.zeros((len(ours), len(theirs)))
        if ours and theirs:
            ious = coco_mask.iou(predicted, true, crowd.astype(int).tolist())
        matches.append(
            category_matches(
                category,
                np.array([f[2] for f in ours], float),
                np.array([coco_mask.area(m) for m in predicted], float),
                ious,
                np.array([coco_mask.area(m) for m in true], float),
                crowd,
                is_exhaustive=rules == "coco" or category not in image["not_exhaustive"],
            )
        )
    return matches


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """pycocotools says what it does."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def coco_eval(
    images: Sequence[Scene], truth: dict[str, Any], found: list[dict[str, Any]], **params: Any
) -> Any:
    """pycocotools' evaluation, accumulated."""
    with quiet():
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        predicted = COCO()
        predicted.dataset = dict(truth)
        predicted.dataset["annotations"] = [
            result
            | {
                "id": number,
                "area": int(coco_mask.area(result["segmentation"])),
                "bbox": coco_mask.toBbox(result["segmentation"]).tolist(),
                "iscrowd": 0,
            }
            for number, result in enumerate(found, start=1)
        ]
        predicted.createIndex()
        evaluation = COCOeval(coco, predicted, "segm")
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def lvis_eval(images: Sequence[Scene], *, max_dets: int = 300, **params: Any) -> Any:
    """The LVIS tool's evaluation, accumulated; skips a test where it is not installed."""
    lvis = pytest.importorskip("lvis", reason="lvis is not installed")
    found = results(images)
    for result in found:
        result["segmentation"]["counts"] = result["segmentation"]["counts"].decode()
    with pytest.MonkeyPatch.context() as patch, quiet():
        # Names that numpy no longer has.
        patch.setattr(np, "float", float, raising=False)
        patch.setattr(np, "bool", bool)
        theirs = lvis.LVIS.__new__(lvis.LVIS)
        theirs.logger = lvis.lvis.logging.getLogger("lvis")
        theirs.dataset = annotations(images, crowds=False)
        theirs._create_index()
        loaded = lvis.LVISResults(theirs, found, max_dets=max_dets)
        evaluation = lvis.LVISEval(theirs, loaded, "segm")
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation
