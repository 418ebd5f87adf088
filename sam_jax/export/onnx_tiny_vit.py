"""TinyViT, MobileSAM's image encoder, as an ONNX graph."""

from collections.abc import Mapping

import numpy as np

from sam_jax.arrays import GridShape
from sam_jax.export.onnx_encoder import declare_encoder, from_windows, neck, to_windows
from sam_jax.export.onnx_graph import Graph
from sam_jax.models.tiny_vit import MERGE_STRIDES, TinyViTConfig
from sam_jax.ops.bias_attention import biases_of_pairs

_ENCODER = "image_encoder"
_NORM_EPSILON = 1e-5


def tiny_vit_graph(weights: Mapping[str, np.ndarray], config: TinyViTConfig) -> Graph:
    """The graph from ``images`` to ``image_embeddings``, see ``onnx_encoder.encoder_graph``.

    Args:
      weights: of the model, by published names, float32; batch normalisations have been folded into
        the convolutions before them, and are their biases.
      config: the encoder's shape.
    """
    graph = Graph(weights)
    x = _conv(graph, "images", f"{_ENCODER}.patch_embed.seq.0", stride=2, is_of_images=True)
    x = _conv(graph, graph.gelu(x), f"{_ENCODER}.patch_embed.seq.2", stride=2)
    grid = config.image_size[0] // 4, config.image_size[1] // 4
    for stage, (dim, depth) in enumerate(zip(config.embed_dims, config.depths, strict=True)):
        layer = f"{_ENCODER}.layers.{stage}"
        for index in range(depth):
            name = f"{layer}.blocks.{index}"
            if stage == 0:
                x = _conv_block(graph, x, name)
            else:
                side, heads = config.window_sizes[stage], config.num_heads[stage]
                x = _transformer_block(graph, x, name, grid, side, dim, heads)
        if stage < len(MERGE_STRIDES):
            stride = MERGE_STRIDES[stage]
            x = _inverted(graph, x, f"{layer}.downsample", stride=stride)
            grid = grid[0] // stride, grid[1] // stride
    neck(graph, x)
    num_channels = graph.array(f"{_ENCODER}.patch_embed.seq.0.c.weight").shape[1]
    declare_encoder(graph, config, num_channels)
    return graph


def _conv(graph: Graph, x: str, name: str, *, stride: int = 1, is_of_images: bool = False) -> str:
    """A convolution of [b, c, h, w] with the bias that its batch normalisation became."""
    weight = graph.array(f"{name}.c.weight")
    channels, in_channels, side, _ = weight.shape
    return graph.op(
        "Conv",
        x,
        graph.weight(f"{name}.c.weight"),
        graph.weight(f"{name}.bn.bias"),
        strides=[stride] * 2,
        pads=[side // 2] * 4,
        # Those of each channel by itself have one input each; so have images of one channel.
        group=channels if in_channels == 1 and not is_of_images else 1,
    )


def _inverted(graph: Graph, x: str, name: str, *, stride: int = 1) -> str:
    """Three convolutions: of each place, of each channel, of each place."""
    x = graph.gelu(_conv(graph, x, f"{name}.conv1"))
    x = graph.gelu(_conv(graph, x, f"{name}.conv2", stride=stride))
    return _conv(graph, x, f"{name}.conv3")


def _conv_block(graph: Graph, x: str, name: str) -> str:
    return graph.gelu(graph.op("Add", x, _inverted(graph, x, name)))


def _transformer_block(
    graph: Graph, x: str, name: str, grid: GridShape, side: int, dim: int, heads: int
) -> str:
    """Attention in windows, a convolution and an MLP on [b, d, h, w]."""
    tokens = graph.op("Transpose", x, perm=[0, 2, 3, 1])
    windows = to_windows(graph, tokens, grid, side, dim)
    attended = _attention(graph, windows, f"{name}.attn", side, dim, heads)
    tokens = graph.op("Add", tokens, from_windows(graph, attended, grid, side, dim))
    x = graph.op("Transpose", tokens, perm=[0, 3, 1, 2])
    x = _conv(graph, x, f"{name}.local_conv")
    tokens = graph.op("Transpose", x, perm=[0, 2, 3, 1])
    hidden = graph.layer_norm(tokens, f"{name}.mlp.norm", _NORM_EPSILON)
    hidden = graph.gelu(graph.dense(hidden, f"{name}.mlp.fc1"))
    tokens = graph.op("Add", tokens, graph.dense(hidden, f"{name}.mlp.fc2"))
    return graph.op("Transpose", tokens, perm=[0, 3, 1, 2])


def _attention(graph: Graph, windows: str, name: str, side: int, dim: int, heads: int) -> str:
    """Self-attention of [n, s, s, d] with a bias for each distance."""
    head_dim, num_tokens = dim // heads, side * side
    x = graph.layer_norm(windows, f"{name}.norm", _NORM_EPSILON)
    qkv = graph.reshape(graph.dense(x, f"{name}.qkv"), -1, num_tokens, heads, 3, head_dim)
    qkv = graph.op("Transpose", qkv, perm=[3, 0, 2, 1, 4])
    q, k, v = (graph.op("Gather", qkv, graph.constant(part, np.int64), axis=0) for part in range(3))
    scaled = graph.op("Mul", q, graph.constant(head_dim**-0.5))
    logits = graph.op("MatMul", scaled, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    table = graph.array(f"{name}.attention_biases").reshape(heads, side, side)
    logits = graph.op("Add", logits, graph.constant(biases_of_pairs(table)))
    out = graph.op("MatMul", graph.op("Softmax", logits, axis=-1), v)
    out = graph.dense(graph.merge_heads(out, dim), f"{name}.proj")
    return graph.reshape(out, -1, side, side, dim)
