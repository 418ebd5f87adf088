"""A folder with a picture of every oddity: masked, trained on, evaluated, and masked again.

Each picture is annotated or skipped with a reason, and each that is annotated is used by training
and evaluation or counted with a reason.
"""

import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sam_jax import cli
from sam_jax.data.config import SourceConfig
from sam_jax.data.pipeline import DataConfig, train_iterator
from sam_jax.evaluation.prompted import EvalConfig, PromptedMasks
from sam_jax.evaluation.report import DatasetReport
from sam_jax.evaluation.run import Evaluator
from sam_jax.model_config import ModelConfig, build_model
from sam_jax.weights.load import save, variables_for
from tests.e2e import programs, tiny_run
from tests.e2e.test_pictures import oddities
from tests.golden.tiny import random_variables
from tests.unit.test_images import DEEP, KINDS, RGB, of_mode, saved

PLAIN = Image.fromarray(RGB)
NAMES = (
    "with space.jpg",
    "br[1]ackets (2) {3} *.png",
    "猫" * 80 + ".jpg",
    "x" * 240 + ".png",
    "caf\u00e9.png",
    "cafe\u0301 too.png",
    "100%25 #1 &.jpg",
    "back\\slash.png",
    "UPPER.PNG",
    "Sub.Dir v1.0/CAMERA.JPEG",
)
BROKEN = {
    "truncated.jpg": "truncated",
    "empty.png": "it is empty",
    "page.jpg": "it is an HTML page",
    "pointer.png": "it is a Git LFS pointer",
    "dangling.webp": "does not exist",
}
HIDDEN = ("._cat.png", ".ipynb_checkpoints/cat.png", "__MACOSX/._cat.png", "Sub.Dir v1.0/.x.jpg")
WORKDIR = "runs/lr=[1e-3] (1)"


def animation() -> bytes:
    file = io.BytesIO()
    PLAIN.save(file, "GIF", save_all=True, append_images=[PLAIN.rotate(90)])
    return file.getvalue()


def write_pictures(folder: Path) -> None:
    contents = oddities() | {
        "grey_and_alpha.png": saved(of_mode("LA"), "PNG"),
        "float.tif": saved(Image.fromarray(DEEP[..., 0].astype(np.float32)), "TIFF"),
        "black.png": saved(Image.new("RGB", (90, 70)), "PNG"),
        "several frames.gif": animation(),
        "truncated.jpg": saved(PLAIN, "JPEG")[:-400],
        "empty.png": b"",
        "page.jpg": b"<!DOCTYPE html><html><title>404</title></html>",
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "notes.txt": b"no picture",
    }
    if "AVIF" in KINDS:
        contents["avif_inside.jpg"] = saved(PLAIN, "AVIF")
    contents |= dict.fromkeys((*NAMES, *HIDDEN), saved(PLAIN, "PNG"))
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "dangling.webp").symlink_to(folder / "gone.webp")


def write_config(path: Path, sources: list[dict[str, str]]) -> Path:
    """The tiny config on these sources."""
    path.write_text(
        f"""
from tests.e2e import tiny_run


def get_config():
    config = tiny_run.get_config()
    config.data["sources"] = {tuple(sources)!r}
    # A model of no training takes the whole picture for an object.
    config.data["max_area_rate"] = 1.0
    config.train["eval_every"] = 0
    return config
""",
        encoding="utf-8",
    )
    return path


def check_training(source: dict[str, str], num_annotated: int) -> None:
    """All samples of an epoch are trained on, or counted with a reason."""
    config = DataConfig(
        sources=(SourceConfig.from_dict(source),),
        image_size=(32, 48),
        batch_size=1,
        num_threads=0,
        prefetch_batches=0,
        max_area_rate=1.0,
    )
    batches = train_iterator(config)
    num_used = 0
    while batches.num_seen < num_annotated:
        next(batches)
        num_used += 1
    num_skipped = sum(batches.without_object_counts.values())
    assert not batches.corrupt_counts
    assert num_used + num_skipped == batches.num_seen
    batches.close()


def check_evaluation(found: DatasetReport, source: dict[str, str], num_annotated: int) -> None:
    """All samples are evaluated on, or counted with a reason; what was decided is said."""
    skipped = found.skipped
    left_out = [n for reason, n in skipped.items() if reason.startswith("images")]
    assert found.num_images + sum(left_out) == num_annotated
    assert found.num_images > num_annotated / 2
    assert not any("images (" in reason or "missing" in reason for reason in skipped)
    assert skipped["remarks (the first of several frames or pages)"] == 1
    turned = [n for reason, n in skipped.items() if "turned upright; EXIF turns it" in reason]
    # Copies beside the masks are upright; of originals, two in each orientation that keeps sides.
    assert turned == ([] if source["kind"] == "sa1b" else [10])


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_is_silent(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pictures = tmp_path / "photos [1]"
    write_pictures(pictures)
    model = build_model(ModelConfig(**tiny_run.get_config().model.to_dict()))
    save(tmp_path / "first", model.config, random_variables(model.config), "orbax")

    def masks(checkpoint: Path, out: Path) -> tuple[str, set[str]]:
        """Output of `sam-jax masks`, and the pictures that it has annotated."""
        options = ["points_per_batch=4", "box_nms_thresh=1.0", "regions_per_batch=1"]
        arguments = ["masks", pictures, "--checkpoint", checkpoint, "--out", out, "--coco"]
        arguments += ["--link-pictures", "--no-overlays", "--points-per-side", 1]
        arguments += ["--pred-iou-thresh", 0, "--stability-score-thresh", 0]
        for option in options:
            arguments += ["--option", option]
        monkeypatch.setattr("sys.argv", ["sam-jax", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = "".join(capfd.readouterr())
        assert not end.value.code, said
        coco = json.loads((out / "coco.json").read_text())
        return said, {image["file_name"] for image in coco["images"]}

    def check_skipped(out: Path) -> None:
        lines = (out / "skipped.txt").read_text().splitlines()
        assert len(lines) == len(BROKEN)
        for name, reason in BROKEN.items():
            (line,) = (line for line in lines if f"/{name} " in line)
            assert reason in line

    out = tmp_path / "out [2]"
    said, annotated = masks(tmp_path / "first", out)
    everything = {str(p.relative_to(pictures)) for p in pictures.rglob("*") if not p.is_dir()}
    assert annotated == everything - {*BROKEN, *HIDDEN, "notes.txt"}
    assert set(NAMES) < annotated
    assert f"{len(HIDDEN)} hidden files left out" in caplog.text
    assert f"of {len(annotated)} pictures" in said
    assert f"{len(BROKEN)} skipped" in said
    check_skipped(out)

    linked = {"kind": "sa1b", "path": str(out / "annotations"), "name": "linked"}
    originals = {"kind": "coco", "path": str(out / "coco.json"), "images": str(pictures)}
    sources = [linked, originals | {"name": "originals"}]
    config, run = write_config(tmp_path / "config.py", sources), tmp_path / WORKDIR
    for source in sources:
        check_training(source, len(annotated))
    rare = ("--config.checkpoint.every_steps=1000", "--config.train.ema_decay=0.0")
    flags = ("--workdir", str(run), *rare, *programs.ONE_ROUND)
    said = programs.run("train.py", *flags, config=config)
    assert "step 10/10" in said
    # What eval.py calls.
    evaluate = Evaluator(
        model,
        PromptedMasks(EvalConfig(tuple(sources), ("box",), num_clicks=(1,), num_examples=0)),
        devices=jax.devices()[:1],
    )
    report = evaluate(variables_for(model, run))
    for source, found in zip(sources, report.datasets, strict=True):
        check_evaluation(found, source, len(annotated))

    _, again = masks(run, tmp_path / "out again")
    assert again == annotated
    check_skipped(tmp_path / "out again")
