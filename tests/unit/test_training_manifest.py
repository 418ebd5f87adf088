"""What a run's folder says of itself."""

import subprocess
from pathlib import Path

from sam_jax.training.manifest import commit_of


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_of_code(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "First")
    found = {"hash": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    assert commit_of(tmp_path) == found
    (tmp_path / "notes.txt").write_text("not of the code")
    assert commit_of(tmp_path) == found
    (tmp_path / "code.py").write_text("a = 2\n")
    assert commit_of(tmp_path) == found | {"dirty": True}
    # Installed inside of somebody else's repository.
    (tmp_path / "site-packages").mkdir()
    assert commit_of(tmp_path / "site-packages") is None
