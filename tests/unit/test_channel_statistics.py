"""Statistics of channels against numpy's, and the command that prints them."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sam_jax.channel_statistics import ChannelTotals, image_files
from sam_jax.cli import app
from sam_jax.errors import ConfigError
from sam_jax.model_config import ModelConfig
from sam_jax.training.experiment import read_config
from tests.unit.data_fixtures import encode_image

TINY = str(Path(__file__).parents[1] / "e2e" / "tiny_run.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images of four channels, far from 0 with a small deviation."""
    rng = np.random.default_rng(0)
    (tmp_path / "below").mkdir()
    for number in range(6):
        shape = (10 + number, 17, 4)
        image = rng.normal((4e4, 100, 5e4, 7), 3, shape).clip(0, 65535).astype(np.uint16)
        stored = np.moveaxis(image, -1, 0) if number % 2 else image
        np.save(tmp_path / ("below" if number > 3 else ".") / f"{number}.npy", stored)
    return tmp_path


def all_pixels(folder: Path) -> np.ndarray:
    images = [np.load(path) for path in sorted(folder.rglob("*.npy"))]
    upright = [np.moveaxis(image, 0, -1) if image.shape[0] == 4 else image for image in images]
    return np.concatenate([image.reshape(-1, 4) for image in upright]).astype(np.float64)


def test_statistics_are_those_of_all_pixels(folder: Path) -> None:
    totals = ChannelTotals()
    for path in image_files([str(folder)]):
        totals.add_file(path)
    found, pixels = totals.statistics(), all_pixels(folder)
    assert totals.num_images == 6
    np.testing.assert_array_equal(found.minimum, pixels.min(axis=0))
    np.testing.assert_array_equal(found.maximum, pixels.max(axis=0))
    np.testing.assert_allclose(found.mean, pixels.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.std, pixels.std(axis=0), rtol=1e-12)


def test_a_small_deviation_far_from_zero_is_not_lost() -> None:
    """A sum of squares would be 1e16, of which float64 has no digit left for 1."""
    totals, rng = ChannelTotals(), np.random.default_rng(0)
    images = [1e8 + rng.normal(0, 0.5, (30, 20, 2)) for _ in range(5)]
    for image in images:
        totals.add(image, Path("x"))
    np.testing.assert_allclose(totals.statistics().std, np.std(np.stack(images), axis=(0, 1, 2)))


def options_of(output: str) -> dict[str, str]:
    """Options as a shell gives them to train.py."""
    (line,) = (line for line in output.splitlines() if line.startswith("--config.model"))
    return dict(word.removeprefix("--config.").split("=", 1) for word in shlex.split(line))


def test_what_is_printed_can_be_pasted(folder: Path) -> None:
    (folder / "bad.npy").write_bytes(b"\x93NUMPY nothing")
    np.save(folder / "nan.npy", np.full((3, 9, 9, 4), np.nan)[0])
    result = CliRunner().invoke(app, ["channels", str(folder)])
    assert result.exit_code == 0, result.output
    assert "6 images, 4 channels, uint16" in result.output
    assert "2 files could not be read" in result.output
    assert "nan.npy has pixels that are not finite" in result.output
    settings = [f"{key}={value}" for key, value in options_of(result.output).items()]
    found = ModelConfig(**read_config(TINY, settings)["model"]).sam.channels
    (folder / "bad.npy").unlink()
    (folder / "nan.npy").unlink()
    pixels = all_pixels(folder)
    assert found.in_chans == 4
    np.testing.assert_allclose(found.pixel_mean, pixels.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.pixel_std, pixels.std(axis=0), rtol=1e-6)


def test_several_paths_and_patterns(folder: Path) -> None:
    names = [path.name for path in image_files([str(folder / "[12].npy"), str(folder / "0.npy")])]
    assert names == ["1.npy", "2.npy", "0.npy"]
    one, again = str(folder / "0.npy"), str(folder)
    assert len(image_files([one, again])) == 6


def test_what_is_wrong_is_said(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    np.save(folder / "9.npy", np.zeros((9, 9, 3)))
    result = CliRunner().invoke(app, ["channels", str(folder)])
    assert isinstance(result.exception, ConfigError)
    for said in ("0.npy has 4 channels", "9.npy has 3"):
        assert said in str(result.exception)
    with pytest.raises(ConfigError, match="no such file or folder"):
        image_files([str(folder / "nowhere*")])
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ConfigError, match="holds no image"):
        image_files([str(empty)])
    (empty / "x.png").write_bytes(b"nothing")
    result = CliRunner().invoke(app, ["channels", str(empty)])
    assert "none of 1 files was read" in str(result.exception)
    (empty / "x.png").write_bytes(encode_image(np.full((8, 8, 3), 7, np.uint8)))
    result = CliRunner().invoke(app, ["channels", str(empty)])
    assert "channel 0, 1, 2 is the same everywhere" in result.output


def test_a_key_stops_it_and_what_was_read_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_file = ChannelTotals.add_file

    def interrupted(self: ChannelTotals, path: Path) -> None:
        if self.num_images == 2:
            raise KeyboardInterrupt
        add_file(self, path)

    monkeypatch.setattr(ChannelTotals, "add_file", interrupted)
    result = CliRunner().invoke(app, ["channels", str(folder)])
    assert result.exit_code == 130
    assert "2 images, 4 channels" in result.output
    assert "stopped: 4 of 6 files were not read" in result.output
