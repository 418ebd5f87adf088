"""The recipes of fine-tuning: data in any form, the shape of any weights, and what is trained."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import pytest

from configs.finetune_recipe import split_of
from sam_jax.checkpoint import CHECKPOINTS, save_config
from sam_jax.data.config import SourceConfig, build_source
from sam_jax.errors import ConfigError, UserError
from sam_jax.model_config import model_config_of
from sam_jax.training.experiment import Experiment, read_config
from tests.golden.tiny import TINY

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, of which only the shape of the model is read."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / CHECKPOINTS).mkdir()
    save_config(folder, {"model": dataclasses.asdict(model_config_of(TINY))})
    return folder


def write_masks(folder: Path, num_images: int) -> None:
    """Pictures with a white square each, as images and masks."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(num_images):
        picture = np.zeros((32, 32), np.uint8)
        picture[8:20, number : number + 12] = 255
        for kind in ("images", "masks"):
            cv2.imwrite(str(folder / kind / f"{number:02d}.png"), picture)


def write_coco(folder: Path, *splits: str) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split in splits:
        (folder / f"{split}.json").write_text(json.dumps({"images": [], "annotations": []}))


def test_data_with_a_split_keep_it(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", "train", "val")
    for data in (tmp_path / "coco", tmp_path / "coco" / "train.json"):
        train, val = split_of(str(data))
        assert (train["kind"], train["name"], val["name"]) == ("coco", "train", "val")
        assert train["path"] == str(tmp_path / "coco" / "train.json")
        assert val["path"] == str(tmp_path / "coco" / "val.json")
        assert train["images"] == val["images"] == str(tmp_path / "coco" / "images")
        assert "share" not in train | val
    for split in ("train", "val"):
        write_masks(tmp_path / "masks" / split, 2)
    train, val = split_of(str(tmp_path / "masks"))
    assert train["masks"] == str(tmp_path / "masks" / "train" / "masks")
    assert val["path"] == str(tmp_path / "masks" / "val" / "images")
    assert "share" not in train | val


def test_a_fifth_is_held_out_of_data_without_a_split(tmp_path: Path) -> None:
    write_masks(tmp_path / "mine", 10)
    sources = [
        build_source(SourceConfig.from_dict(found)) for found in split_of(str(tmp_path / "mine"))
    ]
    names = [{Path(source[index].name).name for index in range(len(source))} for source in sources]
    assert [len(found) for found in names] == [8, 2]
    assert len(names[0] | names[1]) == 10
    assert [source.name for source in sources] == ["train", "val"]
    # Of a COCO file with another name as well, whose images lie beside it.
    write_coco(tmp_path / "coco", "mine")
    (tmp_path / "coco" / "images").rmdir()
    train, val = split_of(str(tmp_path / "coco" / "mine.json"))
    assert (train["share"], val["share"]) == ((0.0, 0.8), (0.8, 1.0))
    assert train["images"] == str(tmp_path / "coco")


@pytest.mark.parametrize("share", [(0.5, 0.5), (0.5, 1.5), (-0.1, 0.5)])
def test_shares_that_are_none_are_refused(share: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="share must be 0 <= first < last <= 1"):
        SourceConfig.from_dict({"kind": "synthetic", "share": share})


def test_a_share_without_an_image_is_refused() -> None:
    config = {"kind": "synthetic", "num_images": 2, "image_size": (32, 32), "share": (0.0, 0.2)}
    with pytest.raises(ConfigError, match=r"\(0.0, 0.2\) of 2 images is none: it takes 3 images"):
        build_source(SourceConfig.from_dict(config))


def experiment_of(method: str, argument: str, *settings: str) -> Experiment:
    return Experiment.of(read_config(f"{CONFIGS}/finetune_{method}.py:{argument}", settings))


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("decoder", {"mask_decoder"}),
        ("lora", {"mask_decoder", "lora"}),
        ("full", {"image_encoder", "prompt_encoder", "mask_decoder"}),
    ],
)
def test_a_recipe_trains_a_part_of_the_weights_model(
    method: str, parts: set[str], weights: Path, tmp_path: Path
) -> None:
    write_masks(tmp_path / "mine", 10)
    experiment = experiment_of(method, f"{tmp_path / 'mine'}:{weights}")
    program = experiment.compiled_step(jax.devices()[:2])
    assert set(program.trained) == parts
    task: Any = experiment.task
    decoder = dataclasses.replace(TINY.mask_decoder, dropout_rate=0.0)
    assert task.model.config == dataclasses.replace(TINY, mask_decoder=decoder)
    assert task.takes_embeddings == (method == "decoder")
    assert experiment.train.init_from == str(weights)


def test_what_is_missing_is_named(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"takes data and weights: .*finetune_lora.py:DATA:WEIGHTS"
    ):
        experiment_of("lora", str(tmp_path))
    with pytest.raises(ConfigError, match="is no data to train on: expected a COCO JSON"):
        experiment_of("lora", f"{tmp_path}:{weights}")
    write_masks(tmp_path / "mine", 1)
    with pytest.raises(UserError, match=r"s3://bucket/x\.pth: weights are read from disks only"):
        experiment_of("lora", f"{tmp_path / 'mine'}:s3://bucket/x.pth")
