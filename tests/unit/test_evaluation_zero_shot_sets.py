import os
from pathlib import Path

import numpy as np
import pytest

from sam_jax.data.config import SourceConfig, build_source
from sam_jax.data.samples import decode_masks
from sam_jax.data.sources import ListingSource
from sam_jax.errors import ConfigError
from sam_jax.evaluation.zero_shot_sets import (
    NAMES,
    ZERO_SHOT_SETS,
    ZeroShotSet,
    find_set,
    sets_in,
)
from sam_jax.evaluation.zero_shot_table import described, markdown, rich_table
from tests.unit.zero_shot_fixtures import MASKS, write_set

DOCS = Path(__file__).resolve().parents[2] / "docs" / "datasets.md"


def test_the_sums_are_the_papers() -> None:
    assert len(set(NAMES)) == len(ZERO_SHOT_SETS) == 23
    assert sum(one.num_images for one in ZERO_SHOT_SETS) == 40_188
    assert sum(one.num_masks for one in ZERO_SHOT_SETS) == 172_653
    differences = [one.miou_over_ritm for one in ZERO_SHOT_SETS]
    assert sum(difference > 0 for difference in differences) == 16
    assert differences == sorted(differences, reverse=True)
    assert np.mean(differences) == pytest.approx(9.24, abs=0.005)
    kinds = {one.name: one.mask_kind for one in ZERO_SHOT_SETS if one.mask_kind != "instance"}
    assert kinds == {"Cityscapes": "panoptic", "DRAM": "semantic"}


@pytest.mark.parametrize("one", ZERO_SHOT_SETS, ids=NAMES)
def test_the_named_source_reads_the_layout(one: ZeroShotSet, tmp_path: Path) -> None:
    root = write_set(one, tmp_path)
    for pattern, _ in one.layout:
        if "thu_" not in pattern:  # THU-READ, of whose images and Ego4D's one is enough
            assert list(root.glob(pattern)), f"{pattern} is not what the source reads"
    source = build_source(SourceConfig.from_dict(one.source(root)))
    assert isinstance(source, ListingSource)
    assert source.name == one.name
    assert len(source) == len(one.parts)
    assert not source.left_out
    for index in range(len(source)):
        sample = source[index]
        assert sample.dataset == one.name
        assert not sample.unusable_masks
        assert source.num_masks(index) == len(sample.masks_rle) == 2
        np.testing.assert_array_equal(decode_masks(sample, range(2)), MASKS)
    names = [source.file_name(index) for index in range(len(source))]
    assert len(set(names)) == len(names)
    assert not any(os.fspath(tmp_path) in name for name in names)


def test_what_is_not_verified_says_so() -> None:
    for one in ZERO_SHOT_SETS:
        assert "unverified" in one.licence
        text = described(one)
        assert one.evidence == "public code" or "not verified" in text or "to do " in text
        # A layout of ours needs a conversion.
        assert one.evidence != "ours" or one.conversion


def test_sets_are_found_by_name() -> None:
    assert find_set("lvis").name == "LVIS"
    with pytest.raises(ConfigError, match=r"no data set 'Cityscape' .* did you mean 'Cityscapes'"):
        find_set("Cityscape")
    with pytest.raises(ConfigError, match="there are PPDLS, BBBC038v1"):
        find_set("?")


def test_what_is_there_and_what_is_missing(tmp_path: Path) -> None:
    for name in ("LVIS", "DRAM", "else"):
        (tmp_path / name).mkdir()
    (tmp_path / "OVIS").write_text("a file")
    found, missing = sets_in(tmp_path)
    assert [one.name for one in found] == ["LVIS", "DRAM"]
    assert len(missing) == 21
    found, missing = sets_in(tmp_path, ("dram", "OVIS"))
    assert ([one.name for one in found], [one.name for one in missing]) == (["DRAM"], ["OVIS"])
    with pytest.raises(FileNotFoundError, match="no folder"):
        sets_in(tmp_path / "elsewhere")


def test_the_page_is_current() -> None:
    assert DOCS.read_text(encoding="utf-8") == markdown(), (
        "sam-jax datasets --markdown > docs/datasets.md"
    )


def test_the_table_says_which_are_there() -> None:
    assert len(rich_table().columns) + 1 == len(rich_table(["LVIS"]).columns)
    there = list(rich_table(["LVIS"]).columns[1].cells)
    assert [str(cell) for cell in there] == ["no" if n == "LVIS" else "yes" for n in NAMES]
