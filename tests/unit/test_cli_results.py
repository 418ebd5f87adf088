"""The commands that look at data and results, as a user meets them."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sam_jax.cli import app
from sam_jax.cli_results import progress_bar
from tests.unit.data_fixtures import sa1b_files, write_coco, write_tar
from tests.unit.results_fixtures import many_records, write_results


@pytest.fixture
def call(tmp_path):
    def call(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call


@pytest.fixture
def results(tmp_path):
    options = {"measures": ("random_1", "box")}
    return [
        write_results(
            tmp_path / name / "small",
            many_records(np.random.default_rng(0), (20, 9), shift=shift, **options),
        )
        for name, shift in (("a", 0.0), ("b", 0.1))
    ]


def picture(path):
    with Image.open(path) as opened:
        assert opened.format == "PNG"
        assert np.asarray(opened).std() > 10


def test_stats_of_several_stores(call, tmp_path):
    coco = write_coco(tmp_path / "coco", 3)
    tar = write_tar(tmp_path / "sa_1.tar", sa1b_files([3, 5]))
    out = tmp_path / "out"
    done = call("stats", coco, tar, "--out", out, "--max-images", 2, "--seed", 1, "--workers", 1)
    assert done.exit_code == 0, done.output
    assert "coco/train" in done.output
    assert f"wrote {out / 'stats.json'} and" in done.output
    content = json.loads((out / "stats.json").read_text())
    found = {name: (d["num_images"], d["num_masks"]) for name, d in content["datasets"].items()}
    assert found == {"coco/train": (2, 2), "sa_1.tar": (2, 4)}
    assert (content["max_images"], content["seed"]) == (2, 1)
    picture(out / "stats.png")
    named = call("stats", coco, coco, "--name", "one", "--name", "two")
    assert named.exit_code == 0
    assert "two" in named.output


def test_stats_says_what_is_wrong(call, tmp_path):
    coco = write_coco(tmp_path / "coco", 1)
    for arguments, message in (
        ((coco, coco), "two stores are called coco/train"),
        ((coco, "--name", "a", "--name", "b"), "1 stores need as many --name"),
        ((coco.parent,), "has no mask that can be used: .*missing json"),
        ((coco, "--out", coco), "is a file"),
    ):
        done = call("stats", *arguments)
        assert done.exit_code == 1
        with pytest.raises(type(done.exception), match=message):
            raise done.exception


def test_compare(call, results, tmp_path):
    out = tmp_path / "out"
    done = call("compare", *(r.parent for r in results), "--out", out, "--draws", 100)
    assert done.exit_code == 0, done.output
    assert "mean" in done.output
    content = json.loads((out / "comparison.json").read_text())
    assert content["num_draws"] == 100
    assert content["measures"]["d1/box"]["low"] > 0
    picture(out / "comparison.png")
    chosen = call("compare", *results, "--measure", "box", "--draws", 10)
    assert chosen.exit_code == 0
    assert "random_1" not in chosen.output


def test_compare_refuses_other_settings(call, results, tmp_path):
    other = write_results(
        tmp_path / "c", many_records(np.random.default_rng(0)), settings={"seed": 1}
    )
    done = call("compare", results[0], other)
    assert done.exit_code == 1
    assert "seed: 0 and 1" in str(done.exception)


def test_fairness(call, results, tmp_path):
    table = tmp_path / "groups.csv"
    rows = [f"d0/{i}.jpg,{'odd' if i % 2 else 'even'},{i}" for i in range(20)]
    table.write_text("\n".join(["image,parity,number", *rows]))
    out = tmp_path / "out"
    options = ("--attributes", table, "--out", out, "--draws", 100)
    done = call("fairness", results[0], *options, "--attribute", "parity", "--resample", "masks")
    assert done.exit_code == 0, done.output
    assert "odd" in done.output
    content = json.loads((out / "fairness.json").read_text())
    assert content["results"] == str(results[0])
    assert content["resampled"] == "masks"
    assert content["measures"] == ["random_1", "box"]
    assert sum(g["num_images"] for g in content["groups"]["parity"].values()) == 20
    assert content["num_masks_without_row"] > 0
    picture(out / "fairness.png")


def test_crowds_that_were_kept_have_numbers(call, tmp_path):
    coco = write_coco(tmp_path / "coco", 1)
    content = json.loads(coco.read_text())
    crowd = content["annotations"][0] | {"id": 70, "iscrowd": 1}
    content["annotations"] = [crowd, *content["annotations"]]
    coco.write_text(json.dumps(content))
    masks = [{"mask": number, "ious": {"random_1": iou}} for number, iou in ((0, 0.25), (1, 0.75))]
    records = [{"dataset": "coco", "image": "/moved/0.png", "masks": masks}]
    sources = [{"kind": "coco", "path": "train.json", "crowd": "keep"}]
    results = write_results(tmp_path / "r", records, settings={"sources": sources})
    table = tmp_path / "t.csv"
    table.write_text("image,annotation_id,g\n0.png,0,x\n")
    options = ("--attributes", table, "--annotations", coco, "--out", tmp_path / "out")
    done = call("fairness", results, *options, "--draws", 10)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out/fairness.json").read_text()
    assert "0.75" in text
    assert "0.25" not in text


def test_fairness_by_annotation_ids(call, tmp_path):
    coco = write_coco(tmp_path / "coco", 2)
    records = [
        {"dataset": "x", "image": f"{i}.png", "masks": [{"mask": 0, "ious": {"box": 0.5}}]}
        for i in range(2)
    ]
    results = write_results(tmp_path / "r", records)
    table = tmp_path / "groups.csv"
    table.write_text("image,annotation_id,g\n0.png,0,a\n1.png,1,b\n1.png,9,b\n")
    arguments = ("fairness", results, "--attributes", table, "--draws", 10)
    done = call(*arguments, "--annotations", coco)
    assert done.exit_code == 0, done.output
    assert "1 rows of a mask that is not among the evaluated" in done.output
    refused = call(*arguments)
    assert "do not know annotation ids" in str(refused.exception)
    edges = write_results(tmp_path / "edges", records, kind="edges")
    refused = call("fairness", edges, "--attributes", table)
    assert "is of kind 'edges'" in str(refused.exception)


def test_the_bar_shows_names_as_they_are(monkeypatch, capsys):
    """Brackets would be marks of style, and one that closes none an error."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with progress_bar("masks") as advance:
        advance(1, 2, "[b]a[/i].png: 3 masks")
    assert "[b]a[/i].png: 3 masks" in capsys.readouterr().err
