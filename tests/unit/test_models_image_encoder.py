"""The image encoder beyond its numbers: which tokens see which, sizes, dropped paths, memory."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.models.image_encoder import (
    EncoderBlock,
    ImageEncoderConfig,
    ImageEncoderViT,
    drop_path_scales,
)
from sam_jax.models.variants import VARIANTS
from sam_jax.ops.dispatch import Target, tracing_for
from tests.golden.tiny import TINY, random_variables

# One block with windows, one without.
CONFIG = dataclasses.replace(TINY.image_encoder, depth=2)
PARAMS = random_variables(dataclasses.replace(TINY, image_encoder=CONFIG))["params"]
VARIABLES = {"params": PARAMS["image_encoder"]}


def images(b: int, h: int, w: int) -> jax.Array:
    rng = np.random.default_rng([b, h, w])
    return jnp.asarray(rng.standard_normal((b, h, w, 3)).astype(np.float32))


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
def test_tokens_see_their_window_or_the_whole_grid(window_size: int) -> None:
    grid = (9, 12)
    name = "block_00" if window_size else "block_01"
    table = (window_size, window_size) if window_size else CONFIG.grid
    block = EncoderBlock(
        num_heads=CONFIG.num_heads,
        head_dim=CONFIG.embed_dim // CONFIG.num_heads,
        mlp_dim=int(CONFIG.mlp_rate * CONFIG.embed_dim),
        window_size=window_size,
        table_grid=table,
    )
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
    scales = drop_path_scales(jax.random.key(3), config, 2)

    def run(**options: Any) -> Any:
        encoder = ImageEncoderViT(config, **options)

        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        @jax.value_and_grad
        def loss(params: Any) -> jax.Array:
            return jnp.sum(encoder.apply({"params": params}, pixels, scales) ** 2)

        return loss(params["image_encoder"])

    expected, ours = run(), run(remat=remat, scan=True)
    for (path, e), o in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(ours), strict=True
    ):
        np.testing.assert_allclose(o, e, rtol=0, atol=2e-5 * np.abs(e).max(), err_msg=str(path))


@pytest.mark.parametrize("remat", ["none", "products"])
def test_kernels_give_the_same(remat: Any) -> None:
    """Windows cut, attended and put together by TPU kernels, with dropped paths."""
    config = dataclasses.replace(
        TINY.image_encoder,
        image_size=(64, 64),
        embed_dim=128,
        num_heads=2,
        depth=1,
        window_size=6,
        global_attention_blocks=(),
        drop_path_rate=0.5,
    )
    params = random_variables(dataclasses.replace(TINY, image_encoder=config))["params"]
    pixels, scales = images(2, *config.image_size), jnp.array([[[2.0, 0.0], [0.0, 2.0]]])
    encoder = ImageEncoderViT(config, remat=remat)

    @jax.jit
    @jax.value_and_grad
    def loss(params: Any) -> jax.Array:
        return jnp.sum(encoder.apply({"params": params}, pixels, scales) ** 2)

    def run(target: Target, has_kernels: bool) -> Any:
        with tracing_for(target):
            text = str(loss.trace(params["image_encoder"]).jaxpr)
            for name in ("norm_partition", "window_attention", "unpartition_add_norm"):
                assert (f"{name}_backward" in text) == has_kernels
            return loss(params["image_encoder"])

    plain, kernels = run(Target(), False), run(Target(kernels="interpret"), True)
    for (path, e), o in zip(
        jax.tree.leaves_with_path(plain), jax.tree.leaves(kernels), strict=True
    ):
        np.testing.assert_allclose(o, e, rtol=0, atol=2e-5 * np.abs(e).max(), err_msg=str(path))


def names_of(tree: Any, prefix: str = "") -> Iterator[str]:
    """Paths of the modules that a collection has something of."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield f"{prefix}{name}"
            yield from names_of(value, f"{prefix}{name}/")


@pytest.mark.parametrize("remat", ["none", "products", "blocks"])
def test_the_tools_of_linen_see_the_blocks(remat: Any) -> None:
    """Tables, intermediates and interceptors, as whoever adapts or looks into a model uses them."""
    encoder, pixels = ImageEncoderViT(CONFIG, remat=remat), images(1, *CONFIG.image_size)
    blocks = [f"block_{index:02d}" for index in range(CONFIG.depth)]
    inside = [f"{block}/{part}" for block in blocks for part in ("attn/qkv", "mlp/dense_1")]

    seen: dict[str, Any] = {}

    def intercept(next_method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext):
        if context.method_name == "__call__":
            seen["/".join(context.module.path)] = type(context.module)
        return next_method(*args, **kwargs)

    @jax.eval_shape
    def run() -> Any:
        with nn.intercept_methods(intercept):
            return encoder.apply(VARIABLES, pixels, capture_intermediates=True)

    assert {*blocks, *inside} <= seen.keys()
    assert all(issubclass(seen[block], EncoderBlock) for block in blocks)

    _, found = run
    tokens = (1, *CONFIG.grid, CONFIG.embed_dim)
    for block in blocks:
        assert found["intermediates"][block]["__call__"][0].shape == tokens
    assert {*blocks, *inside} <= {*names_of(found["intermediates"])}

    table = encoder.tabulate(jax.random.key(0), pixels, depth=1, console_kwargs={"width": 200})
    assert all(block in table for block in blocks)


def test_a_block_can_be_changed_from_outside() -> None:
    """An interceptor takes the place of a layer, as adapters do."""

    def without_attention(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_method(*args, **kwargs)
        is_branch = context.module.name == "attn" and context.method_name == "__call__"
        return 0 * out if is_branch else out

    @jax.jit
    def run(params: Any) -> jax.Array:
        return ImageEncoderViT(CONFIG).apply({"params": params}, pixels)

    @jax.jit
    def run_without(params: Any) -> jax.Array:
        with nn.intercept_methods(without_attention):
            return ImageEncoderViT(CONFIG).apply({"params": params}, pixels)

    pixels, params = images(1, *CONFIG.image_size), VARIABLES["params"]
    silent = {
        name: jax.tree_util.tree_map_with_path(
            lambda path, x: 0 * x if "['attn']['proj']" in jax.tree_util.keystr(path) else x, tree
        )
        for name, tree in params.items()
    }
    np.testing.assert_allclose(run_without(params), run(silent), atol=1e-5)
    assert np.abs(run_without(params) - run(params)).max() > 0.1


def test_every_parameter_has_a_finite_gradient() -> None:
    pixels = images(1, *CONFIG.image_size)

    # It runs once: compiling it well would take longer.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    @jax.grad
    def gradient(variables: Any) -> jax.Array:
        out = ImageEncoderViT(CONFIG, remat="blocks").apply(variables, pixels)
        return jnp.sum(out**3)

    for path, leaf in jax.tree.leaves_with_path(gradient(VARIABLES)):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 1e-3, path


def test_dropped_paths_are_whole_images_scaled_up() -> None:
    config = dataclasses.replace(CONFIG, depth=3, drop_path_rate=0.5)
    factors = np.asarray(drop_path_scales(jax.random.key(0), config, 400))
    assert drop_path_scales(jax.random.key(0), CONFIG, 400) is None
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
    def run(params: Any) -> jax.Array:
        encoder = ImageEncoderViT(config)
        scales = drop_path_scales(jax.random.key(0), config, 1)
        return jnp.stack([encoder.apply({"params": params}, pixels, s) for s in (scales, None)])

    def scaled(name: str) -> Any:
        return {
            **VARIABLES["params"],
            name: jax.tree.map(lambda x: 2 * x, PARAMS["image_encoder"][name]),
        }

    base, first, last = (
        run(params) for params in (VARIABLES["params"], scaled("block_00"), scaled("block_01"))
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
    """The sums of 16 blocks are rounded 32 times, and neither shrink nor grow by it.

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
        jnp.asarray(rng.standard_normal(shape).astype(np.float32))
        for shape in ((2, 128, 128, 3), (2, 8, 8, 32))
    )

    path_scales = drop_path_scales(jax.random.key(1), config, len(pixels))

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
            out = encoder(dtype).apply(variables, pixels, path_scales)
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
