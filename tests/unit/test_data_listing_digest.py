"""Digests of data sets by the names and sizes of their files."""

import dataclasses
from pathlib import Path

import pytest

from sam_jax.data import listing_digest as module
from sam_jax.data.config import SourceConfig
from sam_jax.data.listing_digest import listing_digest
from tests.unit.data_fixtures import sa1b_files, write_tar


@pytest.fixture
def masks(tmp_path: Path) -> SourceConfig:
    """A folder of images with masks; contents are not looked at."""
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind / "a").mkdir(parents=True)
        for number in range(3):
            (tmp_path / "data" / kind / "a" / f"{number}.png").write_bytes(b"x" * number)
    folder = tmp_path / "data"
    return SourceConfig("mask_folder", str(folder / "images"), masks=str(folder / "masks"))


def test_names_and_sizes_tell_data_apart(masks: SourceConfig, tmp_path: Path) -> None:
    before = listing_digest(masks)
    assert before is not None
    assert (before.num_files, before.num_bytes) == (6, 6)
    assert listing_digest(masks) == before
    folder = tmp_path / "data" / "masks"
    # Not what systems put there, nor other contents of the same size.
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "a" / "2.png").write_bytes(b"yy")
    assert listing_digest(masks) == before
    # Nor where it lies.
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = dataclasses.replace(
        masks, path=str(tmp_path / "moved" / "images"), masks=str(tmp_path / "moved" / "masks")
    )
    assert listing_digest(moved) == before

    folder = tmp_path / "moved" / "masks"
    found = {before}
    (folder / "a" / "2.png").write_bytes(b"y")
    found.add(listing_digest(moved))
    (folder / "a" / "2.png").rename(folder / "a" / "3.png")
    found.add(listing_digest(moved))
    (folder / "a" / "3.png").unlink()
    found.add(listing_digest(moved))
    assert len(found) == 4


def test_of_tars_the_tars_count_and_not_their_indices(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"sa_{number}.tar", sa1b_files([number]))
    config = SourceConfig("sa1b", str(tmp_path / "sa_*.tar"))
    before = listing_digest(config)
    assert before is not None
    assert before.num_files == 2
    (tmp_path / "sa_0.tar.0.npy").write_bytes(b"x")
    assert listing_digest(config) == listing_digest(SourceConfig("sa1b", str(tmp_path))) == before
    parts = SourceConfig("joined", parts=(dataclasses.asdict(config), dataclasses.asdict(config)))
    joined = listing_digest(parts)
    assert joined is not None
    assert joined.num_files == 4


def test_sources_without_files_have_none(tmp_path: Path) -> None:
    assert listing_digest(SourceConfig("synthetic", num_images=3)) is None
    assert listing_digest(SourceConfig("sa1b", str(tmp_path / "gone*.tar"))) is None
    gone = listing_digest(SourceConfig("coco", str(tmp_path / "gone.json")))
    assert gone is not None
    assert (gone.num_files, gone.num_bytes) == (1, 0)


def test_a_start_does_not_wait_for_millions_of_files(
    masks: SourceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_FILES", 4)
    found = listing_digest(masks)
    assert found is not None
    assert found.num_files == 4
