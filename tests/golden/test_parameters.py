"""Path and shape of every parameter of every variant, and how many numbers they hold.

``SAM_JAX_UPDATE_GOLDEN=1 python -m pytest tests/golden/test_parameters.py`` writes the files again.
A change of a path or a shape breaks every checkpoint there is: bring the old ones along.
"""

import os
from pathlib import Path

import jax
import pytest
from flax.traverse_util import flatten_dict

from sam_jax.models.sam import Sam, init_variables
from sam_jax.models.variants import VARIANTS

FOLDER = Path(__file__).parent
# Of `params` alone; tests/parity compares the last three with the published code's.
COUNTS = {
    "vit_ti": 6_498_560,
    "vit_s": 26_783_408,
    "vit_b": 93_735_472,
    "vit_l": 312_342_832,
    "vit_h": 641_090_608,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_paths_shapes_and_count(variant: str) -> None:
    variables = jax.eval_shape(lambda: init_variables(Sam(VARIANTS[variant]), jax.random.key(0)))
    assert variables.keys() == {"params", "constants"}
    leaves = flatten_dict(variables, sep="/")
    assert {str(leaf.dtype) for leaf in leaves.values()} == {"float32"}
    text = "".join(f"{path} {leaf.shape}\n" for path, leaf in sorted(leaves.items()))
    path = FOLDER / f"parameters_{variant}.txt"
    if os.environ.get("SAM_JAX_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == COUNTS[variant]


def test_every_file_belongs_to_a_variant() -> None:
    names = {path.stem.removeprefix("parameters_") for path in FOLDER.glob("parameters_*.txt")}
    assert names == set(VARIANTS) == set(COUNTS)
