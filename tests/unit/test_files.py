"""Data files of a folder, and the file that a name means."""

import unicodedata
from pathlib import Path, PurePosixPath

import pytest

from sam_jax.errors import ConfigError
from sam_jax.files import NamedFiles, data_files, is_hidden

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Käfig") for form in ("NFC", "NFD"))


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "._a.png",
        ".DS_Store",
        ".ipynb_checkpoints/a-checkpoint.png",
        "sub/.git/a.png",
        "Thumbs.db",
        "__MACOSX/sub/._a.png",
        "__MACOSX/a.png",
        "@eaDir/a.png",
        "$RECYCLE.BIN/a.png",
    ],
)
def test_hidden_files_are_no_data(tmp_path: Path, name: str) -> None:
    assert is_hidden(PurePosixPath(name))
    fill(tmp_path, "a.PNG", "b.txt", "..data/c.png", "dir.d/a.b.png", name)
    found, hidden = data_files(tmp_path, (".png", ".db"))
    assert [path.name for path in found] == ["a.PNG", "a.b.png"]
    assert tmp_path / "..data/c.png" in hidden
    assert (tmp_path / name in hidden) == (Path(name).suffix in (".png", ".db"))


def test_the_folder_itself_may_be_called_anything(tmp_path: Path) -> None:
    folder = fill(tmp_path / ".cache" / "__MACOSX", "a.png")
    assert data_files(folder, [".png"])[0] == [folder / "a.png"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    folder = fill(tmp_path / "z", "real/a.png")
    fill(tmp_path / "outside", "b.png")
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "again").symlink_to(folder / "real")
    (folder / "real" / "loop").symlink_to(folder)
    found = data_files(folder, [".png"])[0]
    assert [path.relative_to(folder).as_posix() for path in found] == ["linked/b.png", "real/a.png"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a.jpg", "a.jpg"),
        ("./a.jpg", "a.jpg"),
        ("sub/a.jpg", "sub/a.jpg"),
        ("sub\\a.jpg", "sub/a.jpg"),
        ("C:\\Users\\me\\pictures\\sub\\a.jpg", "sub/a.jpg"),
        ("/home/me/pictures/sub/a.jpg", "sub/a.jpg"),
        ("pictures/a.jpg", "a.jpg"),
        ("sub%2Fa.jpg", "sub/a.jpg"),
        ("https://x.org/up%20load/sub/a.jpg", "sub/a.jpg"),
        ("one%20two.jpg", "one two.jpg"),
        ("100%25.jpg", "100%25.jpg"),
        ("sub/../a.jpg", "a.jpg"),
        ("../pictures/sub/a.jpg", "sub/a.jpg"),
        ("../../../../a.jpg", "a.jpg"),
        ("A.JPG", "a.jpg"),
        ("Sub/a.JPEG", None),
        ("SUB/A.jpg", "sub/a.jpg"),
        (f"{DECOMPOSED}.jpg", f"{COMPOSED}.jpg"),
        (f"{COMPOSED.upper()}.JPG", f"{COMPOSED}.jpg"),
        ("both.jpg", "both.jpg"),
        ("BOTH.jpg", "BOTH.jpg"),
        ("back\\slash.jpg", "back\\slash.jpg"),
        ("b.jpg", None),
        ("a.jpg\0", None),
        ("\ud800.jpg", None),
        ("x" * 5000, None),
        ("..", None),
        ("/", None),
    ],
)
def test_names_find_their_files(tmp_path: Path, name: str, file: str | None) -> None:
    names = ("a.jpg", "sub/a.jpg", "one two.jpg", "100%25.jpg", "100%.jpg", f"{COMPOSED}.jpg")
    folder = fill(tmp_path / "pictures", *names, "both.jpg", "BOTH.jpg", "back\\slash.jpg")
    fill(tmp_path, "b.jpg")
    assert NamedFiles(folder).find(name) == (None if file is None else folder / file)


def test_absolute_names_within_the_folder_are_exact(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pictures", "a.jpg", "sub/a.jpg")
    assert NamedFiles(folder).find(str(folder / "sub" / "a.jpg")) == folder / "sub" / "a.jpg"


def test_nothing_outside_is_found(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pictures", "c.jpg")
    fill(tmp_path, "secret.jpg")
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "c.jpg/../../secret.jpg"):
        assert NamedFiles(folder).find(name) is None


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("Both.jpg", ("both.jpg", "BOTH.jpg")),
        ("Sub/a.jpg", ("sub/a.jpg", "SUB/a.jpg")),
        (f"{COMPOSED}.JPG", (f"{COMPOSED}.jpg", f"{DECOMPOSED}.jpg")),
    ],
)
def test_what_may_mean_two_files_is_refused(
    tmp_path: Path, name: str, files: tuple[str, str]
) -> None:
    fill(tmp_path, *files)
    for file in files:
        assert NamedFiles(tmp_path).find(file) == tmp_path / file
    with pytest.raises(ConfigError, match=r"may mean .* or .*: write it as") as caught:
        NamedFiles(tmp_path).find(name)
    assert all(str(tmp_path / file) in str(caught.value) for file in files)
