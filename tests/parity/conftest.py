"""The same random weights for the published model and for ours, at tiny widths."""

import dataclasses
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from sam_jax.models.sam import Sam
from tests.golden.tiny import TINY


@dataclasses.dataclass(frozen=True)
class Pair:
    """The published model and ours with equal weights, and two images [2, h, w, 3].

    ``params`` are those of our three parts, by the part's name.
    """

    official: Any
    model: Sam
    variables: dict[str, Any]
    images: np.ndarray

    def part(self, *path: str) -> dict[str, Any]:
        """Variables of a part of our model."""
        return {name: _descend(tree, path) for name, tree in self.variables.items()}


def _descend(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree.get(key, {})
    return tree


@pytest.fixture(scope="session")
def tiny(segment_anything: ModuleType) -> Pair:
    from tests.parity import official

    theirs = official.build(TINY)
    images = np.random.default_rng(0).standard_normal((2, *TINY.image_encoder.image_size, 3))
    return Pair(
        theirs, Sam(TINY), official.native_variables(theirs, TINY), images.astype(np.float32)
    )


@pytest.fixture(scope="session")
def tiny_embeddings(tiny: Pair) -> np.ndarray:
    """The published encoder's embeddings of the two images."""
    from tests.parity import official

    return official.encode(tiny.official, tiny.images)


@pytest.fixture(autouse=True)
def _precise() -> Any:
    with jax.default_matmul_precision("highest"):
        yield
