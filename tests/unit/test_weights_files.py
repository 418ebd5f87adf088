"""Files of tensors: what is wrong with one is said, nothing in it runs, nothing half is left."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sam_jax.weights.files import (
    SAFETENSORS,
    SAFETENSORS_INDEX,
    WeightsError,
    read_tensors,
    write_safetensors,
    written_whole,
)

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.int64),
    "c": np.array(3.0, np.float32),
}


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {**TENSORS, "a": TENSORS["a"].T})
    assert_same(read_tensors(path), {**TENSORS, "a": TENSORS["a"].T})
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_bfloat16_comes_as_float32_and_half_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(
        {"b": TENSORS["a"].astype(ml_dtypes.bfloat16), "h": TENSORS["a"].astype(np.float16)}, path
    )
    found = read_tensors(path)
    assert found["b"].dtype == np.float32
    assert found["h"].dtype == np.float16
    np.testing.assert_array_equal(found["b"], TENSORS["a"])


def test_shards_are_one(tmp_path: Path) -> None:
    for number, name in enumerate(TENSORS):
        safetensors.numpy.save_file({name: TENSORS[name]}, tmp_path / f"m-{number}.safetensors")
    index = {"weight_map": {name: f"m-{i}.safetensors" for i, name in enumerate(TENSORS)}}
    (tmp_path / SAFETENSORS_INDEX).write_text(json.dumps(index))
    assert_same(read_tensors(tmp_path), TENSORS)
    (tmp_path / "m-1.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"m-1\.safetensors is missing: shard 2 of 3"):
        read_tensors(tmp_path)
    (tmp_path / SAFETENSORS_INDEX).write_text("[]")
    with pytest.raises(WeightsError, match="weight_map"):
        read_tensors(tmp_path)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    safetensors.numpy.save_file(TENSORS, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="is missing"):
        read_tensors(folder)


@pytest.mark.parametrize("keep", [0, 4, 20, 150])
def test_a_file_cut_short_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / SAFETENSORS
    write_safetensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=rf"model\.safetensors is damaged.* \({keep} bytes\)"):
        read_tensors(path)


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        read_tensors(tmp_path / "no.safetensors")
    with pytest.raises(WeightsError, match="holds no weights"):
        read_tensors(tmp_path)
    picture = tmp_path / "cat.xyz"
    picture.write_bytes(b"\x01\x02\x03")
    with pytest.raises(WeightsError, match=r"expected a file that ends in \.safetensors"):
        read_tensors(picture)


def test_what_was_there_stays_if_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("old")

    def fail() -> None:
        with written_whole(path) as unfinished:
            unfinished.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(WeightsError, match=r"x\.safetensors: No space left.*nothing of it is left"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_links_are_followed_and_empty_folders_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    real.write_text("old")
    link.symlink_to(real)
    write_safetensors(link, TENSORS)
    assert_same(read_tensors(real), TENSORS)
    assert link.is_symlink()

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with written_whole(Path()) as unfinished:
        unfinished.mkdir()
        (unfinished / "file").touch()
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["file"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with written_whole(tmp_path / "folder") as unfinished:
            unfinished.mkdir()
            (unfinished / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_never_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "folder" / "precious"
    precious.parent.mkdir()
    precious.touch()

    def write() -> None:
        with written_whole(precious.parent) as unfinished:
            unfinished.mkdir()

    with pytest.raises(WeightsError, match="could not write"):
        write()
    assert precious.exists()
    assert list(tmp_path.iterdir()) == [precious.parent]


class TestTorch:
    """PyTorch's files."""

    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch", reason="needs requirements-torch.lock")

    def state(self, torch):
        return {name: torch.tensor(array) for name, array in TENSORS.items()}

    def test_round_trip_in_place(self, torch, tmp_path: Path) -> None:
        from sam_jax.weights.files import write_torch

        path = tmp_path / "x.pth"
        write_torch(path, {**TENSORS, "a": TENSORS["a"].T})
        assert_same(read_tensors(path), {**TENSORS, "a": TENSORS["a"].T})
        assert torch.load(path, weights_only=True)["a"].is_contiguous()

    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict"])
    def test_tensors_are_found_in_what_training_leaves(
        self, torch, tmp_path: Path, wrapper: str, legacy: bool
    ) -> None:
        import argparse

        path = tmp_path / "x.pth"
        content = {
            wrapper: self.state(torch),
            "epoch": 3,
            "optimizer": {"state": {}},
            "args": argparse.Namespace(lr=0.1),
        }
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        assert_same(read_tensors(path), TENSORS)

    def test_bfloat16(self, torch, tmp_path: Path) -> None:
        path = tmp_path / "x.pth"
        torch.save({"a": torch.tensor(TENSORS["a"], dtype=torch.bfloat16)}, path)
        assert_same(read_tensors(path), {"a": TENSORS["a"]})

    def test_a_file_without_tensors_says_what_it_holds(self, torch, tmp_path: Path) -> None:
        path = tmp_path / "x.pth"
        torch.save({"epoch": 3}, path)
        with pytest.raises(WeightsError, match="holds a mapping with 'epoch'"):
            read_tensors(path)
        torch.save([1, 2], path)
        with pytest.raises(WeightsError, match="holds a list"):
            read_tensors(path)

    @pytest.mark.parametrize("legacy", [False, True])
    def test_a_malicious_pickle_does_not_run(self, torch, tmp_path: Path, legacy: bool) -> None:
        evil, loot = tmp_path / "evil.pth", tmp_path / "loot"

        class Malice:
            def __reduce__(self):
                return Path.touch, (loot,)

        content = {"state_dict": self.state(torch), "hook": Malice()}
        torch.save(content, evil, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(WeightsError, match=r"evil\.pth is refused.*nothing in it was run"):
            read_tensors(evil)
        assert not loot.exists()
        # The trap works where it is not guarded against.
        torch.load(evil, weights_only=False)
        assert loot.exists()

    def test_a_bare_malicious_pickle_does_not_run(self, torch, tmp_path: Path) -> None:
        evil, loot = tmp_path / "evil.bin", tmp_path / "loot"

        class Malice:
            def __reduce__(self):
                return Path.touch, (loot,)

        evil.write_bytes(pickle.dumps(Malice(), protocol=2))
        with pytest.raises(WeightsError, match=r"evil\.bin"):
            read_tensors(evil)
        assert not loot.exists()

    def test_tensors_beside_a_wrapper_are_no_weights(self, torch, tmp_path: Path) -> None:
        path = tmp_path / "x.pth"
        torch.save({"best_loss": torch.tensor(0.3), "model": self.state(torch)}, path)
        assert_same(read_tensors(path), TENSORS)

    def test_settings_under_the_name_of_a_wrapper_hide_nothing(self, torch, tmp_path: Path) -> None:
        path = tmp_path / "x.pth"
        settings = {"name": "vit_b", "model": {"image_size": 1024}}
        torch.save({"model": settings, "state_dict": self.state(torch)}, path)
        assert_same(read_tensors(path), TENSORS)

    def test_a_type_that_numpy_has_not_is_named(self, torch, tmp_path: Path) -> None:
        path = tmp_path / "x.pth"
        torch.save({"a": torch.zeros(3).to(torch.float8_e4m3fn)}, path)
        with pytest.raises(WeightsError, match=r"x\.pth: a is .*float8_e4m3fn"):
            read_tensors(path)

    @pytest.mark.parametrize("legacy", [False, True])
    def test_flipped_bytes_end_in_a_message_or_do_no_harm(
        self, torch, tmp_path: Path, legacy: bool
    ) -> None:
        path = tmp_path / "x.pth"
        torch.save(self.state(torch), path, _use_new_zipfile_serialization=not legacy)
        whole, rng = path.read_bytes(), np.random.default_rng(0)
        refused = 0
        for place in rng.integers(0, len(whole), 200):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            try:
                read_tensors(path)
            except WeightsError:
                refused += 1
        assert refused > 10

    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
    def test_a_file_cut_short_is_named(
        self, torch, tmp_path: Path, share: float, legacy: bool
    ) -> None:
        path = tmp_path / "x.pth"
        torch.save(self.state(torch), path, _use_new_zipfile_serialization=not legacy)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(WeightsError, match=r"x\.pth is (damaged|refused: it is damaged)"):
            read_tensors(path)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    """A limit on the size of files fails a write as a full disk does."""
    if suffix == "pth":
        pytest.importorskip("torch", reason="needs requirements-torch.lock")
    script = f"""
import resource, signal, numpy, pathlib
from sam_jax.weights import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
write = files.write_torch if "{suffix}" == "pth" else files.write_safetensors
try:
    write(pathlib.Path("{tmp_path}/x.{suffix}"), {{"a": numpy.zeros(2**20)}})
except files.WeightsError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"could not write {tmp_path}/x.{suffix}" in done.stdout
    assert "nothing of it is left" in done.stdout
    assert not list(tmp_path.iterdir())
