"""The image encoder beyond its numbers: which cells see which, sizes, dropped paths, memory."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.models.image_encoder import (
    EncoderBlock,
    ImageEncoderConfig,
    ImageEncoderViT,
    drop_paths,
)
from sam_jax.models.variants import VARIANTS
from tests.golden.tiny import TINY, random_variables

# One block with windows, one without.
CONFIG = dataclasses.replace(TINY.image_encoder, depth=2)
PARAMS = random_variables(dataclasses.replace(TINY, image_encoder=CONFIG))["params"]
VARIABLES = {"params": PARAMS["image_encoder"]}


def images(b: int, h: int, w: int) -> jax.Array:
    rng = np.random.default_rng([b, h, w])
    return jnp.asarray(rng.standard_normal((b, h, w, 3)), jnp.float32)


@pytest.mark.parametrize(
    ("variant", "size", "grid"),
    [
        ("vit_b", (672, 1024), (42, 64)),
        ("vit_ti", (272, 240), (17, 15)),
    ],
)
def test_shapes(variant: str, size: tuple[int, int], grid: tuple[int, int]) -> None:
    config = VARIANTS[variant].image_encoder
    encoder = ImageEncoderViT(config)
    square = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x), square)
    pixels = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    embeddings = jax.eval_shape(encoder.apply, variables, pixels)
    assert embeddings.shape == (2, *grid, config.output_dim)
    assert config.grid == tuple(side // 16 for side in config.image_size)


def test_sizes_that_are_no_multiple_of_a_patch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"40 x 46 pixels.*multiples of the patch size 4"):
        ImageEncoderViT(CONFIG).apply(VARIABLES, images(1, 40, 46))


@pytest.mark.parametrize("window_size", [CONFIG.window_size, 0])
def test_cells_see_their_window_or_the_whole_grid(window_size: int) -> None:
    grid = (9, 12)
    name = "block_00" if window_size else "block_01"
    table = (window_size, window_size) if window_size else CONFIG.grid
    block = EncoderBlock(CONFIG.num_heads, CONFIG.mlp_rate, window_size, table)
    tokens = jax.random.normal(jax.random.key(0), (2, *grid, CONFIG.embed_dim))
    run = jax.jit(lambda x: block.apply({"params": PARAMS["image_encoder"][name]}, x))
    changed = np.asarray(run(tokens) != run(tokens.at[0, 1, 8, 0].add(9.0))).any(-1)
    expected = np.zeros((2, *grid), bool)
    if window_size:
        expected[0, 0:7, 7:12] = True
    else:
        expected[0] = True
    np.testing.assert_array_equal(changed, expected)


def test_what_the_backward_pass_keeps() -> None:
    """Between "none" and "blocks", "products" keeps some."""
    pixels = images(1, *CONFIG.image_size)

    def kept(remat: Any) -> int:
        encoder = ImageEncoderViT(CONFIG, remat=remat)
        saved = jax.eval_shape(
            lambda v: jax.vjp(lambda v: encoder.apply(v, pixels), v)[1], VARIABLES
        )
        return sum(leaf.size for leaf in jax.tree.leaves(saved))

    assert kept("blocks") < kept("products") < kept("none")


@pytest.mark.parametrize("remat", ["none", "products", "blocks"])
def test_scanned_and_recomputed_blocks_give_the_same(remat: Any) -> None:
    """Values and gradients, with dropped paths; three windowed blocks make a loop."""
    config = dataclasses.replace(
        TINY.image_encoder, depth=4, global_attention_blocks=(3,), drop_path_rate=0.5
    )
    params = random_variables(dataclasses.replace(TINY, image_encoder=config))["params"]
    pixels = images(2, *config.image_size)

    def run(**options: Any) -> Any:
        encoder = ImageEncoderViT(config, **options)

        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        @jax.value_and_grad
        def loss(params: Any) -> jax.Array:
            rngs = {"dropout": jax.random.key(3)}
            return jnp.sum(encoder.apply({"params": params}, pixels, train=True, rngs=rngs) ** 2)

        return loss(params["image_encoder"])

    expected, ours = run(), run(remat=remat, scan=True)
    for (path, e), o in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(ours), strict=True
    ):
        np.testing.assert_allclose(o, e, rtol=0, atol=2e-5 * np.abs(e).max(), err_msg=str(path))


def test_kernels_give_the_same() -> None:
    """Windows cut, attended and put together by a TPU's kernels, with dropped paths."""
    config = dataclasses.replace(
        TINY.image_encoder,
        image_size=(256, 256),
        embed_dim=128,
        num_heads=2,
        depth=2,
        window_size=6,
        global_attention_blocks=(),
        drop_path_rate=0.5,
    )
    params = random_variables(dataclasses.replace(TINY, image_encoder=config))["params"]
    pixels = images(2, *config.image_size)

    def run(implementation: Any) -> Any:
        encoder = ImageEncoderViT(config, remat="products", implementation=implementation)

        @jax.jit
        @jax.value_and_grad
        def loss(params: Any) -> jax.Array:
            rngs = {"dropout": jax.random.key(3)}
            return jnp.sum(encoder.apply({"params": params}, pixels, train=True, rngs=rngs) ** 2)

        text = str(jax.make_jaxpr(loss)(params["image_encoder"]))
        assert ("norm_and_cut" in text) == (implementation == "window_kernel")
        return loss(params["image_encoder"])

    plain, kernels = run("extended"), run("window_kernel")
    for (path, e), o in zip(
        jax.tree.leaves_with_path(plain), jax.tree.leaves(kernels), strict=True
    ):
        np.testing.assert_allclose(o, e, rtol=0, atol=2e-5 * np.abs(e).max(), err_msg=str(path))


def test_every_parameter_has_a_finite_gradient() -> None:
    pixels = images(1, *CONFIG.image_size)

    # It runs once: compiling it well would take longer.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    @jax.grad
    def gradient(variables: Any) -> jax.Array:
        out = ImageEncoderViT(CONFIG, remat="blocks").apply(variables, pixels, train=True)
        return jnp.sum(out**3)

    for path, leaf in jax.tree.leaves_with_path(gradient(VARIABLES)):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 1e-3, path


def test_dropped_paths_are_whole_images_scaled_up() -> None:
    factors = np.asarray(drop_paths(jax.random.key(0), 0.5, 3, 400))
    assert factors.shape == (3, 2, 400)
    np.testing.assert_array_equal(factors[0], 1.0)
    for block, rate in ((1, 0.25), (2, 0.5)):
        np.testing.assert_allclose(np.unique(factors[block]), [0, 1 / (1 - rate)], rtol=1e-6)
        # Binomial, 800 times, with a deviation of at most 0.018
        assert abs((factors[block] == 0).mean() - rate) < 0.06


def test_dropped_paths_grow_from_none_at_the_first_block_to_all_at_the_last() -> None:
    """At a rate of 1 the last block does nothing in training, and the first one all it does."""
    config = dataclasses.replace(CONFIG, drop_path_rate=1.0)
    pixels = images(1, *CONFIG.image_size)

    @jax.jit
    def run(params: Any, train: Any) -> jax.Array:
        rngs = {"dropout": jax.random.key(0)}
        encoder = ImageEncoderViT(config)
        return jnp.stack(
            [encoder.apply({"params": params}, pixels, train=t, rngs=rngs) for t in (True, False)]
        )

    def scaled(name: str) -> Any:
        return {
            **VARIABLES["params"],
            name: jax.tree.map(lambda x: 2 * x, PARAMS["image_encoder"][name]),
        }

    base, first, last = (
        run(params, None)
        for params in (VARIABLES["params"], scaled("block_00"), scaled("block_01"))
    )
    train, evaluation = 0, 1
    np.testing.assert_array_equal(last[train], base[train])
    assert np.abs(last[evaluation] - base[evaluation]).max() > 0.1
    assert np.abs(first[train] - base[train]).max() > 0.1


def test_half_precision() -> None:
    config = dataclasses.replace(CONFIG, depth=1)
    pixels = images(1, 28, 64)

    @jax.jit
    def run(variables: Any) -> list[jax.Array]:
        return [
            ImageEncoderViT(config, dtype=dtype).apply(variables, pixels)
            for dtype in (jnp.bfloat16, jnp.float32)
        ]

    half, full = run(VARIABLES)
    assert half.dtype == jnp.bfloat16
    difference = np.abs(np.asarray(half, np.float32) - full)
    assert difference.mean() < 0.02 * np.abs(full).mean()


@pytest.mark.slow
def test_a_deep_stream_of_half_precision_tokens() -> None:
    """What 16 blocks add to tokens is rounded 32 times, and neither shrinks nor grows by it.

    Nor by the factors of kept branches, up to 1 / 0.6: in half precision 1 / 0.9 would be 1.109.
    """
    config = ImageEncoderConfig(
        image_size=(128, 128),
        embed_dim=64,
        depth=16,
        num_heads=2,
        global_attention_blocks=(15,),
        window_size=4,
        output_dim=32,
        drop_path_rate=0.4,
    )
    rng = np.random.default_rng(0)
    pixels, weights = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, 128, 128, 3), (2, 8, 8, 32))
    )

    def encoder(dtype: Any) -> ImageEncoderViT:
        return ImageEncoderViT(config, scan=True, dtype=dtype)

    def weights_of(path: Any, shape: Any) -> jax.Array:
        values = rng.standard_normal(shape.shape).astype(np.float32)
        fan_in = np.prod(shape.shape[:-1]) if path[-1].key == "kernel" else 100
        return (path[-1].key == "scale") + values * fan_in**-0.5

    init = functools.partial(encoder(jnp.float32).init, jax.random.key(0))
    shapes = jax.eval_shape(init, pixels)
    variables = jax.tree_util.tree_map_with_path(weights_of, shapes)

    def run(dtype: Any) -> tuple[Any, Any]:
        def total(variables: Any) -> Any:
            out = encoder(dtype).apply(
                variables, pixels, train=True, rngs={"dropout": jax.random.key(1)}
            )
            return jnp.vdot(weights, out.astype(jnp.float32)), out.astype(jnp.float32)

        gradients, out = jax.jit(jax.grad(total, has_aux=True))(variables)
        return out, gradients

    (out, gradients), (expected, full) = run(jnp.bfloat16), run(jnp.float32)
    assert jnp.linalg.norm(out - expected) < 0.03 * jnp.linalg.norm(expected)
    largest = max(float(jnp.linalg.norm(x)) for x in jax.tree.leaves(full))
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(full), strict=True
    ):
        norm, dot = float(jnp.linalg.norm(theirs)), float(jnp.vdot(ours, theirs))
        if norm > 1e-4 * largest:
            assert dot > 0.99 * norm * float(jnp.linalg.norm(ours)), path
            assert abs(dot / norm**2 - 1) < 0.06, path
