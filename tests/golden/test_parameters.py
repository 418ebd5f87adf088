"""Path and shape of every parameter of every variant, and how many numbers they hold.

``SAM_JAX_UPDATE_GOLDEN=1 python -m pytest tests/golden/test_parameters.py`` writes the file again.
A change of a path or a shape breaks every checkpoint there is: bring the old ones along.
"""

from pathlib import Path

import jax
from flax.traverse_util import flatten_dict

from sam_jax.models.sam import Sam, init_variables
from sam_jax.models.variants import VARIANTS
from tests.golden.tables import assert_unchanged, folded

# Of `params` alone; tests/parity compares the last three with the published code's.
COUNTS = {
    "vit_ti": 6_498_560,
    "vit_s": 26_783_408,
    "vit_b": 93_735_472,
    "vit_l": 312_342_832,
    "vit_h": 641_090_608,
    "mobile_sam": 9_803_524,
}


def test_paths_shapes_and_counts() -> None:
    tables, counts = {}, {}
    for variant, config in VARIANTS.items():
        variables = jax.eval_shape(lambda c=config: init_variables(Sam(c), jax.random.key(0)))
        assert variables.keys() == {"params", "constants"}
        leaves = flatten_dict(variables, sep="/")
        assert {str(leaf.dtype) for leaf in leaves.values()} == {"float32"}
        tables[variant] = folded({path: f"{leaf.shape}" for path, leaf in leaves.items()})
        counts[variant] = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert_unchanged(Path(__file__).with_name("parameters.txt"), tables)
    assert counts == COUNTS


def test_a_line_names_all_blocks_of_which_it_holds() -> None:
    facts = {f"a/block_{n:02d}/b": "wide" if n == 9 else "narrow" for n in range(12)}
    facts |= {"a/block_01/c": "1", "a/layer_0/c": "1", "d": "1"}
    assert folded(facts) == [
        "a/block_{00-08,10-11}/b narrow",
        "a/block_{01}/c 1",
        "a/block_{09}/b wide",
        "a/layer_{0}/c 1",
        "d 1",
    ]
