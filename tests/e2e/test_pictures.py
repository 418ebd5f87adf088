"""Masks of pictures of every format and way up, and training and evaluating on them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_jax import rle
from sam_jax.data.pipeline import DataConfig, eval_samples, train_iterator
from sam_jax.data.sources import Source
from sam_jax.data.sources.coco import CocoSource
from sam_jax.data.sources.sa1b import Sa1bSource
from sam_jax.errors import ConfigError
from sam_jax.images import as_rgb, read_image
from sam_jax.inference import folder
from sam_jax.inference.automatic import AutomaticOptions, generate_masks
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.models.sam import Sam
from tests.golden.tiny import TINY, random_variables
from tests.unit.test_images import DEEP, KINDS, RGB, TURNED_KINDS, deep_file, of_mode, saved

OPTIONS = AutomaticOptions(
    points_per_side=1,
    points_per_batch=4,
    pred_iou_thresh=0.0,
    stability_score_thresh=0.0,
    box_nms_thresh=1.0,
)
COPIED_WITH_LOSS = ("JPEG", "AVIF")


def oddities() -> dict[str, bytes]:
    color, square = Image.fromarray(RGB), Image.fromarray(RGB[:60, :60])
    files = {
        "grey16.png": saved(of_mode("I;16"), "PNG"),
        "grey16_turned.tif": saved(of_mode("I;16"), "TIFF", 6),
        "rgb16.tiff": deep_file(".tiff", DEEP),
        "cmyk.JPG": saved(of_mode("CMYK"), "JPEG"),
        "palette.png": saved(of_mode("P"), "PNG", transparency=0),
        "webp_inside.jpg": saved(color, "WEBP"),
        "jp2_inside.png": saved(color, "JPEG2000"),
        "gif_inside.webp": saved(color, "GIF"),
    }
    files |= {
        f"a.{suffix}.{suffix}": saved(color, kind)
        for suffix, kind in SUFFIXES.items()
        if kind in KINDS
    }
    kinds = [kind for kind in TURNED_KINDS if kind in KINDS]
    for orientation in range(2, 9):
        kind = kinds[orientation % len(kinds)]
        files[f"{orientation}_{kind}.jpg"] = saved(color, kind, orientation)
        files[f"{orientation}_{kind}_square.jpg"] = saved(square, kind, orientation)
    return files


SUFFIXES = {"bmp": "BMP", "gif": "GIF", "jp2": "JPEG2000", "avif": "AVIF", "ppm": "PPM"}
SUFFIXES |= {"webp": "WEBP", "tif": "TIFF", "jfif": "JPEG"}


def test_masks_are_trained_on_and_evaluated_as_they_were_made(tmp_path: Path) -> None:
    predictor = Predictor(Sam(TINY), random_variables(TINY), Buckets((1,), (1,), (4,), (1,)))
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    for name, content in oddities().items():
        (pictures / name).write_bytes(content)
    summary = folder.annotate_folder(
        predictor, pictures, out, OPTIONS, coco=True, overlays=False, link_pictures=True
    )
    assert not summary.skipped
    assert summary.num_annotated == len(oddities())
    expected = {}
    for path in pictures.iterdir():
        annotation = json.loads((out / "annotations" / f"{path.stem}.json").read_text())
        runs = [rle.run_lengths(a["segmentation"]) for a in annotation["annotations"]]
        pixels = read_image(path)
        expected[path.stem] = pixels, [rle.decode(r, pixels.shape[:2]) for r in runs]

    linked = Sa1bSource(out / "annotations")
    originals = CocoSource(out / "coco.json", images=pictures)
    copies = CocoSource(out / "coco.json", images=out / "annotations")
    sources: list[Source] = [linked, originals, copies]
    for source in sources:
        examples = list(eval_samples(source))
        assert len(examples) == len(expected)
        for example in examples:
            stem = Path(example.name).stem
            pixels, masks = expected[stem]
            np.testing.assert_array_equal(example.masks, masks)
            difference = np.abs(example.image.astype(int) - pixels)
            is_lossy = source is not originals and any(kind in stem for kind in COPIED_WITH_LOSS)
            assert difference.max() <= (12 if is_lossy else 0)

    data = {"kind": "coco", "path": str(out / "coco.json"), "images": str(pictures)}
    batches = train_iterator(
        DataConfig(sources=(data,), image_size=(32, 32), batch_size=len(expected), num_threads=0)
    )
    assert next(batches)["mask_valid"].any(axis=-1).all()
    assert not batches.corrupt_counts
    batches.close()

    # The same picture as a file, in Pillow's form, and as an array of its pixels.
    path = pictures / "grey16.png"
    with Image.open(path) as image:
        forms = [read_image(path), image, of_mode("I;16"), DEEP[..., 0], as_rgb(DEEP[..., :1])]
        first, *others = [
            generate_masks(predictor, form, OPTIONS, output_mode="coco_rle") for form in forms
        ]
    assert all(other == first for other in others)
    embeddings = predictor.embed(forms[:1] + forms[2:])
    np.testing.assert_array_equal(embeddings.features, embeddings.features[:1].repeat(4, axis=0))


def test_a_single_picture_without_an_ending_cannot_be_linked(tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(saved(Image.fromarray(RGB), "PNG"))
    predictor = Predictor(Sam(TINY), random_variables(TINY), Buckets((1,), (1,), (4,), (1,)))
    with pytest.raises(ConfigError, match="picture has no picture's ending"):
        folder.annotate_folder(
            predictor, tmp_path / "picture", tmp_path / "out", OPTIONS, link_pictures=True
        )
    assert not (tmp_path / "out").exists()
