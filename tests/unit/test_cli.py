"""The console script as a user meets it: what it prints, what it leaves, how it fails."""

import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_jax import cli
from sam_jax.visualize import picture_form
from sam_jax.weights.files import write_safetensors
from sam_jax.weights.load import save
from sam_jax.weights.names import from_native
from tests.golden.tiny import SHALLOW, random_variables

SQUARE = dataclasses.replace(
    SHALLOW, image_encoder=dataclasses.replace(SHALLOW.image_encoder, image_size=(48, 48))
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    save(folder, SQUARE, random_variables(SQUARE), "orbax")
    return folder


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def sam_jax(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["sam-jax", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capfd.readouterr()
        return Outcome(int(end.value.code or 0), captured.out, captured.err)

    return call


def test_convert_and_inspect(sam_jax, run: Path, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    done = sam_jax("convert", run, target, "--to", "hugging-face")
    assert done.code == 0, done.err
    assert done.out.strip() == f"{target}: custom for 48 x 48 pixels, from orbax"
    shown = sam_jax("inspect", target, "--tensors")
    assert shown.code == 0, shown.err
    for words in ("hugging face", "custom", "48 x 48", "2 blocks of width 24", "float32", "yes"):
        assert words in shown.out
    assert "vision_encoder.pos_embed" in shown.out
    assert "1 x 12 x 12 x 24" in shown.out


def test_inspect_lists_what_is_wrong(sam_jax, tmp_path: Path) -> None:
    tensors = from_native(random_variables(SQUARE))
    del tensors["mask_decoder.iou_token.weight"]
    write_safetensors(tmp_path / "x.safetensors", tensors)
    shown = sam_jax("inspect", tmp_path / "x.safetensors", "--decoder-heads", 4)
    assert shown.code == 1
    assert "missing: mask_decoder.iou_token.weight" in shown.out


def test_export_stablehlo(sam_jax, run: Path, tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers", reason="needs requirements-torch.lock")
    done = sam_jax("export", run, tmp_path / "x", "--to", "stablehlo", "--platform", "cpu")
    assert done.code == 0, done.err
    assert "decoder.stablehlo" in done.out


def test_export_onnx(sam_jax, run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs requirements-torch.lock")
    done = sam_jax("export", run, tmp_path / "x", "--single-mask")
    assert done.code == 0, done.err
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "decoder.onnx",
        "encoder.onnx",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("convert", "no/such/file.pth", "x.pth"), "error: no/such/file.pth does not exist"),
        (("convert", "{run}", "x"), "say what it shall be with --to"),
        (("convert", "{run}", "x.bin", "--to", "official"), "x.bin must end in one of .pth"),
        (("inspect", "{run}", "--step", "9"), "has no checkpoint of step 9; it has [0]"),
        (("export", "{run}", "{run}"), "is there already; give a new or an empty folder"),
    ],
)
def test_errors_are_one_message(sam_jax, run: Path, arguments, words: str) -> None:
    done = sam_jax(*(str(argument).format(run=run) for argument in arguments))
    assert done.code == 1
    assert words in done.err
    assert "Traceback" not in done.err


def test_a_typo_is_answered(sam_jax) -> None:
    done = sam_jax("convrt")
    assert done.code == 2
    assert "convert" in done.err
    done = sam_jax("inspect", "x", "--stpe", "3")
    assert done.code == 2
    assert "--step" in done.err


def test_help_names_every_command(sam_jax) -> None:
    done = sam_jax("--help")
    assert done.code == 0
    for command in ("convert", "export", "inspect", "predict", "masks"):
        assert command in done.out


def test_predict(sam_jax, run: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.jpg")
    out, mask = tmp_path / "new" / "out.png", tmp_path / "mask.png"
    arguments = ("predict", tmp_path / "in.jpg", "--checkpoint", run, "--out", out)
    clicks = ("--points", "10,20", "--points", "3,4,0", "--box", "2,2,30,25")
    done = sam_jax(*arguments, *clicks, "--mask-out", mask)
    assert done.code == 0, done.err
    assert f"{out}: " in done.out
    with Image.open(out) as picture, Image.open(mask) as alone:
        assert picture.size == alone.size == (40, 30)
        assert set(np.unique(alone)) <= {0, 255}
    done = sam_jax(*arguments, "--points", "10")
    assert (done.code, done.out) == (1, "")
    assert "--points 10: expected 2 or 3 numbers" in done.err
    done = sam_jax(*arguments, "--points", "10,99")
    assert done.code == 1
    assert "point (10, 99) lies outside of the image" in done.err


def test_predict_writes_what_the_name_says(sam_jax, run: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    arguments = ("predict", tmp_path / "in.png", "--checkpoint", run, "--points", "10,20")
    seen, mask = tmp_path / "seen.JPG", tmp_path / "mask.webp"
    done = sam_jax(*arguments, "--out", seen, "--mask-out", mask)
    assert done.code == 0, done.err
    with Image.open(seen) as picture, Image.open(mask) as alone:
        assert (picture.format, alone.format) == ("JPEG", "WEBP")
        assert set(np.unique(alone)) <= {0, 255}
    for form, suffix in (("TIFF", "tif"), ("BMP", "bmp"), ("PNG", "png"), ("JPEG", "jpeg")):
        assert picture_form(tmp_path / f"x.{suffix}") == form


@pytest.mark.parametrize(
    ("out", "mask_out", "words"),
    [
        ("seen.xyz", None, "ends in '.xyz': expected one of .png, .jpg"),
        ("seen", None, "has no ending: expected"),
        ("in.png", None, "is the picture itself"),
        ("folder.png", None, "is a folder"),
        ("in.png/x.png", None, "Not a directory"),
        ("x.png", "mask.jpg", "expected one of .png, .webp"),
        ("x.png", "x.png", "are the same file"),
    ],
)
def test_places_are_checked_before_weights_are_read(
    sam_jax, tmp_path: Path, out: str, mask_out: str | None, words: str
) -> None:
    """There are no weights, which would be the first to be missed."""
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
    (tmp_path / "folder.png").mkdir()
    others = () if mask_out is None else ("--mask-out", tmp_path / mask_out)
    arguments = ("predict", tmp_path / "in.png", "--checkpoint", tmp_path / "no.pth")
    done = sam_jax(*arguments, "--points", "1,2", "--out", tmp_path / out, *others)
    assert (done.code, done.err.count("error: ")) == (1, 1)
    assert words in done.err.replace("\n", "")


@pytest.mark.parametrize(
    ("command", "options", "target", "words"),
    [
        ("convert", ("--to", "orbax"), "a\\b", "the backslash for a slash"),
        ("convert", ("--to", "orbax"), "file/x", "Not a directory"),
        ("convert", ("--to", "hugging-face"), "x" * 256, "File name too long"),
        ("convert", (), "x" * 300 + ".pth", "File name too long"),
        ("convert", (), "file/x.pth", "Not a directory"),
        ("export", (), "file", "is there already"),
        ("export", (), "full", "is there already"),
        ("export", ("--to", "stablehlo"), "file/x", "Not a directory"),
    ],
)
def test_targets_are_checked_before_weights_are_read(
    sam_jax, tmp_path: Path, command: str, options: tuple[str, ...], target: str, words: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    done = sam_jax(command, tmp_path / "no.pth", tmp_path / target, *options)
    assert done.code == 1
    assert words in done.err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "precious"]


def test_converted_runs_may_be_called_anything(sam_jax, run: Path, tmp_path: Path) -> None:
    target = tmp_path / "runs [1]" / "lr=[1e-3]*"
    done = sam_jax("convert", run, target, "--to", "orbax")
    assert done.code == 0, done.err
    assert sam_jax("inspect", target).code == 0


def test_masks_of_names_that_are_no_letters(sam_jax, run: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    for name, data in ((b"\xff.png", content.getvalue()), (b"\xfe.png", b"broken")):
        (source / os.fsdecode(name)).write_bytes(data)
    arguments = ("masks", source, "--checkpoint", run, "--points-per-side", 1, "--coco")
    done = sam_jax(*arguments, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "\\xff.png: " in done.err
    assert "1 skipped" in done.err


def test_masks(sam_jax, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    Image.fromarray(pixels).save(source / "one.jpg")
    (source / "two.jpg").write_bytes(b"broken")
    arguments = ("masks", source, "--checkpoint", run, "--out", out, "--points-per-side", 2)
    options = ("--pred-iou-thresh", 0, "--stability-score-thresh", 0)
    done = sam_jax(*arguments, *options, "--option", "points-per-batch=4", "--coco")
    assert done.code == 0, done.err
    assert f"{out}: " in done.out
    assert " masks of 1 pictures" in done.out
    assert "of 2  one.jpg: " in done.err
    assert "1 skipped, see" in done.err
    assert (out / "coco.json").exists()
    again = sam_jax(*arguments, *options)
    assert "0 masks of 0 pictures, 1 were there before" in again.out
    other = sam_jax(*arguments)
    assert other.code == 1
    assert "pred_iou_thresh was 0.0, is 0.88" in other.err
    for option, words in (
        ("box_nms_tresh=1", "did you mean box_nms_thresh?"),
        ("box_nms_thresh=high", "expected float"),
        ("tile_px=64.5", "expected int"),
        ("points-per-side=3", "points_per_side: given as an option of its own and by --option"),
    ):
        wrong = sam_jax(*arguments, "--option", option)
        assert (wrong.code, wrong.out) == (1, "")
        assert words in wrong.err
    nothing = sam_jax(*arguments[:5], tmp_path / "strict", "--points-per-side", 2)
    assert nothing.code == 0
    assert "no mask passed: pred_iou_thresh is 0.88" in nothing.err

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sam_jax.inference.folder.annotate_folder", stop)
    stopped = sam_jax(*arguments, *options)
    assert stopped.code == 130
    assert "the same command goes on" in stopped.err


def test_masks_of_boxes(sam_jax, run: Path, tmp_path: Path) -> None:
    source, out, boxes = tmp_path / "in", tmp_path / "out", tmp_path / "boxes.json"
    source.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(source / "one.jpg")
    box = {"xmin": 1, "ymin": 2, "xmax": 11, "ymax": 22}
    found = [{"score": score, "label": "cat", "box": box} for score in (0.2, 0.7)]
    boxes.write_text(json.dumps({"one.jpg": found, "two.jpg": found}))
    arguments = ("masks", source, "--checkpoint", run, "--out", out, "--boxes", boxes)
    done = sam_jax(*arguments, "--min-score", 0.5, "--refine", "--coco")
    assert done.code == 0, done.err
    assert f"{out}: 1 masks of 1 pictures" in done.out
    assert "2 of 4 boxes have a score below 0.5" in done.err
    assert "1 boxes of file_name 'two.jpg', which is none of the pictures" in done.err
    (category,) = json.loads((out / "coco.json").read_text())["categories"]
    assert category["name"] == "cat"
    for option, words in (
        (("--points-per-side", 2), "--boxes takes no options of the grid"),
        (("--preset", "sa1b"), "--boxes takes no options of the grid"),
    ):
        wrong = sam_jax(*arguments, *option)
        assert (wrong.code, wrong.out) == (1, "")
        assert words in wrong.err
    wrong = sam_jax(*arguments[:-2], "--refine")
    assert "--refine and --min-score are for --boxes" in wrong.err


def test_datasets_are_listed_and_described(sam_jax, tmp_path: Path) -> None:
    (tmp_path / "LVIS").mkdir()
    listed = sam_jax("datasets")
    assert listed.code == 0, listed.err
    for words in ("Cityscapes", "172,653", "+9.24", "polygons (visor)"):
        assert words in listed.out
    there = sam_jax("datasets", "--folder", tmp_path).out
    assert (there.count(" yes "), there.count(" no ")) == (1, 22)
    described = sam_jax("datasets", "bbbc038v1").out
    assert "stage1_train/*/masks/*.png" in described
    assert "unverified" in described
    wrong = sam_jax("datasets", "LVISS")
    assert wrong.code == 1
    assert "did you mean 'LVIS'?" in wrong.err
    assert sam_jax("datasets", "--markdown").out.startswith("# The paper's 23 data sets")
