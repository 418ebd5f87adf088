"""Places to write to: what cannot be is said, and nothing is left of asking."""

from pathlib import Path

import pytest

from sam_jax import places
from sam_jax.places import PlaceError, check_file, check_folder


def below(root: Path) -> list[tuple[Path, int]]:
    return [(path, path.lstat().st_mtime_ns) for path in sorted([root, *root.rglob("*")])]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "not" / "there")
    (tmp_path / "to a file").symlink_to(tmp_path / "file")
    return tmp_path


@pytest.mark.parametrize(
    ("check", "name", "words"),
    [
        (check_file, "new", None),
        (check_file, "new/folder/file [1]*?.png", None),
        (check_file, "file", None),
        (check_file, "dangling", None),
        (check_file, "x" * 255, None),
        (check_file, "folder", "is a folder"),
        (check_file, "file/below", "cannot be written: Not a directory"),
        (check_file, "file/below/more", "cannot be written: Not a directory"),
        (check_file, "x" * 256, "File name too long"),
        (check_file, f"new/{'ü' * 128}", "has 256 bytes"),
        (check_file, f"{'x' * 255}/{'x' * 256}", "has 256 bytes"),
        (check_file, f"new/{'x' * 256}/file", "has 256 bytes"),
        (check_folder, "folder", None),
        (check_folder, "new/folder", None),
        (check_folder, "file", "is a file"),
        (check_folder, "to a file", "is a file"),
        (check_folder, "to a file/eval", "Not a directory"),
    ],
)
def test_what_cannot_be_written_is_said(root: Path, check, name: str, words: str | None) -> None:
    before = below(root)
    if words is None:
        check(root / name)
    else:
        with pytest.raises(PlaceError, match=words):
            check(root / name)
    assert below(root) == before


@pytest.mark.parametrize("check", [check_file, check_folder])
def test_a_file_system_that_takes_nothing(check) -> None:
    with pytest.raises(PlaceError, match=r"/proc/new cannot be written: /proc"):
        check(Path("/proc/new"))


def test_devices_are_files() -> None:
    check_file(Path("/dev/null"))


def test_lines_are_appended_after_whole_ones(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    places.append_line(path, "one")
    with path.open("a") as file:
        file.write("cut o")
    places.append_line(path, "two")
    places.append_line(path, "drei ü")
    assert path.read_text(encoding="utf-8") == "one\ncut o\ntwo\ndrei ü\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_named() -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        places.append_line(Path("/dev/full"), "line")


def test_a_text_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    places.write_text(path, "first")

    def replace(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match=r"No space left on device: .*config.json"):
        places.write_text(path, "second")
    assert path.read_text() == "first"
