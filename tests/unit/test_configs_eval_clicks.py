"""The config of the evaluation from clicks: which sets it takes, and what it says of others."""

from pathlib import Path

import numpy as np
import pytest

from configs.eval_clicks import get_config
from sam_jax.configuration import from_mapping
from sam_jax.errors import ConfigError
from sam_jax.evaluation.prompted import EvalConfig, PromptedMasks
from sam_jax.evaluation.zero_shot_sets import ZERO_SHOT_SETS
from tests.unit.data_fixtures import write_coco
from tests.unit.zero_shot_fixtures import write_set


def opened(argument: str) -> tuple[EvalConfig, PromptedMasks]:
    section = get_config(argument).to_dict()["evals"]["clicks"]
    assert section.pop("kind") == "prompts"
    config = from_mapping(EvalConfig, section, "evals.clicks")
    return config, PromptedMasks(config)


def test_the_protocol_is_the_papers(tmp_path: Path) -> None:
    write_set(ZERO_SHOT_SETS[1], tmp_path)
    config, _ = opened(str(tmp_path))
    assert config.protocols == ("center", "random")
    assert config.num_clicks == (1, 2, 3, 5, 9)
    assert (config.target_masks, config.seed) == (10_000, 0)
    assert config.max_images is config.max_masks_per_image is None


def test_all_23_sets_open_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for one in ZERO_SHOT_SETS:
        write_set(one, tmp_path)
    config, evaluation = opened(str(tmp_path))
    assert [source.name for source in config.sources] == [one.name for one in ZERO_SHOT_SETS]
    # One image for each part.
    assert len(evaluation) == sum(len(one.parts) for one in ZERO_SHOT_SETS)
    assert "missing" not in caplog.text


def test_missing_sets_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("NDD20", "DRAM"):
        write_set(next(one for one in ZERO_SHOT_SETS if one.name == name), tmp_path)
    (tmp_path / "mine").mkdir()
    config, _ = opened(str(tmp_path))
    assert [source.name for source in config.sources] == ["NDD20", "DRAM"]
    assert (
        "21 of 23 data sets are missing, and no part of the mean: PPDLS, BBBC038v1" in caplog.text
    )
    assert "1 other folders are none of the paper's 23 data sets" in caplog.text
    caplog.clear()
    config, _ = opened(f"{tmp_path}:dram, LVIS")
    assert [source.name for source in config.sources] == ["DRAM"]
    assert "1 of 2 data sets are missing, and no part of the mean: LVIS" in caplog.text
    with pytest.raises(ConfigError, match="has none of LVIS"):
        get_config(f"{tmp_path}:LVIS")
    with pytest.raises(ConfigError, match="did you mean 'DRAM'"):
        get_config(f"{tmp_path}:DRAMA")


def test_a_set_that_is_there_in_part_is_an_error_and_no_missing_set(tmp_path: Path) -> None:
    (tmp_path / "LVIS").mkdir()
    with pytest.raises(FileNotFoundError, match="val2017"):
        opened(str(tmp_path))


def test_folders_of_ones_own_sets(tmp_path: Path) -> None:
    for name in ("birds", "cats"):
        write_coco(tmp_path / name, 2).rename(tmp_path / name / "val.json")
    config, evaluation = opened(str(tmp_path))
    assert [source.name for source in config.sources] == ["birds", "cats"]
    assert len(evaluation) == 4
    config, _ = opened(f"{tmp_path}:cats")
    assert [source.name for source in config.sources] == ["cats"]
    with pytest.raises(ConfigError, match="no data set dogs; there are birds, cats"):
        get_config(f"{tmp_path}:dogs")
    (tmp_path / "empty").mkdir()
    for argument in ("", str(tmp_path / "elsewhere")):
        with pytest.raises(FileNotFoundError, match=r"configs/eval_clicks\.py:FOLDER"):
            get_config(argument)
    with pytest.raises(FileNotFoundError, match=r"no \*/val.json"):
        get_config(str(tmp_path / "empty"))


def test_images_are_drawn_until_there_are_enough_masks(tmp_path: Path) -> None:
    write_coco(tmp_path / "birds", 30).rename(tmp_path / "birds" / "val.json")
    section = get_config(str(tmp_path)).to_dict()["evals"]["clicks"]
    del section["kind"]

    def names(**changes: int) -> list[str]:
        config = from_mapping(EvalConfig, section | changes, "evals.clicks")
        evaluation = PromptedMasks(config)
        assert evaluation.settings["num_images"] == {"birds": len(evaluation)}
        return [source[index].name for source, index in evaluation._places]

    assert len(names()) == len(names(target_masks=20)) == 30
    drawn = names(target_masks=19)
    assert len(drawn) == 19
    assert set(drawn) != set(names(target_masks=19, seed=1))
    assert set(names(target_masks=5)) < set(drawn)
    assert len(names(target_masks=19, max_images=3)) == 3
    assert set(names(target_masks=19, max_images=3)) < set(drawn)
    with pytest.raises(ConfigError, match="target_masks"):
        names(target_masks=0)
    assert np.unique(names()).size == 30
