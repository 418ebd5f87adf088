"""Grid attention: the definition in numpy, and one suite for all implementations."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.ops import attention
from sam_jax.ops.attention import Implementation, grid_attention

# "auto" is one of these.
implementations = pytest.mark.parametrize("implementation", ["reference", "extended", "chunked"])


def inputs(
    grid: tuple[int, int], entries: tuple[int, int] | None, b: int = 2, a: int = 2, c: int = 6
) -> list[Any]:
    rng = np.random.default_rng([*grid, b, a, c])
    shapes = [(b, *grid, a, c)] * 3
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    tables = [rng.standard_normal((size, c)).astype(np.float32) for size in entries or ()]
    return [jnp.asarray(x) for x in arrays + tables] + [None] * (0 if entries else 2)


def definition(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, rel_h: np.ndarray | None, rel_w: np.ndarray | None
) -> np.ndarray:
    """One query cell at a time, in float64; tables have exactly 2 * size - 1 entries."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, gh, gw, a, c = q.shape
    out = np.zeros_like(q)
    for image, row, column, head in np.ndindex(b, gh, gw, a):
        query = q[image, row, column, head]
        logits = k[image, :, :, head] @ query / np.sqrt(c)
        if rel_h is not None and rel_w is not None:
            for key_row, key_column in np.ndindex(gh, gw):
                logits[key_row, key_column] += query @ rel_h[row - key_row + gh - 1]
                logits[key_row, key_column] += query @ rel_w[column - key_column + gw - 1]
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        out[image, row, column, head] = np.einsum("ij,ijc->c", weights, v[image, :, :, head])
    return out


@implementations
@pytest.mark.parametrize("entries", [(5, 9), None], ids=["positions", "plain"])
def test_definition(implementation: Implementation, entries: tuple[int, int] | None) -> None:
    args = inputs((3, 5), entries)
    ours = jax.jit(grid_attention, static_argnames="implementation")(
        *args, implementation=implementation
    )
    expected = definition(*(None if x is None else np.asarray(x) for x in args))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


# 16 rows make two chunks; 11 is a prime; 12 is no multiple of the chunk, and its tables were made
# for another grid.
@pytest.mark.parametrize(
    ("grid", "entries"),
    [((16, 3), (31, 5)), ((11, 4), None), ((12, 7), (9, 21))],
)
def test_lean_forms_equal_reference_with_gradients(
    grid: tuple[int, int], entries: tuple[int, int] | None
) -> None:
    args = inputs(grid, entries)
    weights = inputs(grid, None)[0][..., ::-1]
    differentiable = tuple(i for i, x in enumerate(args) if x is not None)

    @jax.jit
    def both(*args: Any) -> Any:
        def loss(implementation: Implementation, *args: Any) -> Any:
            out = grid_attention(*args, implementation=implementation)
            return jnp.sum(out * weights), out

        return [
            jax.value_and_grad(lambda *a, i=i: loss(i, *a), argnums=differentiable, has_aux=True)(
                *args
            )
            for i in ("reference", "extended", "chunked")
        ]

    reference, *lean = both(*args)
    assert np.isfinite(jax.tree.leaves(reference)[0])
    for expected, ours in itertools.chain.from_iterable(
        zip(jax.tree.leaves(reference), jax.tree.leaves(form), strict=True) for form in lean
    ):
        scale = np.abs(expected).max()
        assert scale > 0.1
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * scale)


@implementations
def test_half_precision_keeps_its_logits_in_full(implementation: Implementation) -> None:
    """Large position terms would lose whole units in bfloat16."""
    args = [x.astype(jnp.bfloat16) for x in inputs((4, 6), (7, 11))]
    args[3] *= 8
    args[4] *= 8
    ours = jax.jit(grid_attention, static_argnames="implementation")(
        *args, implementation=implementation
    )
    assert ours.dtype == jnp.bfloat16
    exact = definition(*(np.asarray(x, np.float64) for x in args))
    # Weights and outputs are rounded to 8 bits each, logits are not.
    np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=0, atol=0.03)


@implementations
def test_large_logits_have_finite_gradients(implementation: Implementation) -> None:
    args = [1e4 * x for x in inputs((4, 3), (7, 5))]
    gradients = jax.jit(
        jax.grad(
            lambda *a: jnp.sum(grid_attention(*a, implementation=implementation)),
            argnums=range(5),
        )
    )(*args)
    assert all(np.isfinite(x).all() for x in gradients)


def largest_intermediate(closed: Any) -> int:
    sizes = []

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            sizes.extend(out.aval.size for out in equation.outvars if hasattr(out.aval, "size"))
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(closed.jaxpr)
    return max(sizes)


def test_auto_holds_no_matrix_of_a_large_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    large = [jax.ShapeDtypeStruct((1, 40, 64, 2, 4), jnp.float32)] * 3 + [None] * 2
    matrix = 2 * (40 * 64) ** 2
    rows = attention.QUERY_ROWS_PER_CHUNK * 64 * (40 * 64)
    jaxpr = jax.make_jaxpr(lambda q, k, v: grid_attention(q, k, v, None, None))(*large[:3])
    assert largest_intermediate(jaxpr) == rows
    small = [jax.ShapeDtypeStruct((1, 14, 14, 2, 4), jnp.float32)] * 3
    jaxpr = jax.make_jaxpr(lambda q, k, v: grid_attention(q, k, v, None, None))(*small)
    assert largest_intermediate(jaxpr) == 2 * (14 * 14) ** 2
    assert rows < matrix / 8
