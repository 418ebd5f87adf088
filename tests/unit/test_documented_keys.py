"""Keys of configs that the documentation and the configs' own texts name are there."""

import dataclasses
import re
from pathlib import Path

import pytest

from configs.common import SECTIONS, TASK_SECTIONS
from sam_jax.evaluation.kinds import KINDS
from sam_jax.models.image_encoder import ImageEncoderConfig
from sam_jax.models.mask_decoder import MaskDecoderConfig
from sam_jax.models.tiny_vit import TinyViTConfig

ROOT = Path(__file__).parents[2]
TEXTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "configs").glob("*.py")),
    *sorted(path for path in (ROOT / "launch").iterdir() if path.is_file()),
]
PARTS = {
    **SECTIONS,
    **{name: cls for task in TASK_SECTIONS.values() for name, cls in task.items()},
}
FIELDS = {name: {field.name for field in dataclasses.fields(cls)} for name, cls in PARTS.items()}
# Fields of a model that have fields of their own.
FIELDS["model.encoder"] = {
    field.name for cls in (ImageEncoderConfig, TinyViTConfig) for field in dataclasses.fields(cls)
}
FIELDS["model.decoder"] = {field.name for field in dataclasses.fields(MaskDecoderConfig)}
OF_EVALUATIONS = {
    field.name for kind in KINDS.values() for field in dataclasses.fields(kind.config)
}

FLAG = re.compile(r"--config\.([a-z_]+(?:\.[a-z_0-9]+)+)")
KEY = re.compile(rf"`(?:config\.)?((?:{'|'.join(PARTS)})(?:\.[a-z_0-9]+)+)(?:\s*=[^`]*)?`")
FILES = re.compile(r"\.(json|jsonl|py|safetensors|npy|zip|tar|txt|sbatch|png|md)$")


def named_keys(text: str) -> set[str]:
    """Keys of flags, and of what stands in backticks and is no file."""
    return set(FLAG.findall(text)) | {key for key in KEY.findall(text) if not FILES.search(key)}


def is_there(key: str) -> bool:
    """True if a config has this key."""
    section, _, field = key.partition(".")
    if section == "evals":
        return key.rpartition(".")[2] in OF_EVALUATIONS
    if field.partition(".")[0] in ("encoder", "decoder") and "." in field:
        section, field = key.rsplit(".", 1)
    return field in FIELDS.get(section, ())


def test_keys_are_found_and_judged() -> None:
    text = "`train.json`, `train.length`, --config.model.encoder.depth=2 and `lora.rank=0`"
    assert named_keys(text) == {"train.length", "model.encoder.depth", "lora.rank"}
    assert [is_there(key) for key in sorted(named_keys(text))] == [True, True, False]
    assert is_there("evals.any.max_images")
    assert not is_there("model.encoder.detph")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_the_keys_of_a_text_are_those_of_configs(path: Path) -> None:
    missing = sorted(key for key in named_keys(path.read_text()) if not is_there(key))
    assert missing == []
