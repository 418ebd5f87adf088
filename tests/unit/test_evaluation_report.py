import dataclasses
import io
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sam_jax.evaluation.gallery import Scored, choose
from sam_jax.evaluation.report import DatasetReport, EvalReport, results_folder


def report(names=("coco", "cells"), protocols=("center", "random"), skipped=None):
    datasets = []
    for place, name in enumerate(names):
        miou: dict[str, float] = {}
        for protocol in protocols:
            miou |= {f"{protocol}_{n}": 0.1 * n + 0.01 * place for n in (1, 2, 9)}
            miou[f"{protocol}_1_oracle"] = 0.4
        miou |= {"box": 0.75, "box_oracle": 0.8, "box_grabcut": 0.25, "disk_center": 0.3}
        datasets.append(DatasetReport(name, 1200, 34567, skipped or {}, miou))
    mean = {m: float(np.mean([d.miou[m] for d in datasets])) for m in datasets[0].miou}
    return EvalReport(
        datasets=tuple(datasets),
        mean=mean,
        num_clicks=(1, 2, 9),
        disk_radius_rates={"disk_center": 0.0625},
        settings={"seed": 3, "sources": ({"kind": "coco", "name": "coco"},)},
        seconds=12.25,
    )


def printed(some_report):
    stream = io.StringIO()
    some_report.print_table(Console(file=stream, width=100))
    return stream.getvalue()


def test_flat_dict_names_dataset_and_measure():
    flat = report().as_flat_dict()
    assert flat["coco/center_2"] == pytest.approx(0.2)
    assert flat["cells/center_2"] == pytest.approx(0.21)
    assert flat["mean/center_2"] == pytest.approx(0.205)
    assert len(flat) == 3 * len(report().mean)


def test_json_holds_all_numbers():
    content = json.loads(json.dumps(report(skipped={"masks (empty)": 2}).as_json()))
    assert list(content["datasets"]) == ["coco", "cells"]
    assert content["datasets"]["cells"]["miou"]["random_9"] == pytest.approx(0.91)
    assert content["datasets"]["cells"]["num_masks"] == 34567
    assert content["datasets"]["coco"]["skipped"] == {"masks (empty)": 2}
    assert content["mean"] == report().mean
    assert content["settings"]["seed"] == 3
    assert content["disk_radius_rates"] == {"disk_center": 0.0625}


def test_table_fits_and_shows_percent():
    protocols = ("center", "random", "center_points_only", "random_points_only")
    text = printed(report(protocols=protocols, skipped={"images (bad rle)": 5}))
    assert max(map(len, text.splitlines())) <= 100
    coco = next(line for line in text.splitlines() if line.strip().startswith("coco"))
    # One click, the best of its three masks, two and nine clicks, the disk.
    assert coco.split() == ["coco", "34,567", "centre", "10.0", "40.0", "20.0", "90.0", "30.0"]
    assert "whole box" not in text
    assert "69,134 masks on 2,400 images in 12 s" in text
    assert "skipped or remarked in coco: 5 images (bad rle)" in text


def test_examples_of_what_was_skipped_are_printed_as_they_are():
    content = report()
    examples = {"images (bad rle)": "runs [1]/[bold]a.png: mask 0"}
    datasets = (dataclasses.replace(content.datasets[0], examples=examples),)
    text = printed(dataclasses.replace(content, datasets=datasets))
    assert "images (bad rle): runs [1]/[bold]a.png: mask 0" in text


def test_table_of_one_dataset_has_no_mean():
    assert "mean" not in printed(report(names=("coco",))).replace("Mean", "")
    assert "mean" in printed(report()).replace("Mean", "")


def test_table_of_boxes_alone():
    text = printed(report(protocols=()))
    assert "clicks" not in text
    assert "GrabCut" in text


def test_plot_draws_what_there_is(tmp_path):
    path = tmp_path / "new" / "curves.png"
    report().plot(path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        several = image.size
    report(names=("coco",)).plot(path)
    with Image.open(path) as image:
        assert image.size[0] < several[0]


def scored(ious):
    """Masks as ``(image, IoU)``, numbered."""
    return [
        Scored(iou, f"d/{image}/{index}", ord(image), {}) for index, (image, iou) in enumerate(ious)
    ]


def chosen(masks, num_each):
    return {sort: [mask.iou for mask in found] for sort, found in choose(masks, num_each).items()}


def test_the_extremes_are_chosen_one_of_each_image():
    masks = [("a", 0.5), ("b", 0.1), ("b", 0.05), ("c", 0.2), ("d", 0.9), ("d", 0.95), ("e", 0.9)]
    found = chosen(scored(masks), 2)
    assert found["worst"] == [0.05, 0.2]
    assert found["best"] == [0.9, 0.95]
    # The median of all seven is 0.5.
    assert found["typical"][0] == 0.5


@hypothesis.given(st.lists(st.tuples(st.sampled_from("abcdefg"), st.sampled_from([0.0, 0.5, 1.0]))))
def test_the_choice_does_not_depend_on_the_order(masks):
    assert choose(scored(masks), 2) == choose(scored(masks)[::-1], 2)


def test_nothing_is_chosen_of_nothing():
    assert choose([], 3) == {}
    assert chosen(scored([("a", 0.5)]), 1) == {"worst": [0.5], "typical": [0.5], "best": [0.5]}


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ("run", "run/eval"),
        ("run/checkpoints", "run/eval"),
        ("demo.pt", "demo_eval"),
        ("sam.b.pth", "sam.b_eval"),
        ("bare", "bare_eval"),
    ],
)
def test_results_go_where_a_folder_can_be(tmp_path, checkpoint, expected):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in ("demo.pt", "sam.b.pth", "bare"):
        (tmp_path / name).touch()
    assert results_folder(tmp_path / checkpoint) == tmp_path / expected


def test_results_of_a_name_on_the_hub_make_no_folder_of_that_name():
    assert str(results_folder("facebook/sam-vit-base")) == "facebook_sam-vit-base_eval"


def test_names_with_brackets_are_printed_as_they_are():
    text = printed(report(("cells [a]", "cells [/old]"), skipped={"images (bad rle)": 5}))
    for name in ("cells [a]", "cells [/old]"):
        assert f" {name} " in text
        assert f"skipped or remarked in {name}: 5 images" in text
