"""Prompt encoder and mask decoder as one ONNX graph, with the published export's interface."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from sam_jax.export.onnx_graph import Graph
from sam_jax.models.mask_decoder import NUM_MASK_TOKENS, NUM_MULTIMASK
from sam_jax.models.sam import SamConfig
from sam_jax.ops.positional import grid_coords

_PROMPT, _DECODER = "prompt_encoder", "mask_decoder"
_TRANSFORMER = f"{_DECODER}.transformer"
_ATTENTION_RATE = 2


@dataclasses.dataclass(frozen=True)
class DecoderOptions:
    """Outputs of the graph; the published script has options of the same names.

    Attributes:
      return_single_mask: one mask per prompt, the best for its number of points, instead of all
        four.
      use_stability_score: the stability of the mask in place of its predicted IoU.
      return_extra_metrics: outputs ``stability_scores`` and ``areas`` too.
      stability_score_offset: how far the threshold moves to either side for the stability.
    """

    return_single_mask: bool = False
    use_stability_score: bool = False
    return_extra_metrics: bool = False
    stability_score_offset: float = 1.0


def decoder_graph(
    weights: Mapping[str, np.ndarray], config: SamConfig, options: DecoderOptions
) -> Graph:
    """The graph from image embeddings and prompts to masks of the original size.

    Inputs, all float32: ``image_embeddings`` [1, d, gh, gw]; ``point_coords`` [prompts, points, 2]
    in pixels of the model's input; ``point_labels`` [prompts, points] (1 and 0 are clicks, 2 and 3
    a box's corners, -1 pads; a list without a box ends with one -1 at (0, 0)); ``mask_input``
    [1 or prompts, 1, 4 gh, 4 gw]; ``has_mask_input`` [1]; ``orig_im_size`` [2], height and width.
    Outputs: ``masks`` [prompts, m, height, width], logits; ``iou_predictions`` [prompts, m];
    ``low_res_masks`` [prompts, m, 4 gh, 4 gw]. The published graph has one prompt only.

    Args:
      weights: of the model, by published names, float32.
      config: the model's shape.
      options: what to answer.

    Source: segment-anything, ``utils/onnx.py``, for names and meaning.
    """
    graph = Graph(weights)
    (height, width), (gh, gw) = config.image_encoder.image_size, config.image_encoder.grid
    dim = config.image_encoder.output_dim

    prompt_tokens = _embed_points(graph, (height, width))
    dense = _embed_masks(graph)
    output_tokens = np.concatenate(
        [graph.array(f"{_DECODER}.iou_token.weight"), graph.array(f"{_DECODER}.mask_tokens.weight")]
    )
    # Zeros of the right shape repeat the output tokens for every prompt.
    per_prompt = graph.op(
        "Mul",
        graph.op("ReduceSum", prompt_tokens, graph.integers(1), keepdims=1),
        graph.constant(0.0),
    )
    output_tokens = graph.op("Add", per_prompt, graph.constant(output_tokens[None]))
    tokens = graph.op("Concat", output_tokens, prompt_tokens, axis=1)

    image = graph.op("Add", "image_embeddings", dense)
    image = graph.op("Transpose", graph.reshape(image, 0, dim, gh * gw), perm=[0, 2, 1])
    tokens, image = _transformer(graph, tokens, image, _grid_positions(graph, config), config)

    masks = _masks(graph, tokens, image, config)
    iou_token = graph.op("Gather", tokens, graph.constant(0, np.int64), axis=1)
    scores = _mlp(graph, iou_token, f"{_DECODER}.iou_prediction_head")
    if options.use_stability_score:
        scores = _stability(graph, masks, options.stability_score_offset)
    if options.return_single_mask:
        masks, scores = _best(graph, masks, scores)
    full = _original_size(graph, masks, (height, width))

    num_masks = 1 if options.return_single_mask else NUM_MASK_TOKENS
    graph.name_output(full, "masks")
    graph.name_output(scores, "iou_predictions")
    outputs: dict[str, tuple[int | str, ...]] = {
        "masks": ("num_prompts", num_masks, "height", "width"),
        "iou_predictions": ("num_prompts", num_masks),
    }
    if options.return_extra_metrics:
        offset = options.stability_score_offset
        graph.name_output(_stability(graph, full, offset), "stability_scores")
        graph.name_output(_area(graph, full, 0.0), "areas")
        outputs |= {
            "stability_scores": ("num_prompts", num_masks),
            "areas": ("num_prompts", num_masks),
        }
    graph.name_output(masks, "low_res_masks")
    outputs["low_res_masks"] = ("num_prompts", num_masks, 4 * gh, 4 * gw)
    graph.declare(
        "sam_mask_decoder",
        inputs={
            "image_embeddings": (1, dim, gh, gw),
            "point_coords": ("num_prompts", "num_points", 2),
            "point_labels": ("num_prompts", "num_points"),
            "mask_input": ("num_masks", 1, 4 * gh, 4 * gw),
            "has_mask_input": (1,),
            "orig_im_size": (2,),
        },
        outputs=outputs,
    )
    return graph


def _embed_points(graph: Graph, image_size: tuple[int, int]) -> str:
    """Tokens [prompts, points, d]."""
    height, width = image_size
    coords = graph.op("Add", "point_coords", graph.constant(0.5))
    coords = graph.op("Div", coords, graph.constant([width, height]))
    features = _fourier(graph, coords)
    labels = graph.op("Unsqueeze", "point_labels", graph.integers(-1))

    def where(label: int) -> str:
        equal = graph.op("Equal", labels, graph.constant(float(label)))
        return graph.op("Cast", equal, to=1)  # float32

    is_pad = where(-1)
    embedded = graph.op("Mul", features, graph.op("Sub", graph.constant(1.0), is_pad))
    kinds = {-1: f"{_PROMPT}.not_a_point_embed.weight"}
    kinds |= {kind: f"{_PROMPT}.point_embeddings.{kind}.weight" for kind in range(4)}
    for label, name in kinds.items():
        of_kind = graph.op("Mul", where(label) if label >= 0 else is_pad, graph.weight(name))
        embedded = graph.op("Add", embedded, of_kind)
    return embedded


def _fourier(graph: Graph, coords_01: str) -> str:
    """Random Fourier features of coordinates in [0, 1]."""
    name = f"{_PROMPT}.pe_layer.positional_encoding_gaussian_matrix"
    centred = graph.op("Sub", graph.op("Mul", coords_01, graph.constant(2.0)), graph.constant(1.0))
    angles = graph.op("MatMul", centred, graph.weight(name))
    angles = graph.op("Mul", angles, graph.constant(2 * np.pi))
    return graph.op("Concat", graph.op("Sin", angles), graph.op("Cos", angles), axis=-1)


def _grid_positions(graph: Graph, config: SamConfig) -> str:
    """Positional encoding of the image's tokens [1, h w, d], a constant of the graph."""
    frequencies = graph.array(f"{_PROMPT}.pe_layer.positional_encoding_gaussian_matrix")
    coords = np.asarray(grid_coords(config.image_encoder.grid), np.float64)
    angles = 2 * np.pi * ((2 * coords - 1) @ frequencies.astype(np.float64))
    features = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    return graph.constant(features.reshape(1, -1, features.shape[-1]))


def _embed_masks(graph: Graph) -> str:
    """Dense embeddings [1 or prompts, d, gh, gw]."""
    down = f"{_PROMPT}.mask_downscaling"
    x = graph.convolution("mask_input", f"{down}.0", strides=[2, 2])
    x = graph.gelu(graph.channel_norm(x, f"{down}.1"))
    x = graph.convolution(x, f"{down}.3", strides=[2, 2])
    x = graph.gelu(graph.channel_norm(x, f"{down}.4"))
    x = graph.convolution(x, f"{down}.6")
    no_mask = graph.constant(graph.array(f"{_PROMPT}.no_mask_embed.weight").reshape(1, -1, 1, 1))
    # What a client puts into an unused input, NaN included, must not pass.
    has_mask = graph.op("Greater", "has_mask_input", graph.constant(0.5))
    return graph.op("Where", graph.reshape(has_mask, 1, 1, 1, 1), x, no_mask)


def _transformer(
    graph: Graph, tokens: str, image: str, image_pe: str, config: SamConfig
) -> tuple[str, str]:
    """Tokens [prompts, t, d] and image tokens [prompts, h w, d] after looking at one another."""
    token_pe = tokens
    heads = config.mask_decoder.num_heads
    for index in range(config.mask_decoder.depth):
        name = f"{_TRANSFORMER}.layers.{index}"

        def normed(x: str, number: int, name: str = name) -> str:
            return graph.layer_norm(x, f"{name}.norm{number}", 1e-5)

        # The first layer's tokens are their own positions.
        query = tokens if index == 0 else graph.op("Add", tokens, token_pe)
        attended = _attention(graph, query, query, tokens, f"{name}.self_attn", heads)
        tokens = normed(attended if index == 0 else graph.op("Add", tokens, attended), 1)

        query, key = graph.op("Add", tokens, token_pe), graph.op("Add", image, image_pe)
        attended = _attention(graph, query, key, image, f"{name}.cross_attn_token_to_image", heads)
        tokens = normed(graph.op("Add", tokens, attended), 2)

        hidden = graph.op("Relu", graph.dense(tokens, f"{name}.mlp.lin1"))
        tokens = normed(graph.op("Add", tokens, graph.dense(hidden, f"{name}.mlp.lin2")), 3)

        query = graph.op("Add", tokens, token_pe)
        attended = _attention(graph, key, query, tokens, f"{name}.cross_attn_image_to_token", heads)
        image = normed(graph.op("Add", image, attended), 4)
    query, key = graph.op("Add", tokens, token_pe), graph.op("Add", image, image_pe)
    name = f"{_TRANSFORMER}.final_attn_token_to_image"
    attended = _attention(graph, query, key, image, name, heads)
    tokens = graph.layer_norm(
        graph.op("Add", tokens, attended), f"{_TRANSFORMER}.norm_final_attn", 1e-5
    )
    return tokens, image


def _attention(graph: Graph, query: str, key: str, value: str, name: str, heads: int) -> str:
    """Multi-head attention of [b, n, d], whose inner width is the projections'."""
    inner = graph.array(f"{name}.q_proj.weight").shape[0]
    head_dim = inner // heads
    q, k, v = (
        graph.split_heads(graph.dense(x, f"{name}.{part}_proj"), heads, head_dim)
        for part, x in (("q", query), ("k", key), ("v", value))
    )
    scaled = graph.op("Mul", q, graph.constant(head_dim**-0.5))
    logits = graph.op("MatMul", scaled, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    out = graph.op("MatMul", graph.op("Softmax", logits, axis=-1), v)
    return graph.dense(graph.merge_heads(out, inner), f"{name}.out_proj")


def _masks(graph: Graph, tokens: str, image: str, config: SamConfig) -> str:
    """Mask logits [prompts, 4, 4 gh, 4 gw]."""
    (gh, gw), dim = config.image_encoder.grid, config.image_encoder.output_dim
    up = f"{_DECODER}.output_upscaling"

    def doubled(x: str, name: str) -> str:
        weights = (graph.weight(f"{name}.weight"), graph.weight(f"{name}.bias"))
        return graph.op("ConvTranspose", x, *weights, strides=[2, 2])

    x = graph.reshape(graph.op("Transpose", image, perm=[0, 2, 1]), 0, dim, gh, gw)
    x = graph.gelu(graph.channel_norm(doubled(x, f"{up}.0"), f"{up}.1"))
    pixels = graph.reshape(graph.gelu(doubled(x, f"{up}.3")), 0, dim // 8, 16 * gh * gw)
    filters = []
    for index in range(NUM_MASK_TOKENS):
        token = graph.op("Gather", tokens, graph.constant(1 + index, np.int64), axis=1)
        mlp = _mlp(graph, token, f"{_DECODER}.output_hypernetworks_mlps.{index}")
        filters.append(graph.op("Unsqueeze", mlp, graph.integers(1)))
    product = graph.op("MatMul", graph.op("Concat", *filters, axis=1), pixels)
    return graph.reshape(product, 0, NUM_MASK_TOKENS, 4 * gh, 4 * gw)


def _mlp(graph: Graph, x: str, name: str) -> str:
    for layer in range(2):
        x = graph.op("Relu", graph.dense(x, f"{name}.layers.{layer}"))
    return graph.dense(x, f"{name}.layers.2")


def _area(graph: Graph, logits: str, threshold: float) -> str:
    """Pixels above a threshold of [b, m, h, w]."""
    above = graph.op("Greater", logits, graph.constant(threshold))
    return graph.op("ReduceSum", graph.op("Cast", above, to=1), graph.integers(2, 3), keepdims=0)


def _stability(graph: Graph, logits: str, offset: float) -> str:
    """IoU of the masks at a higher and at a lower threshold."""
    return graph.op("Div", _area(graph, logits, offset), _area(graph, logits, -offset))


def _best(graph: Graph, masks: str, scores: str) -> tuple[str, str]:
    """The single-mask token's mask where there are several points, else the best of the others."""
    # Points of the prompt, those that pad included, as the published graph counts them.
    count = graph.op("Gather", graph.op("Shape", "point_coords"), graph.constant(1, np.int64))
    count = graph.op("Cast", count, to=1)
    several = graph.op("Sub", count, graph.constant(2.5))
    lean = graph.op("Mul", several, graph.constant([[1000.0] + [0.0] * NUM_MULTIMASK]))
    best = graph.op("ArgMax", graph.op("Add", scores, lean), axis=1, keepdims=1)
    index = graph.op("Unsqueeze", best, graph.integers(2))
    chosen_scores = graph.op("GatherElements", scores, best, axis=1)
    # One index per prompt and not per pixel: GatherND takes the rest as it is.
    chosen_masks = graph.op("GatherND", masks, index, batch_dims=1)
    return chosen_masks, chosen_scores


def _original_size(graph: Graph, masks: str, model_hw: tuple[int, int]) -> str:
    """Logits in the original image's pixels, the padding cropped away."""
    leading = graph.op(
        "Slice",
        graph.op("Shape", masks),
        graph.integers(0),
        graph.integers(2),
    )

    def resized(x: str, size_hw: str) -> str:
        sizes = graph.op("Concat", leading, size_hw, axis=0)
        return graph.op(
            "Resize",
            x,
            "",
            "",
            sizes,
            mode="linear",
            coordinate_transformation_mode="half_pixel",
        )

    model_size = graph.integers(*model_hw)
    # The image fills the model's input along one side.
    scale = graph.op(
        "ReduceMin",
        graph.op("Div", graph.constant(model_hw), "orig_im_size"),
        keepdims=1,
    )
    rounded = graph.op(
        "Floor",
        graph.op("Add", graph.op("Mul", "orig_im_size", scale), graph.constant(0.5)),
    )
    # A side is one pixel at least, however thin the image is.
    at_least_one = graph.op("Max", rounded, graph.constant(1.0))
    inner = graph.op("Cast", at_least_one, to=7)  # int64
    full = resized(masks, model_size)
    cropped = graph.op("Slice", full, graph.integers(0, 0), inner, graph.integers(2, 3))
    return resized(cropped, graph.op("Cast", "orig_im_size", to=7))
