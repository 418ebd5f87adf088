"""A folder of pictures: what is written, what is skipped, and that a stop loses nothing."""

import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from pycocotools.coco import COCO

from sam_jax.data.sources.sa1b import Sa1bSource
from sam_jax.errors import ConfigError
from sam_jax.inference import folder, folder_extras
from sam_jax.inference.automatic import AutomaticOptions
from sam_jax.inference.folder_extras import overlay_of
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.models.sam import Sam
from sam_jax.places import PlaceError
from sam_jax.weights.files import WeightsError
from tests.golden.tiny import SHALLOW, random_variables

OPTIONS = AutomaticOptions(
    points_per_side=2,
    points_per_batch=4,
    pred_iou_thresh=0.0,
    stability_score_thresh=0.0,
    box_nms_thresh=1.0,
)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(Sam(SHALLOW), random_variables(SHALLOW), Buckets((1,), (1,), (4,), (1,)))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    source = tmp_path / "pictures"
    (source / "more").mkdir(parents=True)
    for name, size in (("b.jpg", (30, 40)), ("a.png", (20, 24)), ("more/c.JPEG", (9, 50))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(source / name)
    (source / "notes.txt").write_text("no picture")
    return source


# pycocotools decodes in a way that numpy 2 warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_files_are_sa1bs_and_cocos(predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reports: list[folder.Progress] = []
    summary = folder.annotate_folder(
        predictor,
        pictures,
        out,
        OPTIONS,
        coco=True,
        label_maps=True,
        link_pictures=True,
        on_progress=reports.append,
    )
    assert (summary.num_annotated, summary.num_before, summary.num_masks) == (3, 0, 36)
    assert [(report.done, report.total) for report in reports] == [(1, 3), (2, 3), (3, 3)]
    content = json.loads((out / "annotations" / "more" / "c.json").read_text())
    image = content["image"]
    assert (image["width"], image["height"], image["file_name"]) == (50, 9, "more/c.JPEG")
    assert 0 < image["image_id"] < 2**53
    assert [a["id"] for a in content["annotations"]] == list(range(12))

    # SA-1B's own reader takes the linked pairs.
    source = Sa1bSource(out / "annotations")
    assert len(source) == 3
    assert [len(source[index].masks_rle) for index in range(3)] == [12, 12, 12]
    assert Image.open(io.BytesIO(source[0].image)).size == (24, 20)

    coco = COCO(out / "coco.json")
    assert len(coco.imgs) == 3
    assert len(coco.anns) == 36
    assert sorted(coco.anns) == list(range(1, 37))
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.sum() == annotation["area"]
        if mask.any():
            assert mask.any(axis=0).sum() <= annotation["bbox"][2]
            rows = np.flatnonzero(mask.any(axis=1))
            assert rows[-1] - rows[0] + 1 == annotation["bbox"][3]

    with Image.open(out / "overlays" / "b.png") as overlay:
        assert overlay.size == (40, 30)
    labels = np.asarray(Image.open(out / "labels" / "b.png"))
    assert labels.max() <= 12
    assert len(np.unique(labels)) > 2


def test_a_stopped_call_goes_on(predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(progress: folder.Progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.annotate_folder(predictor, pictures, out, OPTIONS, on_progress=stop)
    done = {path: path.stat().st_mtime_ns for path in out.rglob("annotations/**/*.json")}
    assert len(done) == 2
    summary = folder.annotate_folder(predictor, pictures, out, OPTIONS)
    assert (summary.num_annotated, summary.num_before) == (1, 2)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    straight = tmp_path / "straight"
    folder.annotate_folder(predictor, pictures, straight, OPTIONS)
    for path in straight.rglob("*.json"):
        assert (out / path.relative_to(straight)).read_text() == path.read_text()


def test_what_is_asked_for_later_is_made_of_the_masks_that_are_there(
    predictor: Predictor, pictures: Path, tmp_path: Path
) -> None:
    """Bit for bit as in one call, but for a picture that is gone by then; nothing is searched."""
    once, later = tmp_path / "once", tmp_path / "later"
    extras = {"label_maps": True, "link_pictures": True}
    folder.annotate_folder(predictor, pictures, once, OPTIONS, **extras)
    folder.annotate_folder(predictor, pictures, later, OPTIONS, overlays=False)
    assert not (later / "overlays").exists()
    summary = folder.annotate_folder(predictor, pictures, later, OPTIONS, **extras)
    found = (summary.num_annotated, summary.num_before, summary.num_completed, summary.skipped)
    assert found == (0, 3, 3, [])
    for path in once.rglob("*"):
        if path.is_file():
            assert (later / path.relative_to(once)).read_bytes() == path.read_bytes(), path
    assert folder.annotate_folder(predictor, pictures, later, OPTIONS, **extras).num_completed == 0


def test_masks_of_another_picture_of_that_name_stay(
    predictor: Predictor, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with Image.open(pictures / "a.png") as picture:
        picture.save(pictures / "a.jpg")
    folder.annotate_folder(predictor, pictures / "a.png", out, OPTIONS)
    with pytest.raises(ConfigError, match=r"a\.json has the masks of .*png, which those of .*jpg"):
        folder.annotate_folder(predictor, pictures / "a.jpg", out, OPTIONS)
    content = json.loads((out / "annotations" / "a.json").read_text())
    assert content["image"]["file_name"] == "a.png"


def test_damaged_pictures_are_skipped_and_named(
    predictor: Predictor, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "0.jpg").write_bytes(b"nothing")
    (pictures / "z.png").write_bytes((pictures / "a.png").read_bytes()[:200])
    # What Pillow answers with a ValueError.
    note = PngImagePlugin.PngInfo()
    note.add_text("note", "x" * 3 * 2**20, zip=True)
    Image.new("RGB", (8, 8)).save(pictures / "y.png", pnginfo=note)
    out = tmp_path / "out"
    summary = folder.annotate_folder(predictor, pictures, out, OPTIONS, overlays=False)
    assert summary.num_annotated == 3
    assert len(summary.skipped) == 3
    listed = (out / "skipped.txt").read_text().splitlines()
    assert "0.jpg is damaged or no picture" in listed[0]
    assert "y.png is damaged or no picture" in listed[1]
    assert "z.png is damaged or no picture" in listed[2]
    assert not (out / "overlays").exists()
    # Mended, they are done the next time.
    for name in ("0.jpg", "y.png", "z.png"):
        Image.new("RGB", (8, 8)).save(pictures / name)
    summary = folder.annotate_folder(predictor, pictures, out, OPTIONS, overlays=False)
    assert (summary.num_annotated, summary.num_before, summary.skipped) == (3, 3, [])
    assert not (out / "skipped.txt").exists()


def test_masks_made_otherwise_are_not_mixed(
    predictor: Predictor, pictures: Path, tmp_path: Path
) -> None:
    import dataclasses

    out = tmp_path / "out"
    folder.annotate_folder(predictor, pictures, out, OPTIONS)
    # How much is done at once changes no mask.
    larger = dataclasses.replace(OPTIONS, points_per_batch=2)
    folder.annotate_folder(predictor, pictures, out, larger)
    other = dataclasses.replace(OPTIONS, box_nms_thresh=0.5)
    with pytest.raises(ConfigError, match=r"box_nms_thresh was 1\.0, is 0\.5"):
        folder.annotate_folder(predictor, pictures, out, other)
    weights = Predictor(
        Sam(SHALLOW), random_variables(SHALLOW, seed=1), Buckets((1,), (1,), (4,), (1,))
    )
    with pytest.raises(ConfigError, match="weights was"):
        folder.annotate_folder(weights, pictures, out, OPTIONS)
    with pytest.raises(ConfigError, match="source was"):
        folder.annotate_folder(predictor, pictures / "more", out, OPTIONS)
    for damaged in ("{", "[]"):
        (out / "settings.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"settings\.json is damaged"):
            folder.annotate_folder(predictor, pictures, out, OPTIONS)


def test_folders_that_cannot_be(predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        folder.list_pictures(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty holds no picture"):
        folder.list_pictures(tmp_path / "empty")
    with pytest.raises(ConfigError, match="whose pictures are read"):
        folder.annotate_folder(predictor, pictures, pictures / "out", OPTIONS)
    inside = tmp_path / "out" / "overlays"
    (tmp_path / "out").mkdir()
    pictures.rename(inside)
    for source in (inside, inside / "a.png"):
        with pytest.raises(ConfigError, match="which is written to"):
            folder.annotate_folder(predictor, source, tmp_path / "out", OPTIONS)
    inside.rename(pictures)
    Image.new("RGB", (8, 8)).save(pictures / "a.jpg")
    with pytest.raises(ConfigError, match="would share one annotation file"):
        folder.list_pictures(pictures)


def test_overlays_of_large_pictures_are_reduced() -> None:
    pixels = np.zeros((100, 3200, 3), np.uint8)
    record = {"segmentation": {"size": [100, 3200], "counts": [0, 160_000, 160_000]}, "area": 1}
    drawn = overlay_of(pixels, [record])
    assert drawn.shape == (50, 1600, 3)
    assert drawn[:, :780].any()
    assert not drawn[:, 820:].any()


def files_below(path: Path) -> Iterator[Path]:
    return (p for p in path.rglob("*") if p.is_file())


def test_nothing_half_written_is_left(
    predictor: Predictor, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    folder.annotate_folder(predictor, pictures / "a.png", out, OPTIONS, overlays=False)
    before = set(files_below(out))
    monkeypatch.setattr(folder.json, "dumps", fail)
    with pytest.raises(WeightsError, match="No space left on device"):
        folder.annotate_folder(predictor, pictures / "b.jpg", out, OPTIONS, overlays=False)
    assert set(files_below(out)) == before


def test_pictures_that_are_stored_turned_are_put_beside_their_masks_upright(
    predictor: Predictor, tmp_path: Path
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    Image.fromarray(pixels).save(source / "turned.jpg", exif=exif)
    folder.annotate_folder(predictor, source, out, OPTIONS, link_pictures=True)
    content = json.loads((out / "annotations" / "turned.json").read_text())
    assert (content["image"]["height"], content["image"]["width"]) == (40, 20)
    assert content["annotations"][0]["segmentation"]["size"] == [40, 20]
    with Image.open(out / "annotations" / "turned.jpg") as beside:
        assert beside.size == (20, 40)
        assert beside.getexif().get(0x0112, 1) == 1


def test_only_whole_files_of_the_same_picture_are_done(
    predictor: Predictor, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    folder.annotate_folder(predictor, pictures, out, OPTIONS)
    (out / "annotations" / "b.json").write_text("")
    with Image.open(pictures / "a.png") as picture:
        picture.save(pictures / "a.jpg")
    (pictures / "a.png").unlink()
    summary = folder.annotate_folder(predictor, pictures, out, OPTIONS)
    assert (summary.num_annotated, summary.num_before) == (2, 1)
    content = json.loads((out / "annotations" / "a.json").read_text())
    assert content["image"]["file_name"] == "a.jpg"


def test_linked_folders_are_followed_once(
    predictor: Predictor, pictures: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (8, 8)).save(elsewhere / "d.png")
    (pictures / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(pictures)
    names = [str(path.relative_to(pictures)) for path in folder.list_pictures(pictures)]
    assert names == ["a.png", "b.jpg", "link/d.png", "more/c.JPEG"]


def test_hidden_files_are_no_pictures(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [str(path) for path in folder.list_pictures(pictures)]
    for name in ("._a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/more/._c.JPEG"):
        path = pictures / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no picture")
    assert [str(path) for path in folder.list_pictures(pictures)] == names
    assert "3 hidden files left out" in caplog.text
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "._a.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds no picture .* but 1 hidden files such as"):
        folder.list_pictures(tmp_path / "empty")


def test_names_as_long_as_names_can_be(
    predictor: Predictor, pictures: Path, tmp_path: Path
) -> None:
    """80 Chinese characters; and a picture's 255 bytes, which are 256 for its JSON."""
    fits = ["猫" * 80 + ".jpg", "x" * 244 + ".jpg", "x" * 250 + ".jpg"]
    too_long = ["y" * 251 + ".jpg"]
    for name in fits + too_long:
        Image.new("RGB", (8, 8)).save(pictures / name)
    Image.new("RGB", (8, 8)).save(pictures / "more" / ("z" * 250 + ".webp"))
    everything = {"coco": True, "label_maps": True, "link_pictures": True}
    for num_annotated, num_before in ((7, 0), (0, 7)):
        summary = folder.annotate_folder(
            predictor, pictures, tmp_path / "out", OPTIONS, **everything
        )
        assert (summary.num_annotated, summary.num_before) == (num_annotated, num_before)
        (skipped,) = summary.skipped
        assert too_long[0] in skipped
        assert "File name too long" in skipped
    assert (tmp_path / "out" / "skipped.txt").read_text().strip() == skipped
    assert not list((tmp_path / "out").rglob(".*"))


def test_one_bad_file_stops_no_folder(
    predictor: Predictor, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (pictures / "dangling.jpg").symlink_to(tmp_path / "nothing")
    (pictures / "loop.jpg").symlink_to(pictures / "loop.jpg")
    # Where the masks of a picture belong there is something else.
    (out / "annotations" / "a.json" / "x").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(pictures / "locked.png")
    read_bytes = Path.read_bytes

    def locked(path: Path) -> bytes:
        if path.name == "locked.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", locked)
    summary = folder.annotate_folder(predictor, pictures, out, OPTIONS, coco=True)
    assert summary.num_annotated == 2
    assert len(summary.skipped) == 4
    reasons = (out / "skipped.txt").read_text()
    for words in (
        "a.json: Is a directory",
        "dangling.jpg does not exist",
        "loop.jpg",
        "locked.png cannot be read: Permission denied",
    ):
        assert words in reasons


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_target_that_takes_no_more_ends_it(
    predictor: Predictor,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    def save(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder_extras, "save_picture", save)
    with pytest.raises(WeightsError, match=f"could not write .*: {os.strerror(code)}"):
        folder.annotate_folder(predictor, pictures, tmp_path / "out", OPTIONS)
    assert not list((tmp_path / "out").rglob("annotations/**/*.json"))


@pytest.mark.parametrize("place", ["file", "file/below", "out"])
def test_a_target_that_cannot_be_is_refused(pictures: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "overlays").touch()
    with pytest.raises(PlaceError):
        folder.check_target(pictures, tmp_path / place)
