"""The shape of a model, from the shapes of its tensors and from Hugging Face's config."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sam_jax.models.image_encoder import ImageEncoderConfig
from sam_jax.models.mask_decoder import NUM_MASK_TOKENS, NUM_MULTIMASK, MaskDecoderConfig
from sam_jax.models.sam import SamConfig
from sam_jax.models.tiny_vit import TinyViTConfig
from sam_jax.models.variants import VARIANTS
from sam_jax.ops.images import RGB, ImageChannels
from sam_jax.weights.files import WeightsError
from sam_jax.weights.names import Scheme, foreign_names
from sam_jax.weights.strangers import which_model, which_part, without_wrapping

# A tensor that every checkpoint of a scheme has, and none of another: what it is called tells the
# scheme, and what stands before that name is a wrapper's prefix ("module.", "sam_model.").
_LANDMARKS: tuple[tuple[Scheme, str], ...] = (
    ("official", "image_encoder.patch_embed.proj.weight"),
    ("official", "image_encoder.patch_embed.seq.0.c.weight"),
    ("hugging_face", "vision_encoder.patch_embed.projection.weight"),
    ("mae", "patch_embed.proj.weight"),
)


def detect_scheme(
    tensors: Mapping[str, np.ndarray], where: Any
) -> tuple[Scheme, dict[str, np.ndarray]]:
    """Whose names the tensors have, and the tensors without a prefix that all of them share.

    Raises:
      WeightsError: if they are those of no checkpoint that is known here.
    """
    found, tensors = tensors, {without_wrapping(name): array for name, array in tensors.items()}
    if len(tensors) < len(found):
        raise WeightsError(
            f"{where} holds {len(found)} tensors of {len(tensors)} names, as soon as wrapping "
            "layers (module, _orig_mod) are left out: several models in one file"
        )
    if what := which_model(tensors):
        raise WeightsError(f"{where} holds {what}")
    for scheme, landmark in _LANDMARKS:
        for name in tensors:
            # A published name may follow a prefix, as long as a whole word ends before it.
            if name == landmark or name.endswith(f".{landmark}"):
                prefix = name.removesuffix(landmark)
                stripped = {key.removeprefix(prefix): value for key, value in tensors.items()}
                if scheme == "mae" and "cls_token" not in stripped:
                    continue
                return scheme, stripped
    if what := which_part(tensors):
        raise WeightsError(f"{where} holds {what}")
    some = ", ".join(list(tensors)[:6])
    raise WeightsError(
        f"{where} holds no checkpoint of Segment Anything or of MAE: none of its {len(tensors)} "
        f"tensors is called {', '.join(landmark for _, landmark in _LANDMARKS)}; the first are "
        f"{some}"
    )


@dataclasses.dataclass(frozen=True)
class Hints:
    """Facts of a model's shape that tensors do not tell; None for what is not known.

    Attributes:
      decoder_heads: heads of the decoder's attention.
      window_size: side of the encoder's windows, which their tables tell unless the whole grid is
        as large.
      global_attention_blocks: blocks without windows, likewise.
      channels: of the images, as the file's own metadata say; tensors tell their number alone.
      model_channels: of the images of the model that the tensors are for, where that is known.
    """

    decoder_heads: int | None = None
    window_size: int | None = None
    global_attention_blocks: tuple[int, ...] | None = None
    channels: ImageChannels | None = None
    model_channels: ImageChannels | None = None


def hints_of(config: SamConfig) -> Hints:
    """Facts that tensors do not tell, of a shape that is known."""
    encoder, heads = config.image_encoder, config.mask_decoder.num_heads
    if isinstance(encoder, TinyViTConfig):
        return Hints(heads, model_channels=config.channels)
    return Hints(
        heads,
        encoder.window_size,
        tuple(encoder.global_attention_blocks),
        model_channels=config.channels,
    )


class UnknownChannelsError(WeightsError):
    """Tensors of a model whose images have channels of which nothing says mean and deviation."""


def infer_config(
    tensors: Mapping[str, np.ndarray],
    scheme: Scheme,
    where: Any,
    hints: Hints | None = None,
) -> SamConfig:
    """The shape of the model that tensors belong to.

    Almost all of it follows from the tensors' shapes; see ``Hints`` for what does not.

    Args:
      tensors: by their names in ``scheme``, "official" or "hugging_face".
      scheme: whose names they are.
      where: what to call the place they come from in messages.
      hints: what is known besides; nothing will do at the published width.

    Raises:
      WeightsError: if tensors that tell the shape are missing, or make no sense together.
      UnknownChannelsError: see ``channels_of``.
    """
    hints = hints or Hints()

    def shape(path: str, rank: int) -> tuple[int, ...]:
        name = foreign_names(path, scheme)[0]
        if name not in tensors:
            raise WeightsError(f"{where} lacks the tensor {name} (native {path})")
        found = tensors[name].shape
        if len(found) != rank:
            raise WeightsError(f"{where}: {name} has shape {found}, expected {rank} axes")
        return found

    decoder = "params/mask_decoder"
    image_encoder: ImageEncoderConfig | TinyViTConfig
    if is_tiny_vit(tensors):
        image_encoder = _tiny_vit_config(tensors, shape)
    else:
        image_encoder = _vit_config(tensors, scheme, where, hints, shape)
    candidates = _count(tensors, f"{decoder}/hyper_networks/mlp_0/dense_0/kernel", scheme)
    if candidates != NUM_MASK_TOKENS:
        raise WeightsError(
            f"{where} lacks a mask decoder: it holds an image encoder alone"
            if not candidates
            else f"{where}: the decoder makes {candidates} masks, expected {NUM_MASK_TOKENS}"
        )
    layer = f"{decoder}/transformer/layer_0"
    mask_decoder = MaskDecoderConfig(
        depth=_count(tensors, f"{layer}/self_attn/q_proj/kernel", scheme),
        num_heads=_decoder_heads(hints.decoder_heads, image_encoder.output_dim, where),
        mlp_dim=shape(f"{layer}/mlp/dense_0/kernel", 2)[0],
        iou_head_dim=shape(f"{decoder}/iou_head/dense_0/kernel", 2)[0],
    )
    mask_channels = shape("params/prompt_encoder/mask_downscaling/conv2/kernel", 4)[0]
    layer = "conv1" if isinstance(image_encoder, TinyViTConfig) else "proj"
    count = shape(f"params/image_encoder/patch_embed/{layer}/kernel", 4)[1]
    return SamConfig(image_encoder, mask_decoder, mask_channels, channels_of(count, hints, where))


def channels_of(count: int, hints: Hints, where: Any) -> ImageChannels:
    """The channels of a model whose patch embedding takes so many.

    Their mean and deviation are those that the file says, else those of the model that it is for,
    else ImageNet's.

    Raises:
      UnknownChannelsError: if there are other channels than three, and nothing tells their
        statistics.
    """
    for known in (hints.channels, hints.model_channels):
        if known is not None and known.count == count:
            return known
    if count == RGB.count:
        return RGB
    if hints.model_channels is not None:
        # Of another model, which whoever compares the two says.
        return ImageChannels(count, (0.0,) * count, (1.0,) * count)
    raise UnknownChannelsError(
        f"{where} takes images of {count} channels, and nothing in it says their mean and "
        f"deviation: give model.in_channels = {count}, model.pixel_mean and model.pixel_std in a "
        "config (train.py and eval.py; `sam-jax channels FILES` computes them), or the run or the "
        ".safetensors file that it was made of, which hold them"
    )


def is_tiny_vit(tensors: Mapping[str, np.ndarray]) -> bool:
    """True if tensors by published names are those of a TinyViT, the encoder of MobileSAM."""
    return any(name.startswith("image_encoder.layers.") for name in tensors)


def _tiny_vit_config(
    tensors: Mapping[str, np.ndarray], shape: Callable[[str, int], tuple[int, ...]]
) -> TinyViTConfig:
    """The shape of a TinyViT; the size of images, of which no tensor tells, is the published."""
    encoder, published = "params/image_encoder", TinyViTConfig()
    dims = [shape(f"{encoder}/patch_embed/conv2/kernel", 4)[0]]
    heads, windows = list(published.num_heads[:1]), list(published.window_sizes[:1])
    for stage in (1, 2, 3):
        block = f"{encoder}/stage_{stage}_block_0/attn"
        dims.append(shape(f"{block}/proj/kernel", 2)[0])
        num_heads, pairs = shape(f"{block}/attention_biases", 2)
        heads.append(num_heads)
        windows.append(math.isqrt(pairs))
    depths = [
        len({name.split(".")[4] for name in tensors if name.startswith(f"{prefix}.")})
        for prefix in (f"image_encoder.layers.{stage}.blocks" for stage in range(4))
    ]
    return TinyViTConfig(
        embed_dims=tuple(dims),
        depths=tuple(depths),
        num_heads=tuple(heads),
        window_sizes=tuple(windows),
        mlp_rate=shape(f"{encoder}/stage_1_block_0/mlp/dense_0/kernel", 2)[0] / dims[1],
        expand_rate=shape(f"{encoder}/stage_0_block_0/conv1/kernel", 4)[0] / dims[0],
        output_dim=shape(f"{encoder}/neck_conv1/kernel", 4)[0],
    )


def _vit_config(
    tensors: Mapping[str, np.ndarray],
    scheme: Scheme,
    where: Any,
    hints: Hints,
    shape: Callable[[str, int], tuple[int, ...]],
) -> ImageEncoderConfig:
    """The shape of a vision transformer."""
    encoder = "params/image_encoder"
    embed_dim, _, patch, patch_w = shape(f"{encoder}/patch_embed/proj/kernel", 4)
    if patch != patch_w:
        raise WeightsError(f"{where}: expected square patches, found {patch} x {patch_w} pixels")
    _, *grid_hw, _ = shape(f"{encoder}/pos_embed", 4)
    grid = grid_hw[0], grid_hw[1]
    depth = _count(tensors, f"{encoder}/block_00/attn/qkv/kernel", scheme)
    if not depth:
        raise WeightsError(f"{where} holds no blocks of an image encoder")
    head_dims, tables = set(), []
    for index in range(depth):
        block = f"{encoder}/block_{index:02d}/attn"
        rows, head_dim = shape(f"{block}/rel_pos_h", 2)
        columns, _ = shape(f"{block}/rel_pos_w", 2)
        tables.append(((rows + 1) // 2, (columns + 1) // 2))
        head_dims.add(head_dim)
    windows = {table for table in tables if table != grid}
    if len(head_dims) > 1 or len(windows) > 1 or any(h != w for h, w in windows):
        raise WeightsError(
            f"{where}: the blocks' tables of relative positions fit neither the grid {grid} nor "
            f"one square window: they are for {sorted(set(tables))}, heads of {sorted(head_dims)}"
        )
    if windows:
        window_size = windows.pop()[0]
        global_blocks = tuple(i for i, table in enumerate(tables) if table == grid)
    else:
        window_size, global_blocks = _windows_that_fill_the_grid(grid, embed_dim, depth, hints)
    return ImageEncoderConfig(
        image_size=(grid[0] * patch, grid[1] * patch),
        patch_size=patch,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // head_dims.pop(),
        global_attention_blocks=global_blocks,
        window_size=window_size,
        mlp_rate=shape(f"{encoder}/block_00/mlp/dense_0/kernel", 2)[0] / embed_dim,
        output_dim=shape(f"{encoder}/neck_conv1/kernel", 4)[0],
    )


def _decoder_heads(heads: int | None, dim: int, where: Any) -> int:
    """Heads of the decoder's attention at a width: as known, or as published."""
    if heads is None:
        # A guess at another width would load, run, and be wrong by some points of IoU.
        if dim != ImageEncoderConfig.output_dim:
            raise WeightsError(
                f"{where} does not tell how many heads the decoder's attention has, and its width "
                f"{dim} is not the published {ImageEncoderConfig.output_dim}: say it, as "
                "decoder_heads (on the command line: --decoder-heads)"
            )
        return MaskDecoderConfig.num_heads
    if not isinstance(heads, int) or heads < 1 or dim // 2 % heads:
        raise WeightsError(
            f"{where}: the decoder's attention cannot have {heads!r} heads; expected a number that "
            f"divides its inner width {dim // 2}"
        )
    return heads


def _windows_that_fill_the_grid(
    grid: tuple[int, int], embed_dim: int, depth: int, hints: Hints
) -> tuple[int, tuple[int, ...]]:
    """Window side and global blocks where all tables have the grid's size, and tell neither.

    It makes no difference at this size of images, but at others it does. Windows of another size
    than the grid's would have tables of theirs: then all blocks are global.
    """
    every_block = tuple(range(depth))
    window_size, blocks = ImageEncoderConfig.window_size, every_block
    if known := vit_variant(embed_dim, depth):
        encoder = known.image_encoder
        assert isinstance(encoder, ImageEncoderConfig)
        window_size, blocks = encoder.window_size, tuple(encoder.global_attention_blocks)
    if hints.window_size is not None:
        window_size = hints.window_size
    if hints.global_attention_blocks is not None:
        blocks = hints.global_attention_blocks
    return window_size, blocks if (window_size, window_size) == grid else every_block


def vit_variant(embed_dim: int, depth: int) -> SamConfig | None:
    """The variant whose encoder is a vision transformer of this width and depth."""
    for config in VARIANTS.values():
        encoder = config.image_encoder
        if not isinstance(encoder, ImageEncoderConfig):
            continue
        if (encoder.embed_dim, encoder.depth) == (embed_dim, depth):
            return config
    return None


def differences(found: SamConfig, expected: SamConfig) -> list[str]:
    """Differences of two shapes, but for the size of images and what acts in training only."""
    kinds = [
        "a TinyViT" if isinstance(config.image_encoder, TinyViTConfig) else "a ViT"
        for config in (found, expected)
    ]
    if kinds[0] != kinds[1]:
        return [f"encoder is {kinds[0]}, expected {kinds[1]}"]

    def fields(config: SamConfig) -> dict[str, Any]:
        encoder, decoder = (
            dataclasses.asdict(part) for part in (config.image_encoder, config.mask_decoder)
        )
        if len(encoder.get("global_attention_blocks", ())) == encoder.get("depth"):
            del encoder["window_size"]  # there are no windows
        both = {f"encoder.{k}": _hashable(v) for k, v in encoder.items()}
        both |= {f"decoder.{k}": v for k, v in decoder.items()}
        both["mask_channels"] = config.mask_channels
        for name in ("encoder.image_size", "encoder.drop_path_rate", "decoder.dropout_rate"):
            both.pop(name, None)
        return both

    ours, theirs = fields(found), fields(expected)
    return [
        f"{name} is {ours.get(name)}, expected {theirs.get(name)}"
        for name in sorted(ours | theirs)
        if ours.get(name) != theirs.get(name)
    ] + channel_differences(found.channels, expected.channels)


def channel_differences(found: ImageChannels, expected: ImageChannels) -> list[str]:
    """Differences of the channels of two models' images, a line each."""
    if found.in_chans != expected.in_chans:
        ours, theirs = (
            "None (8-bit RGB)" if channels.in_chans is None else channels.in_chans
            for channels in (found, expected)
        )
        return [f"in_channels is {ours}, expected {theirs}"]
    return [
        f"{name} is {getattr(found, name)}, expected {getattr(expected, name)}"
        for name in ("pixel_mean", "pixel_std")
        if getattr(found, name) != getattr(expected, name)
    ]


def closest_variant(tensors: Mapping[str, np.ndarray], scheme: Scheme) -> SamConfig | None:
    """The variant of the same width and depth, for tensors that do not make a whole model."""
    if is_tiny_vit(tensors):
        return VARIANTS["mobile_sam"]
    name = foreign_names("params/image_encoder/block_00/norm1/scale", scheme)[0]
    width = tensors[name].shape[-1] if name in tensors and tensors[name].ndim else 0
    depth = _count(tensors, "params/image_encoder/block_00/attn/qkv/kernel", scheme)
    return vit_variant(width, depth)


def _count(tensors: Mapping[str, np.ndarray], first: str, scheme: Scheme) -> int:
    """The number of layers like the first: its name holds one 0, the layer's number."""
    name = foreign_names(first, scheme)[0]
    # The first lone 0 is the layer's; a later one is a layer's within it.
    pattern = re.escape(name).replace(r"\.0\.", r"\.(\d+)\.", 1)
    return len({match[1] for key in tensors if (match := re.fullmatch(pattern, key))})


def variant_name(config: SamConfig) -> str:
    """The variant that a shape is, perhaps of other image size and channels, or "custom"."""

    def essence(shape: SamConfig) -> SamConfig:
        encoder = shape.image_encoder
        changes = {f.name: _hashable(getattr(encoder, f.name)) for f in dataclasses.fields(encoder)}
        changes["image_size"] = (16 * encoder.patch_size,) * 2
        if "drop_path_rate" in changes:
            changes["drop_path_rate"] = 0.0
        decoder = dataclasses.replace(shape.mask_decoder, dropout_rate=0.0)
        return dataclasses.replace(
            shape,
            image_encoder=dataclasses.replace(encoder, **changes),
            mask_decoder=decoder,
            channels=RGB,
        )

    for name, shape in VARIANTS.items():
        if essence(shape) == essence(config):
            return name
    return "custom"


def _hashable(value: Any) -> Any:
    """A field's value; sequences, which may be lists, as tuples."""
    return tuple(value) if isinstance(value, list | tuple) else value


def to_hugging_face(config: SamConfig) -> dict[str, Any]:
    """The content of a Hugging Face folder's ``config.json``.

    Raises:
      WeightsError: if that library cannot express the shape.
    """
    encoder, decoder = config.image_encoder, config.mask_decoder
    if isinstance(encoder, TinyViTConfig):
        raise WeightsError(
            "Hugging Face's library has no MobileSAM; write --to official, which MobileSAM's code "
            "loads"
        )
    if encoder.grid[0] != encoder.grid[1]:
        raise WeightsError(
            f"Hugging Face's model takes square images only, this one is for {encoder.image_size}"
        )
    side = encoder.image_size[0]
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": {
            "hidden_size": encoder.embed_dim,
            "output_channels": encoder.output_dim,
            "num_hidden_layers": encoder.depth,
            "num_attention_heads": encoder.num_heads,
            "num_channels": config.channels.count,
            "image_size": side,
            "patch_size": encoder.patch_size,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "qkv_bias": True,
            "mlp_ratio": encoder.mlp_rate,
            "mlp_dim": round(encoder.mlp_rate * encoder.embed_dim),
            "use_abs_pos": True,
            "use_rel_pos": True,
            "window_size": encoder.window_size,
            "global_attn_indexes": list(encoder.global_attention_blocks),
            "num_pos_feats": encoder.output_dim // 2,
        },
        "prompt_encoder_config": {
            "hidden_size": encoder.output_dim,
            "image_size": side,
            "patch_size": encoder.patch_size,
            "image_embedding_size": encoder.grid[0],
            "mask_input_channels": config.mask_channels,
            "num_point_embeddings": 4,
        },
        "mask_decoder_config": {
            "hidden_size": encoder.output_dim,
            "mlp_dim": decoder.mlp_dim,
            "num_hidden_layers": decoder.depth,
            "num_attention_heads": decoder.num_heads,
            "attention_downsample_rate": 2,
            "num_multimask_outputs": NUM_MULTIMASK,
            "iou_head_depth": 3,
            "iou_head_hidden_dim": decoder.iou_head_dim,
            # The published decoder's; that library's own default, 1e-6, is the encoder's.
            "layer_norm_eps": 1e-5,
        },
    }


def hugging_face_hints(config: Mapping[str, Any]) -> Hints:
    """Facts of Hugging Face's ``config.json`` that no tensor's shape tells."""
    decoder = config.get("mask_decoder_config") or {}
    encoder = config.get("vision_config") or {}
    blocks = encoder.get("global_attn_indexes")
    return Hints(
        decoder_heads=decoder.get("num_attention_heads"),
        window_size=encoder.get("window_size"),
        global_attention_blocks=None if blocks is None else tuple(blocks),
    )
