"""The comparison of ways to fine-tune: parts of data sets, what runs say, rows that are kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import finetuning
from benchmarks.finetuning import Row, measured, subset

SAID = """
4.06 M of 9.8 M parameters are trained (4,058,340) on 2 cpu device(s) of 1
process(es), data 2 x fsdp 1 x tensor 1
step 10/30  loss 3.10  IoU 0.600 first, 0.700 last round  0.5 img/s  3.0 masks/s  input wait 90 %
step 20/30  loss 2.10  IoU 0.700 first, 0.800 last round  4.0 img/s
 30.0 masks/s  input wait 1 %
step 30/30  loss 2.00  IoU 0.700 first, 0.800 last round  5.0 img/s  30.0 masks/s  input wait 1 %
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five images, of which the first has no mask."""
    folder = tmp_path / "birds"
    (folder / "images").mkdir(parents=True)
    content = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(5)],
        "annotations": [{"id": 2 * n + k, "image_id": n} for n in range(1, 5) for k in range(2)],
    }
    (folder / "train.json").write_text(json.dumps(content))
    (folder / "val.json").write_text("{}")
    return folder


def test_few_images_are_among_the_many(data: Path, tmp_path: Path) -> None:
    chosen = []
    for count in (2, 3):
        part, num_images = subset(data, count, tmp_path / "parts", seed=0)
        content = json.loads((part / "train.json").read_text())
        ids = {image["id"] for image in content["images"]}
        assert len(ids) == num_images == count
        assert 0 not in ids
        assert {a["image_id"] for a in content["annotations"]} == ids
        assert len(content["annotations"]) == 2 * count
        assert (part / "images").resolve() == (data / "images").resolve()
        assert (part / "val.json").read_text() == "{}"
        chosen.append(ids)
    assert chosen[0] < chosen[1]
    assert subset(data, None, tmp_path / "parts", seed=0) == (data, 4)
    assert subset(data, 9, tmp_path / "parts", seed=0) == (data, 4)


def test_what_a_run_says_becomes_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "_run", lambda command: (SAID, 2**30))
    found = measured(["train.py"], num_images=9)
    assert found["num_trained"] == 4_058_340
    assert found["seconds_per_epoch"] == pytest.approx(9 / 4.5)
    assert found["peak_bytes"] == 2**30
    assert found["is_whole"]
    whole = SAID.replace("4.06 M of 9.8 M parameters are trained (4,058,340)", "9.8 M parameters")
    monkeypatch.setattr(finetuning, "_run", lambda command: (f"continuing from {whole}", 0))
    found = measured(["train.py"], num_images=9)
    assert found["num_trained"] == pytest.approx(9.8e6)
    assert not found["is_whole"]


def test_rows_with_a_record_are_not_run_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    commands = []

    def run(command: list[str]) -> tuple[str, int]:
        commands.append(command)
        if command[0] == "eval.py":
            (out,) = (Path(part.removeprefix("--out=")) for part in command if "--out=" in part)
            (out / "val").mkdir(parents=True)
            figures = {"center_1": 0.5, "center_3": 0.6, "box": 0.7}
            (out / "val" / "report.json").write_text(json.dumps({"mean": figures}))
        return SAID, 2**30

    monkeypatch.setattr(finetuning, "_run", run)
    folder = tmp_path / "runs"
    arguments = ["--weights", "W", "--data", str(data), "--folder", str(folder)]
    options = ["--num-images", "2", "all", "--methods", "decoder", "full"]
    records = finetuning.main([*arguments, *options])
    assert [(r["method"], r["num_images"]) for r in records] == [
        ("before", 4),
        ("decoder", 2),
        ("full", 2),
        ("decoder", 4),
        ("full", 4),
    ]
    assert [command[0] for command in commands] == ["eval.py", *["train.py", "eval.py"] * 4]
    assert "checkpoint=W" in " ".join(commands[0])
    assert f"embedding_cache={folder / 'embeddings'}" in " ".join(commands[1])
    assert "embedding_cache" not in " ".join(commands[3])
    assert "50.0" in capsys.readouterr().out
    commands.clear()
    (folder / f"{Row(data, 'full', 2).name}.json").unlink()
    (folder / f"{Row(data, 'full', 2).name}-eval" / "val" / "report.json").unlink()
    (folder / f"{Row(data, 'full', 2).name}-eval" / "val").rmdir()
    assert finetuning.main([*arguments, *options])[0] == records[0]
    assert [command[0] for command in commands] == ["train.py", "eval.py"]
    assert len((folder / "table.md").read_text().splitlines()) == 2 + 5
