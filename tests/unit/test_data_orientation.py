"""Pictures that are stored turned, through every kind of source."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sam_jax.data.config import SourceConfig, build_source
from sam_jax.data.pipeline import DataConfig, eval_samples, train_iterator
from sam_jax.data.samples import decode_image, decode_masks, is_turned
from sam_jax.data.sources import Source
from sam_jax.data.sources.coco import CocoSource
from sam_jax.data.sources.image_folders import ImageFoldersSource
from sam_jax.data.sources.label_map_files import LabelMapsSource
from sam_jax.data.sources.listed_images import PART_LEFT_OUT
from sam_jax.data.sources.mask_folder import MaskFolderSource
from sam_jax.data.sources.panoptic import PanopticSource
from sam_jax.data.sources.sa1b import Sa1bSource
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import compress, encode_image, gradient_image, sa1b_json, write_tar
from tests.unit.test_images import TURNS, saved

Writer = Callable[..., Source]


def write_coco(folder: Path, content: bytes, mask: np.ndarray, **options: Any) -> Source:
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(content)
    h, w = mask.shape
    record = {"id": 1, "file_name": "a.png", "height": h, "width": w}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": compress(mask)}
    (folder / "x.json").write_text(json.dumps({"images": [record], "annotations": [annotation]}))
    return CocoSource(folder / "x.json", **options)


def write_masks(folder: Path, content: bytes, mask: np.ndarray, **options: Any) -> Source:
    for name, file in (("images", content), ("masks", encode_image(mask.astype(np.uint8) * 255))):
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes(file)
    return MaskFolderSource(folder / "images", folder / "masks", **options)


def write_pair(folder: Path, content: bytes, mask: np.ndarray, **options: Any) -> Source:
    (folder / "a.png").write_bytes(content)
    (folder / "a.json").write_bytes(sa1b_json([mask], 1))
    return Sa1bSource(folder, **options)


def write_shard(folder: Path, content: bytes, mask: np.ndarray, **options: Any) -> Source:
    files = {"a.webp": content, "a.json": sa1b_json([mask], 1)}
    return Sa1bSource(write_tar(folder / "x.tar", files), **options)


def write_label_maps(folder: Path, content: bytes, mask: np.ndarray, **options: Any) -> Source:
    (folder / "a_rgb.png").write_bytes(content)
    (folder / "a_label.png").write_bytes(encode_image(mask.astype(np.uint8) * 3))
    suffixes: dict[str, Any] = {"image_suffix": "_rgb.png", "mask_suffixes": ("_label.png",)}
    return LabelMapsSource(folder, **suffixes, **options)


def write_folder(folder: Path, content: bytes, mask: np.ndarray, **options: Any) -> Source:
    for name, file in (("images", content), ("masks", encode_image(mask.astype(np.uint8) * 255))):
        (folder / "a" / name).mkdir(parents=True)
        (folder / "a" / name / "a.png").write_bytes(file)
    return ImageFoldersSource(folder, **options)


def write_panoptic(folder: Path, content: bytes, mask: np.ndarray, **options: Any) -> Source:
    for name in ("images", "x"):
        (folder / name).mkdir()
    (folder / "images" / "a.png").write_bytes(content)
    segments = np.stack([mask * 5, mask * 0, mask * 0], axis=-1).astype(np.uint8)
    (folder / "x" / "a.png").write_bytes(encode_image(segments))
    record = {"id": 1, "file_name": "a.png", "segments_info": [{"id": 5, "category_id": 1}]}
    records = {
        "images": [record],
        "categories": [{"id": 1, "isthing": 1}],
        "annotations": [{**record, "image_id": 1}],
    }
    (folder / "x.json").write_text(json.dumps(records))
    return PanopticSource(folder / "x.json", **options)


WRITERS = (
    write_coco,
    write_masks,
    write_pair,
    write_shard,
    write_label_maps,
    write_folder,
    write_panoptic,
)


def picture_and_mask(hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A mask of all that is bright."""
    mask = np.zeros(hw, bool)
    mask[2:7, 1:11] = True
    mask[2:4, 1:4] = False
    return np.where(mask[..., None], 200, gradient_image(hw) // 4).astype(np.uint8), mask


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("hw", [(12, 20), (16, 16)])
@pytest.mark.parametrize("exif", TURNS)
def test_masks_lie_on_what_they_were_drawn_on(
    write: Writer, hw: tuple[int, int], exif: int, tmp_path: Path
) -> None:
    stored, stored_mask = picture_and_mask(hw)
    content = saved(Image.fromarray(stored), "PNG", exif)
    sizes_tell = exif >= 5 and hw[0] != hw[1]
    for drawn_on, mask in (("upright", TURNS[exif](stored_mask)), ("stored", stored_mask)):
        for key in ("upright", "stored") if sizes_tell or exif == 1 else (drawn_on,):
            folder = tmp_path / f"{drawn_on}-{key}"
            folder.mkdir()
            sample = write(folder, content, mask, orientation=key)[0]
            bright = decode_image(sample)[..., 0] == 200
            np.testing.assert_array_equal(decode_masks(sample, [0])[0], bright)
            assert is_turned(sample) == (drawn_on == "upright" and exif != 1)


@pytest.mark.parametrize("exif", TURNS)
def test_mask_files_may_be_stored_turned_themselves(exif: int, tmp_path: Path) -> None:
    """A camera's picture whose mask was drawn on it, by a program that keeps the EXIF."""
    stored, stored_mask = picture_and_mask((12, 20))
    content = saved(Image.fromarray(stored), "PNG", exif)
    source = write_masks(tmp_path, content, stored_mask)
    mask_file = saved(Image.fromarray(stored_mask.astype(np.uint8) * 255), "PNG", exif)
    (tmp_path / "masks" / "a.png").write_bytes(mask_file)
    for key in ("upright", "stored"):
        source = MaskFolderSource(tmp_path / "images", tmp_path / "masks", orientation=key)
        bright = decode_image(source[0])[..., 0] == 200
        np.testing.assert_array_equal(decode_masks(source[0], [0])[0], bright)
        upright = TURNS[exif](stored) if key == "upright" else stored
        np.testing.assert_array_equal(decode_image(source[0]), upright)


def test_what_sizes_do_not_tell_is_said_once_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored, mask = picture_and_mask((16, 16))
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(saved(Image.fromarray(stored), "PNG", 6))
        (tmp_path / f"{number}.json").write_bytes(sa1b_json([mask], number))
    source = {"kind": "sa1b", "path": str(tmp_path), "name": "mine"}
    config = DataConfig(sources=(source,), image_size=(16, 16), batch_size=4, num_threads=0)
    with caplog.at_level(logging.WARNING):
        iterator = train_iterator(config)
        for _ in range(2):
            next(iterator)
        ((remark, count),) = iterator.remark_counts.items()
    assert remark.startswith("turned upright; EXIF turns it")
    assert count == 8
    assert caplog.text.count("EXIF turns it") == 1
    fresh = train_iterator(config)
    fresh.set_state(iterator.get_state())
    assert fresh.remark_counts == iterator.remark_counts
    iterator.close()
    caplog.clear()
    stored_source = build_source(SourceConfig.from_dict({**source, "orientation": "stored"}))
    samples = eval_samples(stored_source)
    with caplog.at_level(logging.WARNING):
        found = list(samples)
    np.testing.assert_array_equal(found[0].image, stored)
    ((remark, count),) = samples.remark_counts.items()
    assert remark.startswith("taken as stored; EXIF turns it")
    assert count == 4
    assert caplog.text.count("EXIF turns it") == 1


def test_other_orientations_are_refused() -> None:
    with pytest.raises(ConfigError, match="orientation"):
        SourceConfig.from_dict({"kind": "coco", "orientation": "upside down"})
    with pytest.raises(ConfigError, match=r"superfluous: \['orientation'\]"):
        build_source(SourceConfig.from_dict({"kind": "synthetic", "orientation": "stored"}))


def test_polygons_without_a_size_are_of_the_picture_as_it_is_taken(tmp_path: Path) -> None:
    """Nothing tells which way up such polygons were drawn, but RLEs beside them may."""
    (tmp_path / "images").mkdir()
    stored = Image.fromarray(gradient_image((12, 20)))
    (tmp_path / "images" / "a.png").write_bytes(saved(stored, "PNG", 6))
    polygon = [[1, 1, 9, 1, 9, 9, 1, 9], [1, 1]]
    rle = compress(np.ones((12, 20), bool))
    for key, segmentations, hw, is_decided in (
        ("upright", [polygon], (20, 12), False),
        ("stored", [polygon], (12, 20), False),
        ("upright", [polygon, rle], (12, 20), True),
    ):
        content = {
            "images": [{"id": 1, "file_name": "a.png"}],
            "annotations": [{"image_id": 1, "segmentation": s} for s in segmentations],
        }
        (tmp_path / "x.json").write_text(json.dumps(content))
        samples = eval_samples(CocoSource(tmp_path / "x.json", orientation=key))
        (example,) = samples
        assert example.image.shape[:2] == example.masks.shape[1:] == hw
        remarks = samples.remark_counts
        assert remarks.pop(PART_LEFT_OUT) == 1
        assert [reason.split("; ")[0] for reason in remarks] == (
            [] if is_decided else ["turned upright" if key == "upright" else "taken as stored"]
        )
        assert not samples.dropped_mask_counts
