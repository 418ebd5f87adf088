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
from sam_jax.models.prompt_encoder import MaskDownscaling, PromptEmbeddings, PromptEncoder
from sam_jax.models.sam import Sam
from sam_jax.models.two_way_transformer import Attention, TwoWayTransformer
from sam_jax.ops.attention import Implementation
from sam_jax.ops.cells import to_cells
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
WINDOW = (ENCODER.window_size, ENCODER.window_size)
LOW_RES = (4 * GRID[0], 4 * GRID[1])
combinations = pytest.mark.parametrize(
    "kinds", EVERY_COMBINATION.values(), ids=EVERY_COMBINATION.keys()
)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def run(module: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """A module's output, compiled once, as float32 arrays."""
    return jax.jit(lambda v, *a: module.apply(v, *a, **kwargs))(variables, *map(jnp.asarray, args))


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
    attention = RelativePositionAttention(
        ENCODER.num_heads, WINDOW if block == 0 else GRID, implementation
    )
    variables = tiny.part("image_encoder", f"block_{block:02d}", "attn")
    theirs = tiny.official.image_encoder.blocks[block].attn(torch.from_numpy(tokens))
    official.assert_equal(run(attention, variables, tokens), theirs)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("grid", [GRID, (13, 4), (7, 14)])
def test_encoder_block(tiny: Pair, block: int, grid: tuple[int, int]) -> None:
    window = 0 if block == 1 else ENCODER.window_size
    ours = EncoderBlock(
        ENCODER.num_heads, ENCODER.mlp_rate, window, (window, window) if window else GRID
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
    ours = run(
        MaskDownscaling(DIM, TINY.mask_channels),
        tiny.part("prompt_encoder", "mask_downscaling"),
        to_cells(jnp.asarray(logits[:, 0][None])),
    )
    official.assert_equal(ours[0], rearrange(theirs, "p d h w -> p (h w) d"))


def embed_prompts(tiny: Pair, prompts: Any) -> PromptEmbeddings:
    encoder = PromptEncoder(DIM, TINY.mask_channels)
    # Nothing but masks in the cells.
    embeddings = jnp.zeros((1, *GRID, DIM))
    return jax.jit(lambda v, p: encoder.apply(v, embeddings, p, ENCODER.image_size))(
        tiny.part("prompt_encoder"), native_prompts(prompts)
    )


@combinations
def test_prompt_encoder(tiny: Pair, kinds: PromptKinds) -> None:
    prompts = random_prompts(kinds, 2, ENCODER.image_size, LOW_RES)
    sparse, dense = official.embed_prompts(tiny.official, prompts)
    ours = embed_prompts(tiny, prompts)
    # Ours has a place for every token that any object of the batch may have.
    for index in range(len(sparse)):
        valid = np.asarray(ours.sparse_valid[0, min(index, ours.sparse.shape[1] - 1)])
        tokens = np.asarray(ours.sparse[0, min(index, ours.sparse.shape[1] - 1)])[valid]
        assert tokens.shape == sparse[index].shape
        if sparse.size:
            official.assert_equal(tokens, sparse[index])
    official.assert_equal(jnp.broadcast_to(ours.cells[0], dense.shape), dense)
    image_pe = tiny.official.prompt_encoder.get_dense_pe()[0].permute(1, 2, 0)
    official.assert_equal(ours.image_pe, image_pe)


@pytest.mark.parametrize("name", ["self_attn", "cross_attn_token_to_image"])
def test_decoder_attention(tiny: Pair, name: str) -> None:
    queries, keys, values = normal(3, 6, DIM), normal(3, 9, DIM), normal(1, 3, 9, DIM)[0]
    layer = tiny.official.mask_decoder.transformer.layers[1]
    theirs = getattr(layer, name)(*map(torch.from_numpy, (queries, keys, values)))
    ours = run(
        Attention(DECODER.num_heads, 1 if name == "self_attn" else 2),
        tiny.part("mask_decoder", "transformer", "layer_1", name),
        *(x[None] for x in (queries, keys, values)),
    )
    official.assert_equal(ours[0], theirs)


@pytest.mark.parametrize("shared_cells", [False, True])
def test_two_way_transformer(tiny: Pair, shared_cells: bool) -> None:
    tokens, cells = normal(3, 7, DIM), normal(1 if shared_cells else 3, *GRID, DIM)
    image_pe = normal(*GRID, DIM)
    every = np.broadcast_to(cells, (3, *GRID, DIM))
    theirs = tiny.official.mask_decoder.transformer(
        torch.from_numpy(np.moveaxis(every, -1, 1).copy()),
        torch.from_numpy(np.moveaxis(image_pe, -1, 0).copy())[None].expand(3, -1, -1, -1),
        torch.from_numpy(tokens),
    )
    ours = run(
        TwoWayTransformer(DECODER.depth, DECODER.num_heads, DECODER.mlp_dim),
        tiny.part("mask_decoder", "transformer"),
        tokens[None],
        cells.reshape(1, len(cells), -1, DIM),
        image_pe.reshape(-1, DIM),
        np.ones((1, 3, 7), bool),
    )
    for part, reference in zip(ours, theirs, strict=True):
        official.assert_equal(part[0], reference)


def test_upscaling(tiny: Pair) -> None:
    cells = normal(2, *GRID, DIM)
    theirs = tiny.official.mask_decoder.output_upscaling(
        torch.from_numpy(np.moveaxis(cells, -1, 1).copy())
    )
    # Candidate c asks for channel c alone.
    each = jnp.eye(DIM // 8)[None, None].repeat(len(cells), 1)
    weights = tiny.part("mask_decoder", "upscaling")
    ours = run(Upscaling(DIM), weights, cells[None], each)[0]
    official.assert_equal(ours, theirs)


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
    prompts = PromptEmbeddings(
        sparse=jnp.asarray(sparse)[None],
        sparse_valid=jnp.ones((1, *sparse.shape[:2]), bool),
        cells=jnp.asarray(embedding + dense)[None],
        image_pe=jnp.asarray(image_pe),
    )
    decoder = MaskDecoder(DECODER, DIM)
    ours = jax.jit(lambda v, p: decoder.apply(v, p, multimask_output=multimask_output))(
        tiny.part("mask_decoder"), prompts
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
