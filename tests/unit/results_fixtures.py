"""Results of evaluations on disk, as eval.py leaves them, made up."""

import json

import numpy as np

from sam_jax.evaluation.results import read_results


def record(dataset, image, *masks):
    """A record of prompted masks; each mask is its IoUs by measure, or by one measure alone."""
    ious = [mask if isinstance(mask, dict) else {"center_1": mask} for mask in masks]
    return {
        "dataset": dataset,
        "image": image,
        "masks": [{"mask": number, "ious": of_mask} for number, of_mask in enumerate(ious)],
    }


def many_records(rng, images=(9, 5), measures=("center_1", "box"), shift=0.0):
    """Records of data sets ``d0``, ``d1``, ... with such numbers of images.

    Those of another shift are of the same images and masks, better by the shift and some chance.
    """
    records, chance = [], np.random.default_rng(1)
    for dataset, count in enumerate(images):
        for image in range(count):
            base = rng.uniform(0.2, 0.7)
            masks = [
                {m: _iou(base + rng.uniform(-0.2, 0.2), shift, chance) for m in measures}
                for _ in range(rng.integers(1, 5))
            ]
            records.append(record(f"d{dataset}", f"/data/d{dataset}/{image}.jpg", *masks))
    return records


def _iou(value, shift, chance):
    return float(np.clip(value + shift * chance.uniform(0.5, 1.5), 0, 1))


def write_results(folder, records, *, settings=None, kind="prompts", weights="w"):
    """The files of a finished evaluation; returns its folder."""
    kept = folder / "records-0123456789ab"
    kept.mkdir(parents=True)
    made_with = {
        "evaluation": settings or {"seed": 0},
        "kind": kind,
        "num_examples": len(records),
        "weights": weights,
    }
    (kept / "settings.json").write_text(json.dumps(made_with))
    # Two hosts, and not in order.
    for host in range(2):
        lines = [
            json.dumps({"example": number, **of_example}) + "\n"
            for number, of_example in enumerate(records)
            if number % 2 == host
        ]
        (kept / f"host-0000{host}.jsonl").write_text("".join(reversed(lines)))
    (folder / "report.json").write_text(json.dumps({"kind": kind, "records": kept.name}))
    return folder


def results_of(folder, records, **options):
    """The same, read back."""
    return read_results(write_results(folder, records, **options))
