import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sam_jax.data.config import DataConfig, SourceConfig, build_source
from sam_jax.data.sources import Source
from sam_jax.data.sources.coco import CocoSource
from sam_jax.data.sources.mask_folder import MaskFolderSource
from sam_jax.data.sources.sa1b import Sa1bSource
from sam_jax.data.sources.synthetic import SyntheticSource
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import (
    box_mask,
    encode_image,
    gradient_image,
    sa1b_files,
    write_coco,
    write_tar,
)

SYNTHETIC = {"kind": "synthetic", "num_images": 5, "image_size": [32, 48]}
PLAIN = {"sources": [SYNTHETIC], "image_size": [48, 64], "batch_size": 2}


def test_configs_come_from_plain_values() -> None:
    values = {**PLAIN, "scale_jitter": [0.5, 2.0], "hflip_rate": 0.5}
    config = DataConfig.from_dict(json.loads(json.dumps(values)))
    assert config.image_size == (48, 64)
    assert config.scale_jitter == (0.5, 2.0)
    source = SourceConfig("synthetic", num_images=5, image_size=(32, 48))
    assert config.sources == (source,)
    assert config == DataConfig.from_dict({**values, "sources": (source,)})
    hash(config)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (DataConfig, {**PLAIN, "max_mask": 3}, "did you mean 'max_masks'"),
        (DataConfig, {**PLAIN, "zzz": 3}, r"config\.data has no field 'zzz'"),
        (DataConfig, {"sources": [SYNTHETIC]}, "lacks the field 'image_size'"),
        (DataConfig, {**PLAIN, "sources": [{"kind": "coco", "pth": "x"}]}, "did you mean 'path'"),
        (SourceConfig, {"kind": "coco", "weigth": 1.0}, "did you mean 'weight'"),
        (SourceConfig, {"kind": "coco", "crowd": "drop"}, "crowd"),
        (SourceConfig, {"kind": "polygons", "form": "coco"}, "form"),
        (SourceConfig, {"kind": "panoptic", "stuff": "none"}, "stuff"),
        (SourceConfig, {"kind": "label_maps", "encoding": "kitti"}, "encoding"),
        (SourceConfig, {"kind": "cocoa"}, "kind"),
    ],
)
def test_unknown_keys_are_refused_with_a_suggestion(
    cls: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        cls.from_dict(values)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sources": []},
        {"batch_size": 0},
        {"image_size": [48, 60]},
        {"max_masks": 0},
        {"num_threads": -1},
        {"prefetch_batches": -1},
        {"corrupt_grace": 0},
        {"scale_jitter": [2.0, 0.5]},
        {"sources": [{**SYNTHETIC, "weight": 0.0}]},
    ],
)
def test_impossible_values_are_refused_before_any_data_is_opened(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        DataConfig.from_dict({**PLAIN, **wrong})


def test_the_transform_takes_every_option_from_the_config() -> None:
    changed = {
        "max_masks": 3,
        "max_area_rate": 0.7,
        "min_mask_area_px": 5,
        "hflip_rate": 0.25,
        "scale_jitter": (0.5, 1.5),
        "color_jitter": 0.125,
        "reduced_decoding": False,
    }
    transform = DataConfig.from_dict({**PLAIN, **changed}).transform()
    expected = {**changed, "image_size": (48, 64), "in_channels": None}
    assert dataclasses.asdict(transform) == expected


def test_every_kind_is_built(tmp_path: Path) -> None:
    coco = write_coco(tmp_path / "coco", 3)
    tar = write_tar(tmp_path / "a.tar", sa1b_files([1, 2]))
    for folder, image in (
        ("photos", gradient_image((9, 16))),
        ("masks", box_mask((9, 16), 1, 5, 1, 8)),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(encode_image(image))
    configs: list[tuple[SourceConfig, type, int]] = [
        (SourceConfig("synthetic", num_images=4, seed=3), SyntheticSource, 4),
        (SourceConfig("coco", str(coco), name="mine", crowd="keep"), CocoSource, 3),
        (SourceConfig("sa1b", str(tar), cache_dir=str(tmp_path / "cache")), Sa1bSource, 2),
        (
            SourceConfig(
                "mask_folder",
                str(tmp_path / "photos"),
                masks=str(tmp_path / "masks"),
                background=0,
                ignore_labels=(255,),
            ),
            MaskFolderSource,
            1,
        ),
    ]
    for config, cls, length in configs:
        source = build_source(config)
        assert isinstance(source, cls)
        assert isinstance(source, Source)
        assert len(source) == length
        assert source[0].dataset == source.name == (config.name or config.kind)
    assert build_source(configs[1][0]).name == "mine"
    assert (tmp_path / "cache").is_dir()


def test_options_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"superfluous: \['seed'\], missing: \['path'\]"):
        build_source(SourceConfig("coco", seed=1))
    with pytest.raises(ConfigError, match=r"missing: \['masks'\]"):
        build_source(SourceConfig("mask_folder", path=str(tmp_path)))
