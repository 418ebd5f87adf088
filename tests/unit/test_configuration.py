"""Configs are strict."""

import dataclasses

import pytest

from sam_jax.configuration import from_mapping
from sam_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Experiment:
    steps: int
    boundaries: tuple[int, ...] = ()
    rate: float = 1.0
    limit: int | None = 3

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate must not be negative, got {self.rate}")


def test_what_may_be_none_is_none():
    assert from_mapping(Experiment, {"steps": 3, "limit": None}, "recipe").limit is None


def test_lists_become_tuples():
    assert from_mapping(Experiment, {"steps": 3, "boundaries": [1, 2]}, "recipe") == Experiment(
        3, (1, 2)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 3, "raet": 1.0}, r"config.recipe has no field 'raet'; did you mean 'rate'\?"),
        (
            {"steps": 3, "colour": 1},
            "no field 'colour'; there are steps, boundaries, rate, limit",
        ),
        ({"rate": 1.0}, "config.recipe lacks the field 'steps'"),
        ({"steps": None}, "config.recipe.steps cannot be None"),
        ({"steps": 3, "rate": -1.0}, "config.recipe: rate must not be negative, got -1.0"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(Experiment, values, "recipe")
