from pathlib import Path

import pytest

from sam_jax.data.config import SourceConfig, build_source
from sam_jax.data.sources import ListingSource
from sam_jax.data.sources.joined import JoinedSource
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import numbered_hw, write_coco


def test_parts_follow_one_another_under_one_name(tmp_path: Path) -> None:
    parts = [
        {"kind": "coco", "path": str(write_coco(tmp_path / str(count), count)), "name": "part"}
        for count in (3, 1, 2)
    ]
    source = build_source(SourceConfig("joined", name="all", parts=tuple(parts)))
    assert isinstance(source, JoinedSource)
    assert isinstance(source, ListingSource)
    assert len(source) == 6
    names = [source.file_name(i) for i in range(6)]
    assert names == ["0/0.png", "0/1.png", "0/2.png", "1/0.png", "2/0.png", "2/1.png"]
    for index, number in enumerate((0, 1, 2, 0, 0, 1)):
        sample = source[index]
        assert sample.dataset == "all"
        assert sample.masks_rle[0]["size"] == list(numbered_hw(number))
        assert source.num_masks(index) == 1


def test_sources_that_list_nothing_are_counted_by_reading(tmp_path: Path) -> None:
    part = {"kind": "synthetic", "num_images": 2, "image_size": (32, 48)}
    source = build_source(SourceConfig("joined", parts=(part, part)))
    assert isinstance(source, JoinedSource)
    assert [source.file_name(i) for i in range(4)] == ["0/0", "0/1", "1/0", "1/1"]
    assert source.num_masks(3) == len(source[1].masks_rle)


def test_what_parts_left_out_is_added_up(tmp_path: Path) -> None:
    for name in ("a", "b"):
        path = write_coco(tmp_path / name, 2)
        path.write_text(path.read_text().replace('"image_id": 101', '"image_id": 999'))
    parts = tuple(
        {"kind": "coco", "path": str(tmp_path / name / "train.json")} for name in ("a", "b")
    )
    source = build_source(SourceConfig("joined", parts=parts))
    assert source.left_out.total() == 4


def test_wrong_parts_are_explained() -> None:
    with pytest.raises(ConfigError, match="needs parts"):
        build_source(SourceConfig("joined", parts=()))
    with pytest.raises(ConfigError, match=r"missing: \['parts'\]"):
        build_source(SourceConfig("joined"))
    with pytest.raises(ConfigError, match="did you mean 'path'"):
        SourceConfig.from_dict({"kind": "joined", "parts": [{"kind": "coco", "pth": "x"}]})
