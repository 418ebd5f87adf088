import contextlib
import functools
import itertools
import json
import logging
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from sam_jax.data.config import DataConfig
from sam_jax.data.pipeline import train_iterator
from sam_jax.data.samples import CorruptSampleError, decode_image, decode_masks
from sam_jax.data.sources import tars
from sam_jax.data.sources.sa1b import PAIRS, Sa1bSource, parse_annotation
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import (
    box_mask,
    numbered_hw,
    sa1b_files,
    sa1b_json,
    sa1b_pair,
    write_tar,
)


def hws(source: Sa1bSource) -> list[tuple[int, ...]]:
    return [decode_image(source[i]).shape[:2] for i in range(len(source))]


def reasons(source: Sa1bSource) -> dict[str, str]:
    """Reason why each sample is refused, or "good", by the last part of its name."""
    found = {}
    for i in range(len(source)):
        try:
            found[source[i].name] = "good"
        except CorruptSampleError as error:
            found[error.name] = error.reason
    return {name.rpartition("/")[2].rpartition(":")[2]: reason for name, reason in found.items()}


@pytest.mark.parametrize("folder", ["", "./", "sa_000003/"])
def test_pairs_are_read_in_place(tmp_path: Path, folder: str) -> None:
    tar = write_tar(tmp_path / "sa_000003.tar", sa1b_files([3, 11, 5], folder))
    source = Sa1bSource(tar)
    assert len(source) == 3
    # In order of names: sa_11, sa_3, sa_5.
    assert hws(source) == [numbered_hw(11), numbered_hw(3), numbered_hw(5)]
    sample = source[1]
    assert sample.image == sa1b_pair(3)[0]
    assert sample.dataset == "sa1b"
    assert sample.name.startswith(str(tar))
    assert sample.name.endswith("sa_3.jpg")
    hw = numbered_hw(3)
    np.testing.assert_array_equal(
        decode_masks(sample, [0, 1]), [box_mask(hw, 1, 9, 2, 12), box_mask(hw, 5, 15, 10, 25)]
    )
    for index in (3, -1):
        with pytest.raises(IndexError):
            source[index]


def test_a_tar_that_vanishes_while_it_is_trained_on_ends_the_run(tmp_path: Path) -> None:
    """An open tar is read on; one that has to be opened again is named."""
    paths = [write_tar(tmp_path / f"{i}.tar", sa1b_files([2 * i, 2 * i + 1])) for i in range(2)]
    config = DataConfig(
        sources=({"kind": "sa1b", "path": str(tmp_path)},),
        image_size=(32, 32),
        batch_size=2,
        prefetch_examples=1,
    )
    with contextlib.closing(train_iterator(config)) as batches:
        for _ in range(3):
            next(batches)
        for path in paths:
            path.unlink()
        next(batches)
        tars._open_tar.cache_clear()
        with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*[01]\.tar"):
            list(itertools.islice(batches, 100))


def test_json_and_jpg_may_be_far_apart(tmp_path: Path) -> None:
    files = sa1b_files([1, 2, 3])
    order = sorted(files, key=lambda name: name.endswith(".jpg"))
    source = Sa1bSource(write_tar(tmp_path / "a.tar", {name: files[name] for name in order}))
    assert hws(source) == [numbered_hw(1), numbered_hw(2), numbered_hw(3)]


def test_several_tars_count_as_one_source(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        pairs = range(3 * number, 3 * number + number + 1)
        write_tar(tmp_path / f"sa_{number}.tar", sa1b_files(pairs))
    expected = [numbered_hw(i) for i in (0, 3, 4, 6, 7, 8)]
    tars = [tmp_path / f"sa_{number}.tar" for number in (0, 1, 2)]
    ways: list[Any] = [tmp_path, str(tmp_path / "*.tar"), tars]
    for path in ways:
        assert hws(Sa1bSource(path)) == expected
    # The pattern is a pattern only where nothing has that name.
    (tmp_path / "[x]").mkdir()
    write_tar(tmp_path / "[x]" / "a.tar", sa1b_files([7]))
    assert hws(Sa1bSource(tmp_path / "[x]")) == [numbered_hw(7)]


def test_hidden_files_are_no_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hidden = {"._sa_1.jpg": b"x", "._sa_1.json": b"x", ".ipynb_checkpoints/sa_1.json": b"x"}
    files = sa1b_files([1, 2]) | hidden
    (tmp_path / "tars").mkdir()
    tar = write_tar(tmp_path / "tars" / "a.tar", files)
    (tmp_path / "tars" / "._a.tar").write_bytes(b"x")
    for way in (tar, tmp_path / "tars", str(tmp_path / "tars" / "*.tar")):
        assert hws(Sa1bSource(way)) == [numbered_hw(1), numbered_hw(2)]
    assert "a.tar: 3 hidden files left out" in caplog.text
    for name, content in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    source = Sa1bSource(tmp_path / "folder")
    assert hws(source) == [numbered_hw(1), numbered_hw(2)]
    assert source.left_out.counts == {"hidden files": 3}


@pytest.mark.parametrize("other", ["sa_1.png", "sa_1.JPG", "sa_1.JSON"])
def test_two_files_of_one_pair_are_refused(tmp_path: Path, other: str) -> None:
    files = sa1b_files([1]) | {other: b"x"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a").mkdir()
    ways = [tmp_path, write_tar(tmp_path / "a" / "a.tar", files)]
    for way in ways:
        with pytest.raises(ConfigError, match=r"sa_1\..* would share one annotation"):
            Sa1bSource(way)


def test_the_index_is_made_once_and_again_when_the_tar_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = []

    def counting_scan(path: Path, arrangement: tars.Arrangement) -> np.ndarray:
        scans.append(path.name)
        return scan(path, arrangement)

    scan = tars.scan
    monkeypatch.setattr(tars, "scan", counting_scan)
    tar = write_tar(tmp_path / "a.tar", sa1b_files([1, 2]))
    for _ in range(3):
        assert len(Sa1bSource(tar)) == 2
    assert scans == ["a.tar"]
    write_tar(tar, sa1b_files([1, 2, 3]))
    assert hws(Sa1bSource(tar)) == [numbered_hw(i) for i in (1, 2, 3)]
    assert scans == ["a.tar"] * 2
    stat = tar.stat()
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert len(Sa1bSource(tar)) == 3
    assert scans == ["a.tar"] * 3
    # Outdated indices go, nothing half-written stays.
    assert len(list(tmp_path.iterdir())) == 2


def test_indices_of_equally_named_tars_share_a_cache_folder(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        write_tar(tmp_path / str(number) / "a.tar", sa1b_files([number]))
    both = [tmp_path / "1" / "a.tar", tmp_path / "2" / "a.tar"]
    for _ in range(2):
        assert hws(Sa1bSource(both, cache_dir=cache)) == [numbered_hw(1), numbered_hw(2)]
        assert len(list(cache.iterdir())) == 2
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["a.tar"]


def test_an_index_that_cannot_be_kept_asks_for_a_folder(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", sa1b_files([1]))
    with pytest.raises(ConfigError, match="set cache_dir"):
        Sa1bSource(tar, cache_dir=tar)


def test_threads_may_read_at_once_from_more_tars_than_stay_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_open = functools.lru_cache(maxsize=1)(tars._open_tar.__wrapped__)
    monkeypatch.setattr(tars, "_open_tar", one_open)
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", sa1b_files([number]))
    source = Sa1bSource(tmp_path)
    expected = [sa1b_pair(number)[0] for number in range(3)]
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda i: source[i % 3].image, range(60)))
    assert images == expected * 20


def test_sources_travel_without_open_files(tmp_path: Path) -> None:
    source = Sa1bSource(write_tar(tmp_path / "a.tar", sa1b_files([1, 2])))
    source[0]
    content = pickle.dumps(source)
    assert len(content) < 2000
    assert hws(pickle.loads(content)) == [numbered_hw(1), numbered_hw(2)]


def damaged_files() -> tuple[dict[str, bytes], dict[str, str]]:
    files = sa1b_files([1, 2, 3, 4, 5, 6])
    del files["sa_1.json"]
    del files["sa_2.jpg"]
    files["sa_3.json"] = b'{"image": {'
    files["sa_4.json"] = b'{"image": {}}'
    files["sa_5.json"] = b"\xff\xfe\x00"
    files["readme.txt"] = b"neither"
    expected = {
        "sa_1.jpg": "missing json",
        "sa_2.json": "missing image",
        "sa_3.jpg": "malformed json",
        "sa_4.jpg": "malformed json",
        "sa_5.jpg": "malformed json",
        "sa_6.jpg": "good",
    }
    return files, expected


def test_damaged_pairs_in_a_tar(tmp_path: Path) -> None:
    files, expected = damaged_files()
    assert reasons(Sa1bSource(write_tar(tmp_path / "a.tar", files))) == expected


def test_damaged_pairs_in_a_folder(tmp_path: Path) -> None:
    files, expected = damaged_files()
    (tmp_path / "sub").mkdir()
    for name, content in files.items():
        (tmp_path / "sub" / name).write_bytes(content)
    source = Sa1bSource(tmp_path)
    assert reasons(source) == expected
    (tmp_path / "sub" / "sa_6.json").unlink()
    assert reasons(source)["sa_6.jpg"] == "missing json"


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 1.0])
def test_a_tar_cut_short_keeps_what_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: float
) -> None:
    tar = write_tar(tmp_path / "a.tar", sa1b_files([1, 2, 3]))
    members = tars.scan(tar, PAIRS)
    begin, size = members["json"][2].tolist()
    content = tar.read_bytes()
    tar.write_bytes(content[: begin + int(kept * size)])
    with caplog.at_level(logging.WARNING):
        found = reasons(Sa1bSource(tar))
    last = "good" if kept == 1.0 else "truncated tar"
    assert found == {"sa_1.jpg": "good", "sa_2.jpg": "good", "sa_3.jpg": last}
    assert "cut short" in caplog.text


def test_a_tar_cut_within_a_header(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar = write_tar(tmp_path / "a.tar", sa1b_files([1, 2]))
    begin = int(tars.scan(tar, PAIRS)["json"][1][0])
    tar.write_bytes(tar.read_bytes()[: begin - 200])
    with caplog.at_level(logging.WARNING):
        assert reasons(Sa1bSource(tar)) == {"sa_1.jpg": "good", "sa_2.jpg": "missing json"}
    assert "cut short" in caplog.text


def test_a_whole_tar_is_not_called_cut_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        Sa1bSource(write_tar(tmp_path / "a.tar", sa1b_files([1, 2])))
    assert not caplog.records


@pytest.mark.parametrize("content", [b"", b"<html>gone</html>" * 100, b"\x1f\x8b" + bytes(2000)])
def test_other_files_are_no_tars(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.tar"):
        Sa1bSource(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["runs [1]", "a*b", "[!a]", "?", "**", "[", "{a,b}"])
def test_folders_that_look_like_patterns(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    write_tar(folder / "sa_1[x].tar", sa1b_files([1]))
    write_tar(folder / "sa_2.tar", sa1b_files([2]))
    for path, numbers in (
        (folder / "sa_*.tar", [1, 2]),
        (folder / "sa_1[x].tar", [1]),
        (folder / "sa_[2].tar", [2]),
        (folder, [1, 2]),
        (tmp_path / "*" / "sa_2.tar", [2]),
    ):
        assert hws(Sa1bSource(path)) == [numbered_hw(number) for number in numbers]


def test_a_folder_that_leads_nowhere_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "part[1]").mkdir()
    (tmp_path / "part1").mkdir()
    write_tar(tmp_path / "part1" / "sa_3.tar", sa1b_files([3]))
    assert hws(Sa1bSource(tmp_path / "part[1]" / "sa_*.tar")) == [numbered_hw(3)]


def test_a_tar_whose_name_is_as_long_as_names_can_be(tmp_path: Path) -> None:
    for number in (1, 2):
        name = f"{number}{'猫' * 83}x.tar"
        for source in (Sa1bSource(write_tar(tmp_path / name, sa1b_files([number]))),) * 2:
            assert hws(source) == [numbered_hw(number)]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no image"):
        Sa1bSource(tmp_path)
    with pytest.raises(FileNotFoundError):
        Sa1bSource(tmp_path / "*.tar")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["annotations", "segmentation", "x"]), inner)
    ),
    max_leaves=10,
)


@hypothesis.given(st.binary(max_size=40) | json_values.map(lambda v: json.dumps(v).encode()))
def test_arbitrary_annotation_files_are_parsed_or_malformed(content: bytes) -> None:
    try:
        masks_rle, unusable = parse_annotation("a.jpg", content)
    except CorruptSampleError:
        return
    assert all(isinstance(rle, dict) for rle in masks_rle)
    assert all("segmentation" in text for text in unusable)


def test_deeply_nested_json_is_malformed() -> None:
    with pytest.raises(CorruptSampleError, match="malformed"):
        parse_annotation("a.jpg", b"[" * 100_000)


@pytest.mark.parametrize("segmentation", [None, [[1, 2, 3, 4, 5, 6]], "x"])
def test_only_rles_are_segmentations(segmentation: Any) -> None:
    content = json.loads(sa1b_json([box_mask((9, 12), 1, 4, 1, 5)] * 2, 1))
    content["annotations"][0]["segmentation"] = segmentation
    masks_rle, unusable = parse_annotation("a.jpg", json.dumps(content).encode())
    assert (len(masks_rle), len(unusable)) == (1, 1)


@pytest.mark.parametrize("annotation", [{}, None, 5, [], {"bbox": [1, 2, 3, 4]}])
def test_one_bad_annotation_costs_only_itself(annotation: Any) -> None:
    content = json.loads(sa1b_json([box_mask((9, 12), 1, 4, 1, 5)] * 2, 1))
    content["annotations"].insert(1, annotation)
    masks_rle, unusable = parse_annotation("a.jpg", json.dumps(content).encode())
    assert len(masks_rle) == 2
    assert unusable[0].startswith("annotations[1]: ")


def test_the_released_annotation_form(shared_data: Path) -> None:
    content = (shared_data / "sa1b" / "sa_226381_partial.json").read_bytes()
    masks_rle, unusable = parse_annotation("sa_226381.jpg", content)
    assert [rle["size"] for rle in masks_rle] == [[1500, 2000]] * 3
    assert not unusable
