"""The edge evaluation end to end, with a predictor whose edges are known, and ready-made maps."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from configs.eval_edges import get_config
from sam_jax.cli import app
from sam_jax.configuration import from_mapping
from sam_jax.data.corruption import NoObjectsError
from sam_jax.errors import ConfigError, UserError
from sam_jax.evaluation.edges.evaluation import EdgeEvalConfig, EdgeEvaluation
from sam_jax.evaluation.edges.ready_made import score_maps
from sam_jax.evaluation.edges.report import EdgeReport, measures
from sam_jax.evaluation.evaluation import Evaluation, Report
from sam_jax.evaluation.kinds import KINDS
from sam_jax.evaluation.run import Evaluator
from sam_jax.models.sam import Sam
from tests.golden.tiny import TINY
from tests.unit.edge_fixtures import BUCKETS, BrightnessPredictor, outline, write_example

BOXES = {"a": (10, 8, 40, 30), "b": (20, 5, 60, 44), "c": (3, 12, 50, 40)}


@pytest.fixture
def data(tmp_path):
    for name, box in BOXES.items():
        write_example(tmp_path / "data", name, box)
    return tmp_path / "data"


def opened(data, **changes):
    """The evaluation of a folder as the runner opens it, on a small grid."""
    options = {
        "path": str(data),
        "points_per_side": 3,
        "points_per_batch": 4,
        "frame": "reflected",
        "num_thresholds": 9,
        "max_distance_rate": 0.05,
        "num_examples": 0,
    }
    return KINDS["edges"].open(from_mapping(EdgeEvalConfig, options | changes, "evals.edges"))


def records_of(evaluation, indices=range(3)):
    return list(evaluation.records(BrightnessPredictor(), indices))


def test_a_predictor_that_is_right_finds_all_edges(data):
    evaluation = opened(data)
    assert isinstance(evaluation, Evaluation)
    assert evaluation.buckets(2) == BUCKETS
    records = records_of(evaluation)
    assert [record["image"] for record in records] == ["a", "b", "c"]
    # Of 27 masks one of what is white, one of what is black, and those without a pixel: boxes of no
    # area do not overlap.
    assert [record["masks"] for record in records] == [2 + 9] * 3
    # Two of three annotators marked the outline of 30 x 22 pixels.
    assert records[0]["annotated"] == 2 * 100
    for suppression in ("canny", "structured", "opencv", "none"):
        counts = records[0]["maps"]["model"][suppression]
        assert counts["predicted"][0] == pytest.approx(100, rel=0.1)
        assert counts["recalled"][0] == pytest.approx(200, rel=0.1)
        # There is no pixel for each of those that are left of a line with corners.
        assert counts["confirmed"][0] >= counts["predicted"][0] - 4
    report = evaluation.report(records, 1.0)
    assert isinstance(report, Report)
    assert report.scores["model"]["none"]["ods"] > 0.95
    assert report.scores["sobel"]["none"]["ods_precision"] == 1
    assert json.loads(json.dumps(report.as_json(), allow_nan=False))["num_images"] == 3


def test_records_are_the_same_however_they_are_divided(data):
    whole = records_of(opened(data))
    assert records_of(opened(data, images_per_call=3, points_per_batch=9)) == whole
    evaluation = opened(data)
    parts = {index: records_of(evaluation, [index])[0] for index in (2, 0, 1)}
    assert [parts[index] for index in range(3)] == whole
    assert json.loads(json.dumps(whole)) == whole


def test_the_reports_scores_are_the_measures(data):
    evaluation = opened(data)
    records = records_of(evaluation)
    settings = json.loads(json.dumps(evaluation.settings))
    measured = measures(records, settings)
    assert measured(np.ones(3)) == evaluation.report(records, 0.0).as_flat_dict()
    twice = measures([records[0], records[0], records[2]], settings)(np.ones(3))
    assert measured(np.array([2.0, 0.0, 1.0])) == pytest.approx(twice)


def test_options_without_influence_are_no_settings(data, tmp_path):
    changed = opened(data, maps=str(tmp_path / "maps"), images_per_call=2, num_examples=9)
    assert changed.settings == opened(data).settings
    assert opened(data, boundary="outer").settings != opened(data).settings


def test_an_image_that_cannot_be_used_is_said(data, capsys):
    (data / "groundTruth/b.mat").write_bytes(b"?")
    evaluation = opened(data)
    records = records_of(evaluation)
    assert list(records[1]) == ["image", "unusable"]
    report = evaluation.report(records, 0.0)
    assert report.num_images == 2
    console = Console(width=100)
    report.print_table(console)
    printed = capsys.readouterr().out
    assert "2 images in 0 s" in printed
    assert "1 images are left out" in printed
    # A long path is broken somewhere.
    assert "b.matisdamaged" in "".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 100
    # The others score as they do alone.
    measured = measures(records, evaluation.settings)
    assert measured(np.ones(3)) == report.as_flat_dict()
    assert report.as_flat_dict() == evaluation.report(records[::2], 0.0).as_flat_dict()


def test_nothing_usable_is_an_error(data):
    for name in BOXES:
        (data / f"groundTruth/{name}.mat").write_bytes(b"?")
    evaluation = opened(data)
    with pytest.raises(NoObjectsError, match=r"none of 3 images can be used: .*a\.mat"):
        evaluation.report(records_of(evaluation), 0.0)


def test_answers_that_are_no_numbers_are_an_error(data):
    predictor = BrightnessPredictor()
    predictor.logit = np.nan
    with pytest.raises(UserError, match=r"a\.png: the model answers with numbers that are not"):
        list(opened(data).records(predictor, range(3)))


def test_written_maps_score_the_same(data, tmp_path):
    evaluation = opened(data, maps=str(tmp_path / "maps"))
    report = evaluation.report(records_of(evaluation), 0.0)
    for source in ("model", "sobel"):
        for suppression in ("canny", "none"):
            folder = tmp_path / "maps" / source / suppression
            assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png", "c.png"]
            ready = score_maps(folder, data, num_thresholds=9, max_distance_rate=0.05)
            assert ready.scores[suppression]["none"] == report.scores[source][suppression]


def test_maps_in_full_depth_differ(data):
    exact = records_of(opened(data, is_quantized=False, num_thresholds=99))
    assert exact != records_of(opened(data, num_thresholds=99))


def test_pictures_are_of_what_was_seen(data):
    records = records_of(opened(data))
    continued = opened(data, num_examples=1)
    assert set(continued.report(records, 0.0).pictures) == {"precision_recall"}
    assert records_of(continued, [1]) == records[1:2]
    assert set(continued.report(records, 0.0).pictures) == {"precision_recall", "edge_maps"}
    assert not opened(data, num_examples=0).report(records, 0.0).pictures


def test_it_runs_and_goes_on_like_any_evaluation(data, tmp_path):
    evaluation = opened(data)

    def run():
        evaluator = Evaluator(Sam(TINY), evaluation, kind="edges", predictor=BrightnessPredictor())
        return evaluator({}, tmp_path / "out")

    first = run()
    (file,) = (tmp_path / "out").glob("records-*/host-*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:9])
    again = run()
    assert again == first
    assert file.read_text().splitlines(keepends=True) == lines
    assert json.loads((tmp_path / "out/report.json").read_text())["kind"] == "edges"


def test_corrected_boundaries_are_other_settings(data):
    evaluation = opened(data)
    before = evaluation.settings
    shutil.copy(data / "groundTruth/a.mat", data / "groundTruth/b.mat")
    assert opened(data).settings != before
    # Those of the images that are evaluated.
    assert opened(data, max_images=1).settings["truth_digest"] != before["truth_digest"]


def test_ready_made_maps_must_be_those_of_the_images(data, tmp_path):
    maps = tmp_path / "maps"
    maps.mkdir()
    for name in ("a", "b"):
        Image.new("L", (64, 48)).save(maps / f"{name}.png")
    with pytest.raises(ConfigError, match="1 images, as c, have no map"):
        score_maps(maps, data)
    Image.new("L", (64, 48)).save(maps / "c.png")
    Image.new("L", (64, 48)).save(maps / "d.png")
    with pytest.raises(ConfigError, match="as d, have a map in"):
        score_maps(maps, data)
    (maps / "d.png").unlink()
    # Empty maps are scored, as 0.
    scores = score_maps(maps, data, suppression="structured").scores["maps"]["structured"]
    assert set(scores.values()) <= {0.0, 0.01}
    Image.new("L", (9, 9)).save(maps / "c.png")
    with pytest.raises(UserError, match=r"c\.mat has boundaries .*; .*c\.png is \(9, 9\)"):
        score_maps(maps, data)
    with pytest.raises(ConfigError, match="no suppression 'cany'; there are canny"):
        score_maps(maps, data, suppression="cany")


def test_the_command_scores_maps(data, tmp_path):
    maps = tmp_path / "their maps"
    maps.mkdir()
    for name, box in BOXES.items():
        Image.fromarray(255 * outline(box).astype(np.uint8)).save(maps / f"{name}.png")
    out = tmp_path / "out"
    arguments = ["score-edges", str(maps), "--data", str(data), "--thresholds", "5"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "3 images" in result.output
    report = json.loads((out / "report.json").read_text())
    assert report["scores"]["their maps"]["none"]["ods_precision"] == 1
    assert (out / "precision_recall.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"suppressions": ("cany",)}, r"\['cany'\] do not exist; there are"),
        ({"suppressions": ()}, "must name one at least"),
        ({"baselines": ("prewitt",)}, r"\['prewitt'\] do not exist"),
        ({"num_thresholds": 0}, "num_thresholds"),
        ({"max_distance_rate": 0.0}, "max_distance_rate must be in"),
        ({"max_images": 0}, "max_images must be at least 1"),
        ({"boundary": "inner"}, "boundary must be 'band' or 'outer'"),
        ({"nms": 0.7}, "has no field 'nms'"),
    ],
)
def test_impossible_options_are_named(data, changes, words):
    with pytest.raises(ConfigError, match=words):
        opened(data, **changes)


def test_the_config_is_of_this_kind(data):
    config = get_config(str(data))
    assert isinstance(config, ConfigDict)
    options = config.evals.edges.to_dict()
    assert options.pop("kind") == "edges"
    assert len(EdgeEvaluation(from_mapping(EdgeEvalConfig, options, "evals.edges"))) == 3
    # Set on the command line.
    assert {"maps", "split", "max_images"} <= options.keys()
    with pytest.raises(FileNotFoundError, match=r"eval_edges\.py:FOLDER"):
        get_config("nowhere")


def test_a_missing_solver_is_said(data, monkeypatch):
    package = "sam_jax.evaluation.edges"
    for name in ("counts", "matching", "thinning"):
        monkeypatch.delitem(sys.modules, f"{package}.{name}", raising=False)
        monkeypatch.delattr(sys.modules[package], name, raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ConfigError, match=r"needs Numba: pip install 'sam-jax\[edges\]'"):
        opened(data)


@pytest.fixture
def bench(shared_data: Path) -> Path:
    path = shared_data / "bsds500/bench"
    if not path.is_dir():
        pytest.skip(f"no folder {path}")
    return path


def table(path):
    return np.atleast_2d(np.loadtxt(path))


def test_the_benchmarks_reference_files(bench):
    """What the benchmark's own code gives for the maps that come with it, to 3 decimals.

    Its solver loses some matches at random, so the exact recall is a little higher.
    """
    report = score_maps(bench / "png", bench, num_thresholds=5)
    (scores,) = report.scores["png"].values()
    (curve,) = report.curves["png"].values()
    expected = table(bench / "test_1/eval_bdry_thr.txt")
    np.testing.assert_allclose(curve["recall"], expected[:, 1], atol=1e-3)
    np.testing.assert_allclose(curve["precision"], expected[:, 2], atol=1e-3)
    (best,) = table(bench / "test_1/eval_bdry.txt")
    assert scores["ods"] == pytest.approx(0.70472, abs=1e-5)
    assert scores["ods_threshold"] == pytest.approx(best[0], abs=1e-6)
    assert scores["ods"] == pytest.approx(best[3], abs=2e-4)
    assert scores["ois"] == pytest.approx(best[6], abs=2e-4)
    assert scores["ap"] == pytest.approx(best[7], abs=2e-4)


def test_the_benchmarks_reference_images(bench, tmp_path):
    for number, *expected in table(bench / "test_1/eval_bdry_img.txt"):
        name = sorted(path.stem for path in (bench / "png").iterdir())[int(number) - 1]
        for kind, suffix in (("images", "jpg"), ("groundTruth", "mat"), ("png", "png")):
            target = tmp_path / name / kind / f"{name}.{suffix}"
            target.parent.mkdir(parents=True)
            target.write_bytes((bench / kind / target.name).read_bytes())
        report = score_maps(tmp_path / name / "png", tmp_path / name, num_thresholds=5)
        (scores,) = report.scores["png"].values()
        found = [scores[f"ods_{part}"] for part in ("threshold", "recall", "precision")]
        np.testing.assert_allclose([*found, scores["ods"]], expected, atol=1.5e-3)
        assert scores["ods"] == pytest.approx(expected[3], abs=1e-3)


def test_names_with_brackets_are_printed_as_they_are():
    scores = dict.fromkeys(("ods", "ois", "ap", "r50"), 0.5)
    named = {name: {"none": scores} for name in ("maps [a]", "maps [/old]")}
    console = Console(width=100, record=True)
    EdgeReport(named, {}, 1, {}, {}, 0.0).print_table(console)
    text = console.export_text()
    assert "maps [a]" in text
    assert "maps [/old]" in text
