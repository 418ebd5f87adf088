"""Every module against its published counterpart, at tiny widths, on a grid that is not square."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from sam_jax.models.image_encoder import EncoderBlock, ImageEncoderViT, RelativePositionAttention
from sam_jax.models.mask_decoder import MaskDecoder, MaskPrediction, Upscaling
from sam_jax.models.prompt_encoder import MaskDownscaling, PromptEncoder, Prompts, SparseEmbeddings
from sam_jax.models.sam import Sam
from sam_jax.models.two_way_transformer import AttentionParams, TwoWayTransformer
from sam_jax.ops.attention import Implementation
from sam_jax.ops.mask_embedding import embed_masks
from sam_jax.ops.mask_prediction import predict_masks
from sam_jax.ops.token_attention import token_attention
from tests.golden.tiny import (
    EVERY_COMBINATION,
    TINY,
    PromptKinds,
    native_prompts,
    ragged_batch,
    random_prompts,
)
from tests.parity import official
from tests.parity.conftest import Pair

pytestmark = pytest.mark.parity

torch = official.torch
ENCODER, DECODER = TINY.image_encoder, TINY.mask_decoder
GRID, DIM = ENCODER.grid, ENCODER.output_dim
HEAD_DIM = ENCODER.embed_dim // ENCODER.num_heads
WINDOW = (ENCODER.window_size, ENCODER.window_size)
LOW_RES = (4 * GRID[0], 4 * GRID[1])
combinations = pytest.mark.parametrize(
    "kinds", EVERY_COMBINATION.values(), ids=EVERY_COMBINATION.keys()
)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def run(module: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """A module's output, compiled once, as float32 arrays."""
    return jax.jit(lambda v, *a: module.apply(v, *a, **kwargs))(
        variables, *jax.tree.map(jnp.asarray, args)
    )


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize(
    ("block", "grid"),
    [
        pytest.param(0, WINDOW, id="window"),
        pytest.param(1, GRID, id="global"),
        pytest.param(1, (7, 16), id="global-interpolated"),
    ],
)
def test_grid_attention(
    tiny: Pair, block: int, grid: tuple[int, int], implementation: Implementation
) -> None:
    tokens = normal(2, *grid, ENCODER.embed_dim)
    module = RelativePositionAttention(
        ENCODER.num_heads, HEAD_DIM, WINDOW if block == 0 else GRID, implementation
    )
    variables = tiny.part("image_encoder", f"block_{block:02d}", "attn")
    theirs = tiny.official.image_encoder.blocks[block].attn(torch.from_numpy(tokens))
    official.assert_equal(run(module, variables, tokens), theirs)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("grid", [GRID, (13, 4), (7, 14)])
def test_encoder_block(tiny: Pair, block: int, grid: tuple[int, int]) -> None:
    window = 0 if block == 1 else ENCODER.window_size
    ours = EncoderBlock(
        ENCODER.num_heads,
        HEAD_DIM,
        int(ENCODER.embed_dim * ENCODER.mlp_rate),
        window,
        (window, window) if window else GRID,
    )
    tokens = normal(2, *grid, ENCODER.embed_dim)
    variables = tiny.part("image_encoder", f"block_{block:02d}")
    theirs = tiny.official.image_encoder.blocks[block](torch.from_numpy(tokens))
    official.assert_equal(run(ours, variables, tokens), theirs)


def test_image_encoder(tiny: Pair, tiny_embeddings: np.ndarray) -> None:
    ours = run(ImageEncoderViT(ENCODER), tiny.part("image_encoder"), tiny.images)
    official.assert_equal(ours, tiny_embeddings)


def test_image_encoder_on_another_size(tiny: Pair) -> None:
    """Beyond absolute positions, which are interpolated by another kernel, the two agree."""
    images = normal(1, 28, 64, 3)
    ours = ImageEncoderViT(ENCODER)
    variables = tiny.part("image_encoder")
    table = jnp.zeros_like(variables["params"]["pos_embed"])
    variables = {"params": {**variables["params"], "pos_embed": table}}
    theirs = tiny.official.image_encoder
    published, theirs.pos_embed = theirs.pos_embed, None
    try:
        embeddings = official.encode(tiny.official, images)
    finally:
        theirs.pos_embed = published
    official.assert_equal(run(ours, variables, images), embeddings)


def test_mask_downscaling(tiny: Pair) -> None:
    logits = normal(3, 1, *LOW_RES)
    theirs = tiny.official.prompt_encoder.mask_downscaling(torch.from_numpy(logits))
    weights = run(
        MaskDownscaling(DIM, TINY.mask_channels), tiny.part("prompt_encoder", "mask_downscaling")
    )
    embed = jax.jit(functools.partial(embed_masks, norm_epsilon=1e-6))
    ours = embed(weights, jnp.asarray(logits[:, 0][None]))
    official.assert_equal(ours[0], rearrange(theirs, "p d h w -> p h w d"))


@combinations
def test_prompt_encoder(tiny: Pair, kinds: PromptKinds) -> None:
    prompts = random_prompts(kinds, 2, ENCODER.image_size, LOW_RES)
    sparse, dense = official.embed_prompts(tiny.official, prompts)
    encoder = PromptEncoder(DIM, TINY.mask_channels)
    ours, our_dense, our_pe = jax.jit(
        lambda v, p: (
            *encoder.apply(v, p, ENCODER.image_size, GRID),
            encoder.apply(v, GRID, method="image_pe"),
        )
    )(tiny.part("prompt_encoder"), native_prompts(prompts))
    # Ours has a place for every token that any object of the batch may have.
    for index in range(len(sparse)):
        valid = np.asarray(ours.valid[0, min(index, ours.tokens.shape[1] - 1)])
        tokens = np.asarray(ours.tokens[0, min(index, ours.tokens.shape[1] - 1)])[valid]
        assert tokens.shape == sparse[index].shape
        if sparse.size:
            official.assert_equal(tokens, sparse[index])
    official.assert_equal(jnp.broadcast_to(our_dense[0], dense.shape), dense)
    image_pe = tiny.official.prompt_encoder.get_dense_pe()[0].permute(1, 2, 0)
    official.assert_equal(our_pe, image_pe)


@pytest.mark.parametrize("name", ["self_attn", "cross_attn_token_to_image"])
def test_decoder_attention(tiny: Pair, name: str) -> None:
    queries, keys, values = normal(3, 6, DIM), normal(3, 9, DIM), normal(1, 3, 9, DIM)[0]
    layer = tiny.official.mask_decoder.transformer.layers[1]
    theirs = getattr(layer, name)(*map(torch.from_numpy, (queries, keys, values)))
    params = AttentionParams(1 if name == "self_attn" else 2)
    weights = params.apply(tiny.part("mask_decoder", "transformer", "layer_1", name), DIM)
    arrays = [jnp.asarray(x)[None] for x in (queries, keys, values)]
    for implementation in ("reference", "ordered"):
        attend = functools.partial(
            token_attention, num_heads=DECODER.num_heads, implementation=implementation
        )
        ours = jax.jit(attend)(weights, *arrays)
        official.assert_equal(ours[0], theirs)


@pytest.mark.parametrize("shared_image", [False, True])
def test_two_way_transformer(tiny: Pair, shared_image: bool) -> None:
    tokens, image = normal(3, 7, DIM), normal(1 if shared_image else 3, *GRID, DIM)
    image_pe = normal(*GRID, DIM)
    every = np.broadcast_to(image, (3, *GRID, DIM))
    theirs = tiny.official.mask_decoder.transformer(
        torch.from_numpy(np.moveaxis(every, -1, 1).copy()),
        torch.from_numpy(np.moveaxis(image_pe, -1, 0).copy())[None].expand(3, -1, -1, -1),
        torch.from_numpy(tokens),
    )
    ours = run(
        TwoWayTransformer(DECODER.depth, DECODER.num_heads, DECODER.mlp_dim),
        tiny.part("mask_decoder", "transformer"),
        tokens[None],
        image.reshape(1, len(image), -1, DIM),
        image_pe.reshape(-1, DIM),
        np.ones((1, 3, 7), bool),
    )
    for part, reference in zip(ours, theirs, strict=True):
        official.assert_equal(part[0], reference)


def test_upscaling(tiny: Pair) -> None:
    image = normal(2, *GRID, DIM)
    theirs = tiny.official.mask_decoder.output_upscaling(
        torch.from_numpy(np.moveaxis(image, -1, 1).copy())
    )
    # Candidate c asks for channel c alone.
    each = jnp.eye(DIM // 8)[None, None].repeat(len(image), 1)
    weights = Upscaling(DIM).apply(tiny.part("mask_decoder", "upscaling"))
    for implementation in ("reference", "by_subpixel"):
        predict = functools.partial(predict_masks, norm_epsilon=1e-6, implementation=implementation)
        ours = jax.jit(predict)(weights, jnp.asarray(image)[None], each)
        official.assert_equal(ours[0], theirs)


@pytest.mark.parametrize(("num_tokens", "multimask_output"), [(0, False), (3, True)])
def test_mask_decoder(tiny: Pair, num_tokens: int, multimask_output: bool) -> None:
    """The other two pairings are among those of ``test_decode``."""
    embedding, sparse = normal(*GRID, DIM), normal(2, num_tokens, DIM)
    dense, image_pe = normal(2, *GRID, DIM), normal(1, *GRID, DIM)[0]
    theirs = tiny.official.mask_decoder(
        torch.from_numpy(embedding).permute(2, 0, 1)[None],
        torch.from_numpy(image_pe).permute(2, 0, 1)[None],
        torch.from_numpy(sparse),
        torch.from_numpy(dense).permute(0, 3, 1, 2),
        multimask_output,
    )
    prompts = SparseEmbeddings(jnp.asarray(sparse)[None], jnp.ones((1, *sparse.shape[:2]), bool))
    ours = run(
        MaskDecoder(DECODER, DIM),
        tiny.part("mask_decoder"),
        (embedding + dense)[None],
        image_pe,
        prompts,
        multimask_output=multimask_output,
    )
    official.assert_equal(ours.low_res_logits[0], theirs[0])
    official.assert_equal(ours.iou_predictions[0], theirs[1])


@pytest.mark.parametrize("multimask_output", [False, True])
def test_decode(tiny: Pair, tiny_embeddings: np.ndarray, multimask_output: bool) -> None:
    """Objects without masks in a batch that has none, all of which share their image's cells.

    Those with masks are in `test_batches`.
    """
    objects = [
        random_prompts(kinds, 1, ENCODER.image_size, LOW_RES)
        for kinds in EVERY_COMBINATION.values()
        if not kinds.mask
    ]
    batch = ragged_batch([objects], LOW_RES).replace(mask_logits=None, mask_valid=None)
    ours = decode(tiny, tiny_embeddings, batch, multimask_output)
    for index, prompts in enumerate(objects):
        found = jax.tree.map(lambda x, i=index: x[:, i : i + 1], ours)
        assert_decoded(found, tiny, tiny_embeddings, prompts, multimask_output)


@pytest.mark.parametrize(("name", "multimask_output"), [("none", True), ("mask", False)])
def test_decode_without_tokens(
    tiny: Pair, tiny_embeddings: np.ndarray, name: str, multimask_output: bool
) -> None:
    """Nothing at all, and masks alone: the decoder has no tokens but its own."""
    prompts = random_prompts(EVERY_COMBINATION[name], 2, ENCODER.image_size, LOW_RES)
    ours = decode(tiny, tiny_embeddings, native_prompts(prompts), multimask_output)
    assert_decoded(ours, tiny, tiny_embeddings, prompts, multimask_output)


def decode(
    tiny: Pair, embeddings: np.ndarray, prompts: Prompts, multimask_output: bool
) -> MaskPrediction:
    function = functools.partial(
        tiny.model.apply, multimask_output=multimask_output, method=Sam.decode
    )
    found: MaskPrediction = jax.jit(function)(tiny.variables, jnp.asarray(embeddings[:1]), prompts)
    return found


def assert_decoded(
    ours: MaskPrediction,
    tiny: Pair,
    embeddings: np.ndarray,
    prompts: Mapping[str, np.ndarray],
    multimask_output: bool,
) -> None:
    logits, iou = official.decode(
        tiny.official, embeddings[0], prompts, multimask_output=multimask_output
    )
    official.assert_equal(ours.low_res_logits[0], logits)
    # Near zero, as random weights have it.
    official.assert_equal(ours.iou_predictions[0], iou, tolerance=3e-5)
