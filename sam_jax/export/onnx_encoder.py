"""The image encoder as an ONNX graph, and what a TinyViT's shares with it."""

from collections.abc import Mapping

import numpy as np

from sam_jax.arrays import GridShape
from sam_jax.export.onnx_graph import Graph
from sam_jax.models.image_encoder import ImageEncoderConfig
from sam_jax.models.tiny_vit import TinyViTConfig

_ENCODER = "image_encoder"


def encoder_graph(weights: Mapping[str, np.ndarray], config: ImageEncoderConfig) -> Graph:
    """The graph from ``images`` to ``image_embeddings``.

    ``images`` is [batch, channels, h, w] at the model's size: RGB, or what the model was trained
    on, longest side resized, normalised with the model's mean and deviation (ImageNet's for
    published weights), then padded with zeros at the bottom and right.
    ``image_embeddings`` is [batch, d, h / 16, w / 16], as the decoder's input of that name.

    Args:
      weights: of the model, by published names, float32.
      config: the encoder's shape.
    """
    graph = Graph(weights)
    x = graph.convolution("images", f"{_ENCODER}.patch_embed.proj", strides=[config.patch_size] * 2)
    x = graph.op("Transpose", x, perm=[0, 2, 3, 1])
    x = graph.op("Add", x, graph.weight(f"{_ENCODER}.pos_embed"))
    for index in range(config.depth):
        x = _block(graph, x, index, config)
    neck(graph, graph.op("Transpose", x, perm=[0, 3, 1, 2]))
    declare_encoder(graph, config, graph.array(f"{_ENCODER}.patch_embed.proj.weight").shape[1])
    return graph


def neck(graph: Graph, x: str) -> None:
    """The graph's output of the last block's [b, c, h, w]."""
    x = graph.convolution(x, f"{_ENCODER}.neck.0", bias=False)
    x = graph.channel_norm(x, f"{_ENCODER}.neck.1")
    x = graph.convolution(x, f"{_ENCODER}.neck.2", bias=False, pads=[1] * 4)
    graph.name_output(graph.channel_norm(x, f"{_ENCODER}.neck.3"), "image_embeddings")


def declare_encoder(
    graph: Graph, config: ImageEncoderConfig | TinyViTConfig, num_channels: int
) -> None:
    """Says what an encoder's graph takes, of so many channels, and gives."""
    (height, width), (rows, columns) = config.image_size, config.grid
    graph.declare(
        "sam_image_encoder",
        inputs={"images": ("batch", num_channels, height, width)},
        outputs={"image_embeddings": ("batch", config.output_dim, rows, columns)},
    )


def _block(graph: Graph, x: str, index: int, config: ImageEncoderConfig) -> str:
    """One transformer block on [b, h, w, d]."""
    name = f"{_ENCODER}.blocks.{index}"
    normed = graph.layer_norm(x, f"{name}.norm1", 1e-6)
    if index in config.global_attention_blocks:
        branch = _attention(graph, normed, f"{name}.attn", config.grid, config)
    else:
        side = config.window_size
        windows = to_windows(graph, normed, config.grid, side, config.embed_dim)
        attended = _attention(graph, windows, f"{name}.attn", (side, side), config)
        branch = from_windows(graph, attended, config.grid, side, config.embed_dim)
    x = graph.op("Add", x, branch)
    hidden = graph.dense(graph.layer_norm(x, f"{name}.norm2", 1e-6), f"{name}.mlp.lin1")
    return graph.op("Add", x, graph.dense(graph.gelu(hidden), f"{name}.mlp.lin2"))


def _window_counts(grid: GridShape, side: int) -> tuple[int, int]:
    """Windows per column and row of the padded grid."""
    rows, columns = (-(-size // side) for size in grid)
    return rows, columns


def to_windows(graph: Graph, x: str, grid: GridShape, side: int, dim: int) -> str:
    """[b, h, w, d] to [(b windows), s, s, d]; the grid is padded with zeros."""
    nh, nw = _window_counts(grid, side)
    pads = [0, 0, 0, 0, 0, nh * side - grid[0], nw * side - grid[1], 0]
    if any(pads):
        x = graph.op("Pad", x, graph.integers(*pads))
    x = graph.reshape(x, -1, nh, side, nw, side, dim)
    x = graph.op("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
    return graph.reshape(x, -1, side, side, dim)


def from_windows(graph: Graph, x: str, grid: GridShape, side: int, dim: int) -> str:
    """The way back, without the padding."""
    nh, nw = _window_counts(grid, side)
    x = graph.reshape(x, -1, nh, nw, side, side, dim)
    x = graph.op("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
    x = graph.reshape(x, -1, nh * side, nw * side, dim)
    if (nh * side, nw * side) == grid:
        return x
    return graph.op("Slice", x, graph.integers(0, 0), graph.integers(*grid), graph.integers(1, 2))


def _attention(
    graph: Graph, x: str, name: str, grid: tuple[int, int], config: ImageEncoderConfig
) -> str:
    """Self-attention of [b, h, w, d] with decomposed relative positions."""
    (rows, columns), dim, heads = grid, config.embed_dim, config.num_heads
    head_dim, num_tokens = dim // heads, rows * columns
    qkv = graph.reshape(graph.dense(x, f"{name}.qkv"), -1, num_tokens, 3, heads, head_dim)
    qkv = graph.op("Transpose", qkv, perm=[2, 0, 3, 1, 4])
    q, k, v = (graph.op("Gather", qkv, graph.constant(part, np.int64), axis=0) for part in range(3))
    scaled = graph.op("Mul", q, graph.constant(head_dim**-0.5))
    logits = graph.op("MatMul", scaled, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    logits = graph.reshape(logits, -1, heads, rows, columns, num_tokens)
    logits = graph.reshape(logits, 0, heads, rows, columns * rows, columns)

    q_grid = graph.reshape(q, -1, heads, rows, columns, head_dim)
    # [b, a, h, w, c] x [h, c, kh]
    bias_h = graph.op("MatMul", q_grid, _table(graph, f"{name}.rel_pos_h", rows))
    # [b, a, w, h, c] x [w, c, kw], and h and w back in order
    q_turned = graph.op("Transpose", q_grid, perm=[0, 1, 3, 2, 4])
    bias_w = graph.op("MatMul", q_turned, _table(graph, f"{name}.rel_pos_w", columns))
    bias_w = graph.op("Transpose", bias_w, perm=[0, 1, 3, 2, 4])
    # The products have no more than five axes at a time, the most that some runtimes take.
    bias_h = graph.reshape(bias_h, -1, heads, rows, columns * rows, 1)
    logits = graph.op("Add", logits, bias_h)
    logits = graph.reshape(logits, -1, num_tokens, rows, columns)
    logits = graph.op("Add", logits, graph.reshape(bias_w, -1, num_tokens, 1, columns))
    logits = graph.reshape(logits, -1, heads, num_tokens, num_tokens)
    attention = graph.op("Softmax", logits, axis=-1)
    out = graph.merge_heads(graph.op("MatMul", attention, v), dim)
    return graph.dense(graph.reshape(out, -1, rows, columns, dim), f"{name}.proj")


def _table(graph: Graph, name: str, size: int) -> str:
    """The relative positions of all pairs as [query, c, key]."""
    table = graph.array(name)
    pairs = np.arange(size)[:, None] - np.arange(size)[None, :] + size - 1
    return graph.constant(table[pairs].transpose(0, 2, 1))
