"""Every module against its published counterpart, at tiny widths, on a grid that is not square."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from sam_jax.models.image_encoder import EncoderBlock, ImageEncoderViT, RelativePositionAttention
from sam_jax.models.mask_decoder import MaskDecoder, MaskPrediction, Upscaling
from sam_jax.models.prompt_encoder import MaskDownscaling, PromptEncoder, SparseEmbeddings
from sam_jax.models.sam import Sam
from sam_jax.models.two_way_transformer import AttentionParams, TwoWayTransformer
from sam_jax.ops.attention import Implementation
from sam_jax.ops.mask_embedding import embed_masks
from sam_jax.ops.mask_prediction import predict_masks
from sam_jax.ops.token_attention import attention
from tests.golden.tiny import (
    EVERY_COMBINATION,
    TINY,
    PromptKinds,
    native_prompts,
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
    ours = embed_masks(weights, jnp.asarray(logits[:, 0][None]), 1e-6)
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
        ours = attention(
            weights, *arrays, num_heads=DECODER.num_heads, implementation=implementation
        )
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
        ours = predict_masks(
            weights,
            jnp.asarray(image)[None],
            each,
            norm_epsilon=1e-6,
            implementation=implementation,
        )
        official.assert_equal(ours[0], theirs)


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_mask_decoder(tiny: Pair, multimask_output: bool, num_tokens: int) -> None:
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


@combinations
def test_decode(tiny: Pair, tiny_embeddings: np.ndarray, kinds: PromptKinds) -> None:
    prompts = random_prompts(kinds, 2, ENCODER.image_size, LOW_RES)

    @jax.jit
    def decode_both(variables: Any, embeddings: Any, prompts: Any) -> list[MaskPrediction]:
        decode = functools.partial(tiny.model.apply, variables, embeddings, prompts)
        return [decode(multimask_output=both, method=Sam.decode) for both in (False, True)]

    embeddings = jnp.asarray(tiny_embeddings[:1])
    both = decode_both(tiny.variables, embeddings, native_prompts(prompts))
    for multimask_output, ours in enumerate(both):
        logits, iou = official.decode(
            tiny.official, tiny_embeddings[0], prompts, multimask_output=bool(multimask_output)
        )
        official.assert_equal(ours.low_res_logits[0], logits)
        # Near zero, as random weights have it.
        official.assert_equal(ours.iou_predictions[0], iou, tolerance=3e-5)
