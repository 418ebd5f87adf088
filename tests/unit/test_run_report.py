"""One page of a run: all that its folder tells, whatever state it is in."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sam_jax.cli import app
from sam_jax.run_report import RunReportError, read_run, report_html

CONFIG = {"model": {"variant": "vit_ti"}, "train": {"num_steps": 40, "seed": 0}}


def write_run(folder: Path) -> None:
    """A run of 40 steps that was started twice, with a longer config the second time."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    before = {**CONFIG, "train": {"num_steps": 20, "seed": 0}}
    (folder / "config_until_step_20.json").write_text(json.dumps(before))
    start = {
        "time": "2026-01-02T03:04:05+0000",
        "after_step": 0,
        "command": "python train.py --config <a&b>.py",
        "commit": {"hash": "0123456789abcdef", "dirty": True},
        "versions": {"jax": "0.10.2"},
        "host": "here",
        "processes": 2,
        "devices": ["cpu cpu 0", "cpu cpu 1"],
        "mesh": {"data": 2},
    }
    starts = [start, start | {"after_step": 20}]
    (folder / "starts.jsonl").write_text("".join(json.dumps(s) + "\n" for s in starts))
    metrics = [
        {"step": step, "train/loss": 100 / step, "train/iou_round_01": step / 50}
        for step in (10, 20, 30, 30, 40)
    ]
    # What was computed again holds.
    metrics[2]["train/loss"] = 77.0
    metrics.append({"step": 30, "train/loss": None, "train/skipped_steps": 1})
    metrics += [{"step": step, "eval/val/mean/box": step / 100} for step in (20, 40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    skipped = {"step": 25, "loss": "nan", "gradient_norm": "inf", "samples": ["cats/7.jpg"]}
    (folder / "skipped_steps.jsonl").write_text(json.dumps(skipped) + "\n")
    data = {
        "sources": [{"name": "cats", "kind": "coco", "path": "cats.json", "num_samples": 12}],
        "processes": 2,
        "samples_read": 1234,
        "samples skipped": [
            {"reason": "truncated image", "count": 3, "example": "cats/<9>.jpg: too short"}
        ],
    }
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "parameters.txt").write_text("a/kernel  (3, 4)  [-, fsdp]  6\nb/bias  ()  []  1\n")
    for step in (20, 30, 40):
        (folder / "pictures" / str(step)).mkdir(parents=True)
        picture = np.full((4, 6, 3), step, np.uint8)
        Image.fromarray(picture).save(folder / "pictures" / str(step) / "eval_val_examples.png")
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    (folder / "checkpoints" / "41.orbax-checkpoint-tmp").mkdir()
    (folder / "checkpoints_damaged" / "30").mkdir(parents=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a <run>"
    folder.mkdir()
    write_run(folder)
    return folder


class Page(HTMLParser):
    """Text and pictures of a page; knows nothing that would be fetched."""

    def __init__(self, text: str):
        super().__init__()
        self.words: list[str] = []
        self.pictures: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "src":
                self.pictures.append(str(value))
            assert name not in ("href", "src") or str(value).startswith(("data:", "#"))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_a_page_tells_all_that_the_folder_does(run: Path) -> None:
    found = read_run(run)
    assert found.faults == []
    assert found.metrics["train/loss"][20] == 5.0
    assert np.isnan(found.metrics["train/loss"][30])
    assert found.checkpoints == [20, 30, 40]
    page = Page(report_html(found))
    for words in (
        "a <run>",
        "all 40 steps done",
        "2 x cpu cpu",
        "13 in 2 arrays",
        "0123456789ab with changes that are not committed",
        "--config <a&b>.py",
        "measure step 20 step 40 val/mean/box 0.2 0.4",
        "cats coco cats.json 12",
        "1,234 samples read so far, by the first of 2 processes",
        "samples skipped truncated image 3 cats/<9>.jpg: too short",
        "25 nan inf cats/7.jpg",
        "20 train.num_steps 20 40",
        "Steps 20, 30, 40.",
        "Damaged, and put aside in checkpoints_damaged: 30.",
        "a/kernel (3, 4) [-, fsdp] 6",
    ):
        assert words in page.text, words
    # The first and the last evaluation's.
    assert len(page.pictures) == 2
    assert page.tags.count("svg") >= 3
    assert "could not be read" not in page.text


def test_a_run_that_is_going_on_and_half_broken_has_a_page(run: Path) -> None:
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 50, "tra')
    (run / "data.json").write_text("[1")
    (run / "config_until_step_20.json").write_text("")
    (run / "parameters.txt").unlink()
    (run / "pictures" / "40" / ".x.png.unfinished").touch()
    config = json.loads((run / "config.json").read_text())
    config["train"]["num_steps"] = 100
    (run / "config.json").write_text(json.dumps(config))
    page = Page(report_html(read_run(run)))
    assert "40 of 100 steps done; last heard of at " in page.text
    for words in (
        "metrics.jsonl: 1 lines are cut off or garbled, and left out",
        "data.json is no JSON object",
        "parameters.txt is missing",
    ):
        assert words in page.text, words


@pytest.mark.parametrize("files", [(), ("metrics.jsonl",), ("config.json",), ("starts.jsonl",)])
def test_little_is_enough_and_nothing_is_too_little(run: Path, files: tuple[str, ...]) -> None:
    for path in run.iterdir():
        if path.is_file() and path.name not in files:
            path.unlink()
        elif path.is_dir():
            path.rename(run.parent / path.name)
    if files:
        assert Page(report_html(read_run(run))).tags.count("h1") == 1
    else:
        with pytest.raises(RunReportError, match=r"has no metrics\.jsonl"):
            read_run(run)


def test_the_command_writes_the_page(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0, result.output
    assert re.search(r"wrote .*report.html", " ".join(result.output.split()))
    page = (run / "report.html").read_text()
    assert page == report_html(read_run(run))
    out = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["report", str(run), "--out", str(out)]).exit_code == 0
    assert out.exists()
