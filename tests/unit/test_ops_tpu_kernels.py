"""TPU kernels without a TPU: each compiled by its compiler, and run in the strict simulator."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

import sam_jax.ops.tpu
from sam_jax import losses  # noqa: F401 - registers what the model does not use
from sam_jax.cost_report import devices_of
from sam_jax.models import sam  # noqa: F401 - registers the model's operations
from sam_jax.ops import dispatch

KERNELS = {
    f"{operation.name}-{form.name}": (operation, form)
    for operation in dispatch.OPERATIONS.values()
    for form in operation.forms.values()
    if form.is_kernel
}
kernels = pytest.mark.parametrize(("operation", "form"), KERNELS.values(), ids=KERNELS)

# As tests/unit/test_ops_implementations.py has it for what is no kernel.
TOLERANCE = 2e-5
STRICT = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


def test_every_kernel_is_in_a_table() -> None:
    """Whoever writes a kernel gives it a form, or it is never checked."""
    folder = Path(sam_jax.ops.tpu.__path__[0])
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "kernel", "per_token"}
    assert len(KERNELS) >= len(modules) > 0


@kernels
def test_the_strict_simulator_finds_nothing(
    operation: dispatch.Operation, form: dispatch.Form
) -> None:
    """No race, nothing read before it was written or out of bounds, forward and backward.

    And the reference's values and gradients, to float32's rounding.
    """
    errors = dispatch.form_errors(operation, form, jnp.dtype("float32"), interpret=STRICT)
    assert not interpret_pallas_call.races.races_found
    assert any("outputs" in path for path in errors)
    assert any("gradients" in path for path in errors)
    assert {path: x for path, x in errors.items() if not x <= TOLERANCE} == {}


@pytest.fixture(scope="module")
def v5e(tpu_compiler: None) -> Any:
    devices, _ = devices_of("v5e:1x1")
    return devices[0]


@kernels
def test_every_kernel_compiles_for_a_tpu(
    operation: dispatch.Operation, form: dispatch.Form, v5e: jax.Device
) -> None:
    """Forward and backward in half precision, by the compiler of a v5e's programs."""
    assert operation.examples is not None
    for args, kwargs in operation.examples(jnp.dtype("bfloat16")):
        if not form.supports(*args, **kwargs):
            continue
        options = {**kwargs, "interpret": False}
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(v5e)),
            args,
        )
        text = (
            jax.jit(
                lambda args, options=options: dispatch.values_and_gradients(
                    form.function, args, **options
                )
            )
            .lower(shapes)
            .compile()
            .as_text()
        )
        assert text is not None
        assert text.count("tpu_custom_call") >= 2
