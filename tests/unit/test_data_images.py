import pickle
from pathlib import Path

import pytest

from sam_jax.data.samples import CorruptSampleError, decode_image
from sam_jax.data.sources.images import ImagesSource
from sam_jax.data.sources.sa1b import Sa1bSource
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import (
    encode_image,
    gradient_image,
    numbered_hw,
    sa1b_files,
    write_tar,
)


def png(number: int) -> bytes:
    return encode_image(gradient_image(numbered_hw(number)))


def numbers(source: ImagesSource) -> list[int]:
    """Which images there are, by their heights."""
    return [decode_image(source[i]).shape[0] - numbered_hw(0)[0] for i in range(len(source))]


def test_a_folder_of_pictures_whatever_lies_beside_them(tmp_path: Path) -> None:
    for name, content in {
        "b.png": png(2),
        "sub/deeper/A.PNG": png(1),
        "notes.txt": b"no picture",
        "labels.json": b"{}",
        ".hidden.png": png(9),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    source = ImagesSource(tmp_path)
    assert numbers(source) == [2, 1]
    sample = source[1]
    assert sample.masks_rle == ()
    assert sample.dataset == "images"
    assert sample.name == str(tmp_path / "sub" / "deeper" / "A.PNG")
    assert source.left_out.counts == {"hidden files": 1}
    (tmp_path / "b.png").unlink()
    with pytest.raises(CorruptSampleError, match=r"b\.png: missing image"):
        source[0]
    for index in (2, -1):
        with pytest.raises(IndexError):
            source[index]


def test_tars_of_pictures_are_read_in_place(tmp_path: Path) -> None:
    # As WebDataset has them, two pictures of one stem, and some in folders.
    write_tar(
        tmp_path / "a.tar",
        {"0.cls": b"3", "0.jpg": png(0), "0.png": png(5), "x/1.jpeg": png(1), "._0.jpg": b""},
    )
    write_tar(tmp_path / "b.tar", {"2.png": png(2)})
    for path in (tmp_path, f"{tmp_path}/*.tar", [tmp_path / "a.tar", tmp_path / "b.tar"]):
        source = pickle.loads(pickle.dumps(ImagesSource(path)))
        assert numbers(source) == [0, 5, 1, 2]
    assert source[2].name == f"{tmp_path / 'a.tar'}::x/1.jpeg"


def test_tars_of_pairs_have_an_index_of_each_kind(tmp_path: Path) -> None:
    """SA-1B serves pre-training and segmentation, and neither scans for the other again."""
    tar = write_tar(tmp_path / "a.tar", sa1b_files([1, 2]))
    assert len(Sa1bSource(tar)) == 2
    assert numbers(ImagesSource(tar)) == [1, 2]
    indices = sorted(path.name for path in tmp_path.glob("*.npy"))
    assert len(indices) == 2
    assert sum(".images." in name for name in indices) == 1
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.npy"))]
    assert (len(Sa1bSource(tar)), len(ImagesSource(tar))) == (2, 2)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.npy"))] == times
    # A changed tar is scanned anew for each, and only its own outdated index goes.
    write_tar(tar, sa1b_files([1, 2, 3]))
    assert numbers(ImagesSource(tar)) == [1, 2, 3]
    assert len(list(tmp_path.glob("*.npy"))) == 2
    assert len(Sa1bSource(tar)) == 3
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_a_tar_cut_short_keeps_what_is_whole(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"1.png": png(1), "2.png": png(2)})
    content = tar.read_bytes()
    tar.write_bytes(content[: 512 + len(png(1)) // 2])
    with pytest.raises(CorruptSampleError, match="truncated tar"):
        ImagesSource(tar)[0]


def test_places_without_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(ConfigError, match=r"no picture in .*pictures end in .*\.png"):
        ImagesSource(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing at"):
        ImagesSource(tmp_path / "gone")
    with pytest.raises(ConfigError, match="not an uncompressed tar"):
        ImagesSource(tmp_path / "notes.txt")
