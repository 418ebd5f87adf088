"""One suite for all operations: every form against its reference, values and gradients.

Inputs are the small ones that operations are checked with on a TPU, and further shapes. References
have tests of their own, against definitions in numpy.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_jax.ops
from sam_jax.ops import dispatch
from sam_jax.ops.dispatch import OPERATIONS
from sam_jax.ops.mask_statistics import mask_statistics
from sam_jax.ops.norm import NormWeights
from sam_jax.ops.packed_masks import MaskLayout
from sam_jax.ops.token_attention import AttentionWeights

for module in pkgutil.iter_modules(sam_jax.ops.__path__, "sam_jax.ops."):
    importlib.import_module(module.name)

# Over the largest magnitude. Sums are taken in other orders, and in half precision rounded at other
# places; that is all that forms may differ in. Self-checks on a chip allow for its products too.
TOLERANCES = {"float32": 2e-5, "bfloat16": 0.02}

Examples = list[tuple[tuple[Any, ...], dict[str, Any]]]


def normal(dtype: Any, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), dtype)


def attention_weights(dtype: Any, dim: int, inner: int) -> AttentionWeights:
    inward = [normal(dtype, dim, inner) * dim**-0.5, 0.1 * normal(dtype, inner)]
    outward = [normal(dtype, inner, dim) * inner**-0.5, 0.1 * normal(dtype, dim)]
    return AttentionWeights(*inward * 3, *outward)


def norm_weights(dtype: Any, dim: int) -> NormWeights:
    return NormWeights(1 + 0.1 * normal(dtype, dim), 0.1 * normal(dtype, dim))


def token_attention(dtype: Any) -> Examples:
    """Among tokens; of few to many; of many to few that they share."""
    weights = attention_weights(dtype, 32, 16)
    shapes = [((2, 3, 5), (2, 3, 5)), ((2, 3, 2), (2, 3, 40)), ((2, 1, 40), (2, 3, 2))]
    return [
        (
            (
                weights,
                normal(dtype, *queries, 32),
                normal(dtype, *keys, 32),
                normal(dtype, *keys, 32),
                jnp.arange(keys[2]) < jnp.arange(1, 4)[:, None] * jnp.ones((2, 1, 1), int),
            ),
            {"num_heads": 4},
        )
        for queries, keys in shapes
    ]


def token_to_image(dtype: Any) -> Examples:
    """Several images, and an odd number of tokens."""
    args = normal(dtype, 2, 3, 5, 128), normal(dtype, 2, 3, 128, 128), normal(dtype, 128, 128)
    return [((attention_weights(dtype, 128, 64), *args), {"num_heads": 8})]


def image_to_token(dtype: Any) -> Examples:
    """Image tokens that all objects of an image share, and tokens of which some are invalid."""
    tokens = normal(dtype, 2, 3, 5, 128)
    args = (
        attention_weights(dtype, 128, 64),
        norm_weights(dtype, 128),
        normal(dtype, 2, 1, 128, 128),
        normal(dtype, 128, 128),
        tokens,
        tokens,
        jnp.arange(5) < jnp.array([[[5], [3], [1]]] * 2),
        jnp.arange(6, dtype=jnp.int32).reshape(2, 3),
    )
    return [(args, {"num_heads": 8, "dropout_rate": 0.3, "norm_epsilon": 1e-5})]


# Windows that divide the grid, and ones that do not, at another width.
WINDOWS = [((2, 16, 16, 128), 8), ((1, 5, 32, 256), 6)]


def norm_partition(dtype: Any) -> Examples:
    """Far from zero, where a variance has few digits."""
    return [
        (
            (3 + normal(dtype, *shape), norm_weights(dtype, shape[-1])),
            {"window_size": size, "epsilon": 1e-6},
        )
        for shape, size in WINDOWS
    ]


def unpartition_add_norm(dtype: Any) -> Examples:
    """Examples whose windows hold values for padding, which are left out."""
    examples: Examples = []
    for shape, size in WINDOWS:
        b, gh, gw, dim = shape
        num_windows = b * -(-gh // size) * -(-gw // size)
        windows = normal(dtype, num_windows, size, size, dim)
        args = normal(dtype, *shape), windows, norm_weights(dtype, dim)
        examples.append((args, {"epsilon": 1e-6}))
    return examples


def mask_statistic_examples(dtype: Any) -> Examples:
    """Another scale and grid, padding in both directions, a power that is not whole."""
    del dtype
    rng, layout = np.random.default_rng(0), MaskLayout((24, 16), 2)
    height, width = layout.image_size
    logits = jnp.asarray(rng.normal(0, 4, (2, 1, 1, 96, 64)).astype(np.float32))
    masks = layout.of_masks(jnp.asarray(rng.random((2, 1, height, width)) < 0.4))
    area = layout.area(jnp.array([[height, width - 5], [height - 9, width]]))
    return [((logits, masks, area), {"mask_layout": layout, "alpha": 0.25, "gamma": 1.5})]


# Shapes that self-checks leave out.
FURTHER: dict[str, Callable[[Any], Examples]] = {
    "token_attention": token_attention,
    "token_to_image_attention": token_to_image,
    "image_to_token_attention": image_to_token,
    "norm_partition": norm_partition,
    "unpartition_add_norm": unpartition_add_norm,
    "mask_statistics": mask_statistic_examples,
}

ALL = [
    pytest.param(name, form, dtype, id=f"{name}-{form}-{dtype}")
    for name, operation in OPERATIONS.items()
    for form in operation.forms
    for dtype in TOLERANCES
    if operation.examples is not None
    # Itself, and what is float32 whatever the model's type is.
    if (form, dtype) != (operation.reference.name, "float32")
    if (name, dtype) != ("mask_statistics", "bfloat16")
    # The strict simulator compares kernels in float32, see test_ops_tpu_kernels.
    if not (operation.forms[form].is_kernel and dtype == "float32")
]


@pytest.mark.parametrize(("name", "form", "dtype"), ALL)
def test_every_form_is_the_reference(name: str, form: str, dtype: str) -> None:
    operation = OPERATIONS[name]
    errors = dispatch.form_errors(
        operation, operation.forms[form], jnp.dtype(dtype), interpret=True
    )
    assert any("outputs" in path for path in errors)
    assert any("gradients" in path for path in errors)
    assert {path: x for path, x in errors.items() if not x <= TOLERANCES[dtype]} == {}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, id=f"{name}-{form}")
        for name in FURTHER
        for form in OPERATIONS[name].forms
        if form != OPERATIONS[name].reference.name
    ],
)
def test_every_form_is_the_reference_at_further_shapes(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = OPERATIONS[name]
    monkeypatch.setattr(operation, "examples", FURTHER[name])
    for args, options in FURTHER[name](jnp.float32):
        assert operation.forms[form].supports(*args, **options)
    errors = dispatch.form_errors(operation, operation.forms[form], jnp.float32, interpret=True)
    assert {path: x for path, x in errors.items() if not x <= TOLERANCES["float32"]} == {}


def test_the_suite_is_no_milder_than_a_self_check() -> None:
    assert TOLERANCES.keys() == dispatch.CHECK_TOLERANCES.keys()
    assert all(TOLERANCES[name] < allowed for name, allowed in dispatch.CHECK_TOLERANCES.items())


def test_every_operation_ends_with_a_form_that_takes_everything() -> None:
    """And kernels take all examples of theirs, or a self-check would check nothing."""
    for operation in OPERATIONS.values():
        *_, last = operation.forms.values()
        assert (last.platforms, last.is_kernel) == (None, False)
        kernels = [form for form in operation.forms.values() if form.is_kernel]
        if kernels:
            assert operation.examples is not None
            for dtype in TOLERANCES:
                for args, options in operation.examples(jnp.dtype(dtype)):
                    assert last.supports(*args, **options)
                    assert last.pays(*args, **options)
                    assert all(form.supports(*args, **options) for form in kernels)


@pytest.mark.parametrize("implementation", OPERATIONS["mask_statistics"].forms)
def test_large_logits_have_finite_statistics_and_gradients(implementation: str) -> None:
    layout = MaskLayout((8, 16), 2)
    logits = 1e4 * normal(jnp.float32, 1, 1, 1, 32, 64)
    masks = layout.of_masks(jnp.asarray(np.random.default_rng(0).random((1, 1, 64, 128)) < 0.5))
    area = layout.area(jnp.array([layout.image_size]))

    @jax.jit
    def run(logits: Any) -> Any:
        def total(logits: Any) -> Any:
            found = mask_statistics(
                logits, masks, area, layout, alpha=0.25, gamma=2.0, implementation=implementation
            )
            return sum(x.sum() for x in found[:3]), found[:3]

        return jax.grad(total, has_aux=True)(logits)

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(logits)))


@pytest.mark.parametrize(
    ("shape", "window_size", "is_supported"),
    [
        ((1, 16, 16, 256), 14, True),
        ((1, 16, 16, 128), 7, False),  # no whole pairs
        ((1, 16, 16, 96), 14, False),  # no whole registers of channels
        ((1, 16, 24, 128), 14, False),  # nor of columns
    ],
)
def test_which_windows_a_kernel_takes(
    shape: tuple[int, ...], window_size: int, is_supported: bool
) -> None:
    form = OPERATIONS["norm_partition"].forms["kernel"]
    options = {"window_size": window_size, "epsilon": 1e-6}
    norm = norm_weights(jnp.float32, shape[-1])
    assert form.supports(jnp.zeros(shape), norm, **options) == is_supported


@pytest.mark.parametrize(("grid", "is_supported"), [((64, 64), True), ((7, 9), False)])
def test_which_masks_a_kernel_takes(grid: tuple[int, int], is_supported: bool) -> None:
    form = OPERATIONS["mask_statistics"].forms["kernel"]
    layout = MaskLayout(grid, 4)
    assert form.supports(mask_layout=layout, alpha=0.25, gamma=2) == is_supported
