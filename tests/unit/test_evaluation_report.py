import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sam_jax.evaluation.clicks import Click
from sam_jax.evaluation.gallery import Gallery
from sam_jax.evaluation.protocols.protocol import Outcome
from sam_jax.evaluation.report import DatasetReport, EvalReport, results_folder
from sam_jax.evaluation.targets import EvalImage, TargetMask


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


def test_json_holds_all_numbers_and_replaces_the_old_file(tmp_path):
    path = tmp_path / "new" / "report.json"
    report(names=("other",)).write_json(path)
    report(skipped={"masks (empty)": 2}).write_json(path)
    content = json.loads(path.read_text())
    assert list(content["datasets"]) == ["coco", "cells"]
    assert content["datasets"]["cells"]["miou"]["random_9"] == pytest.approx(0.91)
    assert content["datasets"]["cells"]["num_masks"] == 34567
    assert content["datasets"]["coco"]["skipped"] == {"masks (empty)": 2}
    assert content["mean"] == report().mean
    assert content["settings"]["seed"] == 3
    assert content["disk_radius_rates"] == {"disk_center": 0.0625}
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    report().write_json(path)
    before = path.read_text()
    broken = report()
    broken.settings["sources"] = object()
    with pytest.raises(TypeError):
        broken.write_json(path)
    assert path.read_text() == before


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


def outcome(name, iou, index=0):
    image = EvalImage(
        dataset="d",
        name=name,
        pixels=np.full((20, 30, 3), 100, np.uint8),
        masks=np.ones((index + 1, 20, 30), bool),
        mask_indices=tuple(range(index + 1)),
    )
    prediction = np.zeros((20, 30), bool)
    clicks = (Click(3, 4, is_foreground=True),)
    ious = {"center_2": iou, "center_1": 0.5}
    return Outcome(TargetMask(image, index), ious, prediction, clicks)


def chosen(gallery):
    return [[entry.iou for entry in kept.entries] for kept in (gallery._worst, gallery._best)]


def test_gallery_keeps_the_extremes_one_of_each_image():
    gallery = Gallery("center_2", 2)
    for name, iou, index in [
        ("a", 0.5, 0),
        ("b", 0.1, 0),
        ("b", 0.05, 1),
        ("c", 0.2, 0),
        ("d", 0.9, 0),
        ("d", 0.95, 1),
        ("e", 0.9, 0),
    ]:
        gallery.offer(outcome(name, iou, index))
    assert chosen(gallery) == [[0.05, 0.2], [0.95, 0.9]]


def test_gallery_does_not_depend_on_the_order():
    offers = [outcome(f"{i}.png", iou) for i, iou in enumerate([0.0, 0.5, 0.0, 0.0, 1.0, 1.0, 0.7])]
    pictures = []
    for order in (offers, offers[::-1]):
        gallery = Gallery("center_2", 2)
        for offered in order:
            gallery.offer(offered)
        pictures.append(gallery.picture())
    assert pictures[0] is not None
    np.testing.assert_array_equal(pictures[0], pictures[1])


def test_gallery_holds_no_other_masks_of_its_images():
    gallery = Gallery("center_2", 1)
    gallery.offer(outcome("a", 0.5, index=7))
    for kept in (gallery._worst, gallery._best, gallery._drawn):
        assert kept.entries[0].example.ground_truth.base is None


def test_gallery_without_examples():
    gallery = Gallery("center_2", 0)
    gallery.offer(outcome("a", 0.5))
    assert gallery.picture() is None
    assert Gallery("center_2", 3).picture() is None


def test_gallery_ignores_other_protocols():
    gallery = Gallery("box", 1)
    gallery.offer(outcome("a", 0.5))
    assert gallery.picture() is None


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
