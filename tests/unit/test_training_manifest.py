"""What a run's folder says of itself."""

import importlib.metadata
import json
import logging
import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from sam_jax.data.config import DataConfig, SourceConfig
from sam_jax.data.corruption import _MOST_NAMES
from sam_jax.data.pipeline import TrainIterator, train_iterator
from sam_jax.training import manifest
from sam_jax.training.experiment import Experiment, read_config
from sam_jax.training.manifest import commit_of
from tests.e2e.tiny_run import ONE_LAYER
from tests.unit.data_fixtures import write_coco

TINY = str(Path(__file__).parents[1] / "e2e" / "tiny_run.py")


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_of_code(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "First")
    found = {"hash": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    assert commit_of(tmp_path) == found
    (tmp_path / "notes.txt").write_text("not of the code")
    assert commit_of(tmp_path) == found
    (tmp_path / "code.py").write_text("a = 2\n")
    assert commit_of(tmp_path) == found | {"dirty": True}
    # Installed inside of somebody else's repository.
    (tmp_path / "site-packages").mkdir()
    assert commit_of(tmp_path / "site-packages") is None


def test_a_start_says_what_ran_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Experiment.of(read_config(TINY, ONE_LAYER)).compiled_step(jax.devices()[:2])
    installed = [
        SimpleNamespace(metadata={"Name": name}, version="1.2")
        for name in ("nvidia-cudnn-cu12", "jax-cuda12-plugin", "libtpu", "requests")
    ]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: installed)
    monkeypatch.setattr(manifest, "_DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text("NVRM version: 570.1\nGCC version: 12\n")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--a=b")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for first_step in (0, 7):
        manifest.write_start(tmp_path, program, first_step)
    first, second = map(json.loads, (tmp_path / manifest.STARTS).read_text().splitlines())
    assert (first["after_step"], second["after_step"]) == (0, 7)
    versions = first["versions"]
    assert versions["jax"] == jax.__version__
    assert versions["python"] == platform.python_version()
    assert {versions[name] for name in ("nvidia-cudnn-cu12", "libtpu")} == {"1.2"}
    assert "requests" not in versions
    assert versions["driver"] == "NVRM version: 570.1"
    assert versions["platform"] == jax.devices()[0].client.platform_version
    assert first["environment"]["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=true"
    assert first["environment"]["LIBTPU_INIT_ARGS"] == "--a=b"
    assert "secret" not in json.dumps(first)
    assert first["hosts"] == [platform.node()]
    assert (len(first["devices"]), first["mesh"]["data"]) == (2, 2)


def opened(path: Path, **options: Any) -> TrainIterator:
    return train_iterator(
        DataConfig(
            sources=(SourceConfig("coco", str(path)), SourceConfig("synthetic", num_images=2)),
            image_size=(16, 24),
            batch_size=2,
            max_masks=2,
            **options,
        )
    )


def written(folder: Path, iterator: TrainIterator) -> dict[str, Any]:
    manifest.write_data(folder, iterator)
    return json.loads((folder / manifest.DATA).read_text())


def test_other_data_are_noticed_when_a_run_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_coco(tmp_path / "coco", 3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            first = written(tmp_path, opened(path))
    assert not caplog.records
    coco, synthetic = first["sources"]
    assert (coco["num_samples"], synthetic["num_samples"]) == (3, 2)
    assert coco["files"]["num_files"] >= 1
    assert "files" not in synthetic
    assert not (tmp_path / manifest.SKIPPED_SAMPLES).exists()

    # An annotation is corrected, an image added.
    path.write_text(path.read_text() + "  ")
    with caplog.at_level(logging.WARNING):
        changed = written(tmp_path, opened(path))
    (record,) = caplog.records
    assert "source coco" in record.getMessage()
    assert coco["files"]["digest"] in record.getMessage()
    assert changed["sources"][0]["files"]["digest"] in record.getMessage()
    (before,) = (tmp_path / manifest.DATA_BEFORE).read_text().splitlines()
    assert json.loads(before) == first
    # Other options are the config's to say, and runs of earlier versions knew no files.
    now = {"sources": [coco]}
    assert manifest.data_changes({"sources": [coco | {"weight": 2.0}]}, now) == []
    assert manifest.data_changes({"sources": [coco | {"files": coco["files"]}]}, now) == []
    bare = {key: value for key, value in coco.items() if key != "files"}
    assert manifest.data_changes({"sources": [bare]}, now) == []
    (line,) = manifest.data_changes({"sources": [bare | {"num_samples": 4}]}, now)
    assert "4 samples there, 3 samples in files" in line


def test_skipped_samples_are_named(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "coco", 3)
    content = json.loads(path.read_text())
    gone = content["images"][1]["file_name"]
    next(path.parent.rglob(gone)).unlink()
    iterator = opened(path, max_corrupt_rate=0.9, num_threads=1)
    for _ in range(12):
        next(iterator)
    manifest.write_data(tmp_path, iterator)
    skipped = json.loads((tmp_path / manifest.SKIPPED_SAMPLES).read_text())
    (found,) = skipped.values()
    assert found["count"] > 1
    assert found["count_of_others"] == 0
    ((name, count),) = found["samples"].items()
    assert gone in name
    assert count == found["count"]
    # A run that is continued counts on, and so does one with another number of processes.
    state = json.loads(json.dumps(iterator.get_state()))
    other = opened(path, max_corrupt_rate=0.9)
    other.set_states([state, state])
    twice = other.skipped_samples([other.get_state()])
    assert [value["samples"][name] for value in twice.values()] == [2 * count]
    iterator.close()
    other.close()


def test_the_names_of_skipped_samples_have_an_end(tmp_path: Path) -> None:
    iterator = opened(write_coco(tmp_path / "coco", 1))
    state = iterator.get_state()["skipped"]
    names = {f"{number}.jpg": 2 for number in range(_MOST_NAMES + 5)}
    state |= {"corrupt_counts": {"gone": 2 * len(names)}, "skipped_names": {"gone": names}}
    told = iterator.skipped_samples([{"skipped": state}])["gone"]
    assert len(told["samples"]) == _MOST_NAMES
    assert (told["count"], told["count_of_others"]) == (2 * len(names), 10)
