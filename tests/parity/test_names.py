"""The conversion table and the parameter counts against the published models at full size."""

from types import ModuleType

import jax
import numpy as np
import pytest

from sam_jax.models.sam import Sam, init_variables
from sam_jax.models.variants import VARIANTS
from sam_jax.weights.names import from_native, to_native
from tests.parity import official

pytestmark = pytest.mark.parity

torch = official.torch


@pytest.mark.parametrize("variant", ["vit_b", "vit_l", "vit_h"])
def test_names_shapes_and_counts(segment_anything: ModuleType, variant: str) -> None:
    with torch.device("meta"):
        theirs = segment_anything.sam_model_registry[variant]()
    template = jax.eval_shape(lambda: init_variables(Sam(VARIANTS[variant]), jax.random.key(0)))
    ours = sum(leaf.size for leaf in jax.tree.leaves(template["params"]))
    assert ours == sum(parameter.numel() for parameter in theirs.parameters())

    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    # Arrays without memory of their own: one zero, seen everywhere.
    zeros = {name: np.broadcast_to(np.int8(0), shape) for name, shape in shapes.items()}
    native = to_native(zeros, template)
    assert {name: array.shape for name, array in from_native(native).items()} == shapes
