"""Grid attention: the definition in numpy, and one suite for all implementations."""

import dataclasses
import unittest.mock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.ops import attention
from sam_jax.ops.attention import GRID_ATTENTION, Implementation, grid_attention
from sam_jax.ops.dispatch import Target, tracing_for
from sam_jax.ops.positional import resize_table
from sam_jax.ops.tpu import flash_attention

# "auto" is one of these. Kernels are interpreted where their hardware is not.
FORMS = tuple(GRID_ATTENTION.forms)
implementations = pytest.mark.parametrize("implementation", FORMS)


def inputs(
    grid: tuple[int, int], entries: tuple[int, int] | None, b: int = 2, a: int = 2, c: int = 6
) -> list[Any]:
    """Packed projections and two tables."""
    rng = np.random.default_rng([*grid, b, a, c])
    qkv = rng.standard_normal((b, *grid, 3 * a * c)).astype(np.float32)
    tables = [rng.standard_normal((size, c)).astype(np.float32) for size in entries or ()]
    return [jnp.asarray(x) for x in [qkv, *tables]] + [None] * (0 if entries else 2)


def definition(
    qkv: np.ndarray, rel_h: np.ndarray | None, rel_w: np.ndarray | None, num_heads: int
) -> np.ndarray:
    """One query at a time, in float64; tables have exactly 2 * size - 1 entries."""
    split = np.asarray(qkv, np.float64).reshape(*qkv.shape[:3], 3, num_heads, -1)
    q, k, v = np.moveaxis(split, 3, 0)
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
    return out.reshape(*out.shape[:3], -1)


def run(implementation: Implementation, args: list[Any], num_heads: int) -> Any:
    return jax.jit(grid_attention, static_argnames=("num_heads", "implementation"))(
        *args, num_heads=num_heads, implementation=implementation
    )


# What every form can do: the heads of a window kernel fill whole tiles together, a row of a flash
# kernel's grid is a multiple of eight. 80 channels straddle tiles, as those of ViT-H do.
@implementations
@pytest.mark.parametrize(
    ("b", "grid", "a", "c", "entries"),
    [
        (2, (4, 8), 8, 80, (7, 15)),
        (1, (3, 8), 4, 32, None),
        (2, (5, 8), 2, 64, (9, 21)),
    ],
    ids=["80", "plain", "64-interpolated"],
)
def test_definition(
    implementation: Implementation,
    b: int,
    grid: tuple[int, int],
    a: int,
    c: int,
    entries: tuple[int, int] | None,
) -> None:
    args = inputs(grid, entries, b, a, c)
    ours = run(implementation, args, a)
    exact = list(args)
    if entries is not None:
        exact[1:] = [resize_table(t, size) for t, size in zip(args[1:], grid, strict=True)]
    expected = definition(*(None if x is None else np.asarray(x) for x in exact), num_heads=a)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def value_and_gradients(implementation: Implementation, args: list[Any], num_heads: int) -> Any:
    differentiable = tuple(i for i, x in enumerate(args) if x is not None)
    d = args[0].shape[-1] // 3
    weights = inputs(args[0].shape[1:3], None, args[0].shape[0], 1, d)[0][..., :d]

    def loss(*args: Any) -> Any:
        out = grid_attention(*args, num_heads=num_heads, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    differentiated = jax.value_and_grad(loss, argnums=differentiable, has_aux=True)
    return jax.jit(differentiated)(*args)


# 16 rows make two chunks; 11 is a prime; 12 is no multiple of the chunk, and its tables were made
# for another grid. 16 x 16 and 24 x 16 are more than one of the flash kernel's blocks of queries or
# keys where it has to make several (see below).
CASES: list[tuple[tuple[int, int], tuple[int, int] | None, int, int, tuple[str, ...]]] = [
    ((16, 3), (31, 5), 2, 6, ("extended", "chunked", "cudnn")),
    ((11, 4), None, 2, 6, ("extended", "chunked", "cudnn")),
    ((12, 7), (9, 21), 2, 6, ("extended", "chunked", "cudnn")),
    ((14, 14), (27, 27), 2, 64, ("window_kernel",)),
    ((7, 5), (13, 9), 8, 80, ("window_kernel",)),
    ((14, 9), (27, 17), 8, 16, ("window_kernel",)),
    ((16, 16), (31, 31), 2, 8, ("flash_kernel",)),
    ((24, 16), (31, 31), 1, 80, ("flash_kernel",)),
    ((9, 8), None, 2, 16, ("flash_kernel",)),
]


@pytest.mark.parametrize(("grid", "entries", "a", "c", "forms"), CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_form_equals_the_reference_with_gradients(
    grid: tuple[int, int],
    entries: tuple[int, int] | None,
    a: int,
    c: int,
    forms: tuple[Implementation, ...],
    dtype: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float32 to rounding; in bfloat16 against float32 as well as the reference does."""
    monkeypatch.setattr(flash_attention, "_TOKENS_PER_BLOCK", 128)
    args = [None if x is None else x.astype(dtype) for x in inputs(grid, entries, 2, a, c)]
    exact = value_and_gradients(
        "reference", [None if x is None else x.astype(jnp.float32) for x in args], a
    )

    def errors(ours: Any) -> list[float]:
        return [
            float(np.abs(np.asarray(o, np.float32) - np.asarray(e)).max() / np.abs(e).max())
            for o, e in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True)
        ]

    # The sum of all outputs is no better than its terms.
    (_, *reference) = errors(value_and_gradients("reference", args, a))
    for form in forms:
        (_, *ours) = errors(value_and_gradients(form, args, a))
        for mine, of_reference in zip(ours, reference, strict=True):
            assert mine <= (1e-5 if dtype == jnp.float32 else max(2.5 * of_reference, 0.015)), form


@implementations
def test_half_precision_keeps_its_logits_in_full(implementation: Implementation) -> None:
    """Large position terms would lose whole units in bfloat16."""
    args = [x.astype(jnp.bfloat16) for x in inputs((4, 8), (7, 15), 2, 2, 64)]
    args[0] = args[0] * 0.4
    args[1] *= 4
    args[2] *= 4
    ours = run(implementation, args, 2)
    assert ours.dtype == jnp.bfloat16
    exact = definition(*(np.asarray(x, np.float64) for x in args), num_heads=2)
    # Weights and outputs are rounded to 8 bits each, logits are not.
    np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=0, atol=0.015)


@implementations
def test_large_logits_have_finite_gradients(implementation: Implementation) -> None:
    args = [1e4 * x for x in inputs((4, 8), (7, 15), 1, 2, 64)]
    gradients = jax.jit(
        jax.grad(
            lambda *a: jnp.sum(grid_attention(*a, num_heads=2, implementation=implementation)),
            argnums=range(3),
        )
    )(*args)
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("implementation", ["window_kernel", "flash_kernel"])
def test_a_kernel_refuses_what_it_cannot_do(implementation: Implementation) -> None:
    with pytest.raises(ValueError, match=rf"'{implementation}' cannot do a grid of 40 x 9 tokens"):
        run(implementation, inputs((40, 9), None), 2)


@pytest.mark.parametrize(
    ("platform", "grid", "heads", "channels", "dtype", "expected"),
    [
        ("tpu", (14, 14), 16, 80, "bfloat16", "window_kernel"),
        ("tpu", (64, 64), 16, 80, "bfloat16", "flash_kernel"),
        ("tpu", (48, 64), 12, 64, "float32", "flash_kernel"),
        ("tpu", (42, 64), 12, 64, "bfloat16", "chunked"),
        ("tpu", (63, 63), 12, 64, "bfloat16", "chunked"),
        ("tpu", (8, 8), 3, 64, "bfloat16", "extended"),
        ("gpu", (64, 64), 16, 80, "bfloat16", "cudnn"),
        ("gpu", (64, 64), 16, 80, "float32", "chunked"),
        ("gpu", (64, 128), 16, 80, "bfloat16", "chunked"),
        ("gpu", (14, 14), 12, 64, "bfloat16", "cudnn"),
        ("cpu", (14, 14), 12, 64, "float32", "extended"),
        ("cpu", (64, 64), 12, 64, "float32", "chunked"),
    ],
)
def test_what_is_chosen(
    platform: str,
    grid: tuple[int, int],
    heads: int,
    channels: int,
    dtype: str,
    expected: str,
) -> None:
    target = Target(platform, (9, 0) if platform == "gpu" else None, described=True)
    assert chosen(target, grid, heads, channels, dtype) == expected
    # Forms that are no kernels are there still.
    without = chosen(dataclasses.replace(target, kernels="none"), grid, heads, channels, dtype)
    assert without == (expected if "kernel" not in expected else PLAIN[grid])


PLAIN = {(14, 14): "extended", (64, 64): "chunked", (48, 64): "chunked"}


def chosen(target: Target, grid: tuple[int, int], heads: int, channels: int, dtype: str) -> str:
    qkv = jax.ShapeDtypeStruct((1, *grid, 3 * heads * channels), jnp.dtype(dtype))
    names = []
    with tracing_for(target):
        jax.eval_shape(
            lambda x: names.append(GRID_ATTENTION.choose(x, None, None, heads).name), qkv
        )
    return names[0]


HOPPER, OTHERS, NONE = 256, 128, 0


@pytest.mark.parametrize(
    ("capability", "channels"),
    [
        (None, NONE),  # no NVIDIA GPU
        ((7, 5), NONE),
        ((8, 0), OTHERS),
        ((8, 9), OTHERS),
        ((9, 0), HOPPER),
        ((10, 0), OTHERS),
        ((10, 3), OTHERS),
        ((12, 0), OTHERS),
        ((12, 1), OTHERS),
        ((13, 0), OTHERS),  # unknown yet: what all take
    ],
)
@pytest.mark.parametrize(
    ("heads", "head_dim", "grid", "needed"),
    [
        (12, 64, (64, 64), 192),  # ViT-B, everywhere
        (12, 64, (14, 14), 96),
        (16, 64, (64, 64), 192),  # ViT-L
        (16, 80, (64, 64), 208),  # ViT-H
        (16, 80, (14, 14), 112),
        (16, 80, (32, 32), 144),
    ],
)
def test_cudnn_is_chosen_where_it_can_be_trained(
    capability: tuple[int, int] | None,
    channels: int,
    heads: int,
    head_dim: int,
    grid: tuple[int, int],
    needed: int,
) -> None:
    assert attention.cudnn_max_channels(capability) == channels
    form = chosen(Target("gpu", capability), grid, heads, head_dim, "bfloat16")
    otherwise = "extended" if grid[0] <= 32 else "chunked"
    assert form == ("cudnn" if needed <= channels else otherwise)


def test_cudnn_refuses_what_it_cannot_do() -> None:
    qkv = jnp.zeros((1, 40, 40, 3 * 64), jnp.bfloat16)
    with (
        tracing_for(Target("gpu", (10, 0))),
        pytest.raises(ValueError, match=r"'cudnn' cannot do a grid of 40 x 40 tokens"),
    ):
        grid_attention(qkv, None, None, 1, implementation="cudnn")


@pytest.mark.parametrize(
    ("says", "capability"),
    [("9.0", (9, 0)), ("12.1", (12, 1)), ("10.0", (10, 0)), ("gfx942", None), (None, None)],
)
def test_the_compute_capability_is_an_nvidia_gpus(
    says: str | None, capability: tuple[int, int] | None
) -> None:
    """AMD's are GPUs, too."""
    said = {} if says is None else {"compute_capability": says}
    device = unittest.mock.Mock(spec=jax.Device, platform="gpu", **said)
    target = Target.of(device)
    assert target.compute_capability == capability
    if capability is None:
        assert chosen(target, (14, 14), 12, 64, "bfloat16") == "extended"


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


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_no_matrix_of_a_large_grid_is_held_either_way(platform: str) -> None:
    """Forward and backward; 8 rows of queries at once, or a kernel's blocks."""
    qkv = jax.ShapeDtypeStruct((1, 40, 64, 3 * 2 * 4), jnp.float32)
    gradient = jax.grad(lambda x: grid_attention(x, None, None, 2).sum())
    with tracing_for(Target(platform, described=True)):
        jaxpr = jax.make_jaxpr(gradient)(qkv)
    rows = attention.QUERY_ROWS_PER_CHUNK * 64 * (40 * 64)
    assert largest_intermediate(jaxpr) <= rows
    assert rows < 2 * (40 * 64) ** 2 / 8
