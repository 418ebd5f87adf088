"""The name and layout of each native parameter in other people's checkpoints.

``TABLE`` is the only place that knows. Both directions are generated from it, and only numpy is
needed: reading and writing files is the business of others.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
from einops import EinopsError, rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from sam_jax.errors import UserError

# Whose names: of the published checkpoints, of the ``transformers`` library, of MAE pre-training.
Scheme = Literal["official", "hugging_face", "mae"]


class NamesError(UserError, ValueError):
    """Tensors that are not those of the model; the message lists all of them."""


@runtime_checkable
class Relation(Protocol):
    """The way between torch tensors and the one native array that stands for them."""

    def to_native(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """The native array of torch tensors; a view if it can be."""
        ...

    def to_torch(self, array: np.ndarray, count: int, channels: int = 3) -> list[np.ndarray]:
        """The torch tensors, so many, of a native array; views if they can be.

        Args:
          array: the native one.
          count: how many tensors.
          channels: of the model's images.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Layout:
    """Other axes of a torch tensor, or of several that are stacked, each but the last of one row.

    Attributes:
      pattern: for einops, ``"torch -> native"``.
      sizes: lengths of axes that the native shape alone does not tell.
      square: whether the native rows are ``h w c`` of square patches, so that their number and
        ``c``, the image's channels, give ``h`` and ``w``.
    """

    pattern: str
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    square: bool = False

    def to_native(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """See ``Relation``."""
        stacked = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
        return rearrange(stacked, self.pattern, **self.sizes)

    def to_torch(self, array: np.ndarray, count: int, channels: int = 3) -> list[np.ndarray]:
        """See ``Relation``."""
        theirs, ours = self.pattern.split(" -> ")
        sizes = dict(self.sizes)
        if self.square:
            side = math.isqrt(array.shape[0] // channels)
            sizes |= {"h": side, "w": side, "c": channels}
        stacked = rearrange(array, f"{ours} -> {theirs}", **sizes)
        return np.split(stacked, range(1, count))


class SquareTable:
    """A table ``[heads, side * side]`` whose second axis becomes two."""

    def to_native(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """See ``Relation``."""
        (table,) = tensors
        return rearrange(table, "a (h w) -> a h w", h=math.isqrt(table.shape[1]))

    def to_torch(self, array: np.ndarray, count: int, channels: int = 3) -> list[np.ndarray]:
        """See ``Relation``."""
        assert count == 1
        return [rearrange(array, "a h w -> a (h w)")]


_BATCH_NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class FoldedKernel:
    """A convolution's weight times the factors of the batch normalisation after it.

    The torch tensors are the weight, and the normalisation's weight and running variance. What is
    written normalises nothing: its factor is one.
    """

    layout: Layout

    def to_native(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """See ``Relation``; float32."""
        weight, scale, variance = tensors
        factors = _batch_norm_factors(scale, variance)
        kernel = weight * factors.reshape(-1, *[1] * (weight.ndim - 1))
        return self.layout.to_native([kernel.astype(np.float32)])

    def to_torch(self, array: np.ndarray, count: int, channels: int = 3) -> list[np.ndarray]:
        """See ``Relation``."""
        assert count == 3
        (weight,) = self.layout.to_torch(array, 1)
        return [weight, *_no_batch_norm(len(weight))]


@dataclasses.dataclass(frozen=True)
class FoldedBias:
    """The shift of a batch normalisation, which is the bias of the convolution before it.

    The torch tensors are the normalisation's bias, weight, running mean and variance.
    """

    def to_native(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """See ``Relation``; float32."""
        bias, scale, mean, variance = tensors
        return (bias - mean * _batch_norm_factors(scale, variance)).astype(np.float32)

    def to_torch(self, array: np.ndarray, count: int, channels: int = 3) -> list[np.ndarray]:
        """See ``Relation``."""
        assert count == 4
        scale, variance = _no_batch_norm(len(array))
        return [array, scale, np.zeros_like(scale), variance]


def _batch_norm_factors(scale: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return scale / np.sqrt(np.asarray(variance, np.float64) + _BATCH_NORM_EPSILON)


def _no_batch_norm(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight and running variance of a batch normalisation whose factors are one."""
    ones = np.ones(channels, np.float32)
    return ones, ones - np.float32(_BATCH_NORM_EPSILON)


_SAME = Layout("... -> ...")


def _before_batch_norm(pattern: str) -> dict[str, tuple[str | tuple[str, ...], Relation]]:
    """A layer without bias that a batch normalisation follows, as one with a bias."""
    return {
        "kernel": (("c.weight", "bn.weight", "bn.running_var"), FoldedKernel(Layout(pattern))),
        "bias": (("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var"), FoldedBias()),
    }


# What a layer's tensors are called on both sides: native name -> (torch name, relation), or several
# torch names. A kind with an empty name is a tensor by itself. Which of them a layer has (a bias or
# none) the model says.
KINDS: dict[str, dict[str, tuple[str | tuple[str, ...], Relation]]] = {
    "dense": {"kernel": ("weight", Layout("o i -> i o")), "bias": ("bias", _SAME)},
    "conv": {"kernel": ("weight", Layout("o i h w -> h w i o"))},
    "norm": {"scale": ("weight", _SAME), "bias": ("bias", _SAME)},
    # Convolutions whose kernel is their stride are dense layers on patches here.
    "patches": {
        "kernel": ("weight", Layout("o c h w -> (h w c) o", square=True)),
        "bias": ("bias", _SAME),
    },
    "blocks_2x2": {
        "kernel": ("weight", Layout("o c h w -> (h w c) o", {"h": 2, "w": 2})),
        "bias": ("bias", _SAME),
    },
    "blocks_1x1": {
        "kernel": ("weight", Layout("o c 1 1 -> c o")),
        "bias": ("bias", _SAME),
    },
    # So are transposed convolutions, whose torch weight has the input channels first.
    "split": {
        "conv/kernel": ("weight", Layout("i o h w -> i h w o")),
        "bias": ("bias", _SAME),
    },
    "tensor": {"": ("", _SAME)},
    "positions": {"": ("", Layout("1 h w d -> h w d"))},
    "vector": {"": ("", Layout("1 d -> d"))},
    "token": {"": ("", Layout("1 1 d -> d"))},
    # Several torch tensors stacked, of which each but the last has one row.
    "rows": {"": ("", _SAME)},
    "conv_norm": _before_batch_norm("o i h w -> h w i o"),
    "dense_norm": _before_batch_norm("o i 1 1 -> i o"),
    "biases": {"": ("", SquareTable())},
}


class Row(NamedTuple):
    """One kind of layer under its native path and its name in every scheme.

    ``{i}`` is a number, written as the native side says; every other field in braces is a word that
    all sides share. Several names mean that the native tensor stacks those. None stands where a
    scheme has no such layer.
    """

    native: str
    official: str | tuple[str, ...] | None
    hugging_face: str | tuple[str, ...] | None
    kind: str
    mae: str | None = None


TABLE: tuple[Row, ...] = (
    # Image encoder
    Row(
        "params/image_encoder/patch_embed/proj",
        "image_encoder.patch_embed.proj",
        "vision_encoder.patch_embed.projection",
        "patches",
        mae="patch_embed.proj",
    ),
    Row(
        "params/image_encoder/pos_embed",
        "image_encoder.pos_embed",
        "vision_encoder.pos_embed",
        "positions",
        # Here once the class token's is gone and the rest is a grid: see ``weights.mae``.
        mae="pos_embed",
    ),
    Row(
        "params/image_encoder/block_{i:02d}/{norm}",
        "image_encoder.blocks.{i}.{norm}",
        "vision_encoder.layers.{i}.layer_{norm}",
        "norm",
        mae="blocks.{i}.{norm}",
    ),
    Row(
        "params/image_encoder/block_{i:02d}/attn/{rel_pos}",
        "image_encoder.blocks.{i}.attn.{rel_pos}",
        "vision_encoder.layers.{i}.attn.{rel_pos}",
        "tensor",
    ),
    Row(
        "params/image_encoder/block_{i:02d}/attn/{dense}",
        "image_encoder.blocks.{i}.attn.{dense}",
        "vision_encoder.layers.{i}.attn.{dense}",
        "dense",
        mae="blocks.{i}.attn.{dense}",
    ),
    Row(
        "params/image_encoder/block_{i:02d}/mlp/dense_0",
        "image_encoder.blocks.{i}.mlp.lin1",
        "vision_encoder.layers.{i}.mlp.lin1",
        "dense",
        mae="blocks.{i}.mlp.fc1",
    ),
    Row(
        "params/image_encoder/block_{i:02d}/mlp/dense_1",
        "image_encoder.blocks.{i}.mlp.lin2",
        "vision_encoder.layers.{i}.mlp.lin2",
        "dense",
        mae="blocks.{i}.mlp.fc2",
    ),
    Row(
        "params/image_encoder/neck_conv1",
        "image_encoder.neck.0",
        "vision_encoder.neck.conv1",
        "conv",
    ),
    Row(
        "params/image_encoder/neck_norm1",
        "image_encoder.neck.1",
        "vision_encoder.neck.layer_norm1",
        "norm",
    ),
    Row(
        "params/image_encoder/neck_conv2",
        "image_encoder.neck.2",
        "vision_encoder.neck.conv2",
        "conv",
    ),
    Row(
        "params/image_encoder/neck_norm2",
        "image_encoder.neck.3",
        "vision_encoder.neck.layer_norm2",
        "norm",
    ),
    # What a masked autoencoder has besides
    Row("params/image_encoder/class_token", None, None, "token", mae="cls_token"),
    Row("params/image_encoder/norm", None, None, "norm", mae="norm"),
    Row("params/pixel_decoder/embed", None, None, "dense", mae="decoder_embed"),
    Row("params/pixel_decoder/mask_token", None, None, "token", mae="mask_token"),
    Row(
        "params/pixel_decoder/block_{i:02d}/{norm}",
        None,
        None,
        "norm",
        mae="decoder_blocks.{i}.{norm}",
    ),
    Row(
        "params/pixel_decoder/block_{i:02d}/attn/{dense}",
        None,
        None,
        "dense",
        mae="decoder_blocks.{i}.attn.{dense}",
    ),
    Row(
        "params/pixel_decoder/block_{i:02d}/mlp/dense_0",
        None,
        None,
        "dense",
        mae="decoder_blocks.{i}.mlp.fc1",
    ),
    Row(
        "params/pixel_decoder/block_{i:02d}/mlp/dense_1",
        None,
        None,
        "dense",
        mae="decoder_blocks.{i}.mlp.fc2",
    ),
    Row("params/pixel_decoder/norm", None, None, "norm", mae="decoder_norm"),
    Row("params/pixel_decoder/prediction", None, None, "dense", mae="decoder_pred"),
    # TinyViT, MobileSAM's image encoder; its neck is the one above
    Row(
        "params/image_encoder/patch_embed/conv1",
        "image_encoder.patch_embed.seq.0",
        None,
        "conv_norm",
    ),
    Row(
        "params/image_encoder/patch_embed/conv2",
        "image_encoder.patch_embed.seq.2",
        None,
        "conv_norm",
    ),
    Row(
        "params/image_encoder/stage_{stage}_block_{i}/{pointwise}",
        "image_encoder.layers.{stage}.blocks.{i}.{pointwise}",
        None,
        "dense_norm",
    ),
    Row(
        "params/image_encoder/stage_{stage}_block_{i}/{depthwise}",
        "image_encoder.layers.{stage}.blocks.{i}.{depthwise}",
        None,
        "conv_norm",
    ),
    Row(
        "params/image_encoder/stage_{stage}_block_{i}/norm1",
        "image_encoder.layers.{stage}.blocks.{i}.attn.norm",
        None,
        "norm",
    ),
    Row(
        "params/image_encoder/stage_{stage}_block_{i}/attn/attention_biases",
        "image_encoder.layers.{stage}.blocks.{i}.attn.attention_biases",
        None,
        "biases",
    ),
    Row(
        "params/image_encoder/stage_{stage}_block_{i}/attn/{dense}",
        "image_encoder.layers.{stage}.blocks.{i}.attn.{dense}",
        None,
        "dense",
    ),
    Row(
        "params/image_encoder/stage_{stage}_block_{i}/norm2",
        "image_encoder.layers.{stage}.blocks.{i}.mlp.norm",
        None,
        "norm",
    ),
    Row(
        "params/image_encoder/stage_{stage}_block_{i}/mlp/dense_0",
        "image_encoder.layers.{stage}.blocks.{i}.mlp.fc1",
        None,
        "dense",
    ),
    Row(
        "params/image_encoder/stage_{stage}_block_{i}/mlp/dense_1",
        "image_encoder.layers.{stage}.blocks.{i}.mlp.fc2",
        None,
        "dense",
    ),
    Row(
        "params/image_encoder/stage_{stage}_merge/{pointwise}",
        "image_encoder.layers.{stage}.downsample.{pointwise}",
        None,
        "dense_norm",
    ),
    Row(
        "params/image_encoder/stage_{stage}_merge/{depthwise}",
        "image_encoder.layers.{stage}.downsample.{depthwise}",
        None,
        "conv_norm",
    ),
    # Prompt encoder
    Row(
        "constants/prompt_encoder/frequencies",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "shared_image_embedding.positional_embedding",
        "tensor",
    ),
    Row(
        "params/prompt_encoder/point_kinds",
        tuple(f"prompt_encoder.point_embeddings.{kind}.weight" for kind in range(4)),
        tuple(f"prompt_encoder.point_embed.{kind}.weight" for kind in range(4)),
        "rows",
    ),
    Row(
        "params/prompt_encoder/not_a_point",
        "prompt_encoder.not_a_point_embed.weight",
        "prompt_encoder.not_a_point_embed.weight",
        "vector",
    ),
    Row(
        "params/prompt_encoder/no_mask",
        "prompt_encoder.no_mask_embed.weight",
        "prompt_encoder.no_mask_embed.weight",
        "vector",
    ),
    Row(
        "params/prompt_encoder/mask_downscaling/conv1",
        "prompt_encoder.mask_downscaling.0",
        "prompt_encoder.mask_embed.conv1",
        "blocks_2x2",
    ),
    Row(
        "params/prompt_encoder/mask_downscaling/norm1",
        "prompt_encoder.mask_downscaling.1",
        "prompt_encoder.mask_embed.layer_norm1",
        "norm",
    ),
    Row(
        "params/prompt_encoder/mask_downscaling/conv2",
        "prompt_encoder.mask_downscaling.3",
        "prompt_encoder.mask_embed.conv2",
        "blocks_2x2",
    ),
    Row(
        "params/prompt_encoder/mask_downscaling/norm2",
        "prompt_encoder.mask_downscaling.4",
        "prompt_encoder.mask_embed.layer_norm2",
        "norm",
    ),
    Row(
        "params/prompt_encoder/mask_downscaling/conv3",
        "prompt_encoder.mask_downscaling.6",
        "prompt_encoder.mask_embed.conv3",
        "blocks_1x1",
    ),
    # Mask decoder
    Row(
        "params/mask_decoder/output_tokens",
        ("mask_decoder.iou_token.weight", "mask_decoder.mask_tokens.weight"),
        ("mask_decoder.iou_token.weight", "mask_decoder.mask_tokens.weight"),
        "rows",
    ),
    Row(
        "params/mask_decoder/transformer/layer_{i}/{attention}/{dense}",
        "mask_decoder.transformer.layers.{i}.{attention}.{dense}",
        "mask_decoder.transformer.layers.{i}.{attention}.{dense}",
        "dense",
    ),
    Row(
        "params/mask_decoder/transformer/layer_{i}/mlp/dense_0",
        "mask_decoder.transformer.layers.{i}.mlp.lin1",
        "mask_decoder.transformer.layers.{i}.mlp.lin1",
        "dense",
    ),
    Row(
        "params/mask_decoder/transformer/layer_{i}/mlp/dense_1",
        "mask_decoder.transformer.layers.{i}.mlp.lin2",
        "mask_decoder.transformer.layers.{i}.mlp.lin2",
        "dense",
    ),
    Row(
        "params/mask_decoder/transformer/layer_{i}/{norm}",
        "mask_decoder.transformer.layers.{i}.{norm}",
        "mask_decoder.transformer.layers.{i}.layer_{norm}",
        "norm",
    ),
    Row(
        "params/mask_decoder/transformer/final_attn_token_to_image/{dense}",
        "mask_decoder.transformer.final_attn_token_to_image.{dense}",
        "mask_decoder.transformer.final_attn_token_to_image.{dense}",
        "dense",
    ),
    Row(
        "params/mask_decoder/transformer/norm_final",
        "mask_decoder.transformer.norm_final_attn",
        "mask_decoder.transformer.layer_norm_final_attn",
        "norm",
    ),
    Row(
        "params/mask_decoder/upscaling/split1",
        "mask_decoder.output_upscaling.0",
        "mask_decoder.upscale_conv1",
        "split",
    ),
    Row(
        "params/mask_decoder/upscaling/norm",
        "mask_decoder.output_upscaling.1",
        "mask_decoder.upscale_layer_norm",
        "norm",
    ),
    Row(
        "params/mask_decoder/upscaling/split2",
        "mask_decoder.output_upscaling.3",
        "mask_decoder.upscale_conv2",
        "split",
    ),
    Row(
        "params/mask_decoder/hyper_networks/mlp_{i}/dense_0",
        "mask_decoder.output_hypernetworks_mlps.{i}.layers.0",
        "mask_decoder.output_hypernetworks_mlps.{i}.proj_in",
        "dense",
    ),
    Row(
        "params/mask_decoder/hyper_networks/mlp_{i}/dense_1",
        "mask_decoder.output_hypernetworks_mlps.{i}.layers.1",
        "mask_decoder.output_hypernetworks_mlps.{i}.layers.0",
        "dense",
    ),
    Row(
        "params/mask_decoder/hyper_networks/mlp_{i}/dense_2",
        "mask_decoder.output_hypernetworks_mlps.{i}.layers.2",
        "mask_decoder.output_hypernetworks_mlps.{i}.proj_out",
        "dense",
    ),
    Row(
        "params/mask_decoder/iou_head/dense_0",
        "mask_decoder.iou_prediction_head.layers.0",
        "mask_decoder.iou_prediction_head.proj_in",
        "dense",
    ),
    Row(
        "params/mask_decoder/iou_head/dense_1",
        "mask_decoder.iou_prediction_head.layers.1",
        "mask_decoder.iou_prediction_head.layers.0",
        "dense",
    ),
    Row(
        "params/mask_decoder/iou_head/dense_2",
        "mask_decoder.iou_prediction_head.layers.2",
        "mask_decoder.iou_prediction_head.proj_out",
        "dense",
    ),
)
# Which words a field stands for; they keep the patterns apart.
_FIELDS = {
    "i": r"\d+",
    "stage": r"\d",
    "pointwise": r"conv[13]",
    "depthwise": r"conv2|local_conv",
    "norm": r"norm\d",
    "rel_pos": r"rel_pos_[hw]",
    "dense": r"qkv|proj|[qkv]_proj|out_proj",
    "attention": r"self_attn|cross_attn_token_to_image|cross_attn_image_to_token",
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor: its native path, its foreign names, and the way between them.

    Attributes:
      native: pattern of the path.
      foreign: patterns of the names; several if the native tensor stands for those.
      relation: how they become each other.
    """

    native: str
    foreign: tuple[str, ...]
    relation: Relation

    def to_native(self, tensors: list[np.ndarray]) -> np.ndarray:
        """The native array of the tensors that ``foreign`` names, in its order."""
        return self.relation.to_native(tensors)

    def to_foreign(self, array: np.ndarray, channels: int = 3) -> list[np.ndarray]:
        """The tensors that ``foreign`` names, in its order, of a native array."""
        return self.relation.to_torch(array, len(self.foreign), channels)


def _rules(scheme: Scheme) -> Iterator[Rule]:
    for row in TABLE:
        foreign = getattr(row, scheme)
        if foreign is None:
            continue
        names = (foreign,) if isinstance(foreign, str) else foreign
        for ours, (theirs, relation) in KINDS[row.kind].items():
            endings = (theirs,) if isinstance(theirs, str) else theirs
            yield Rule(
                native=f"{row.native}/{ours}".rstrip("/"),
                foreign=tuple(f"{name}.{end}".rstrip(".") for name in names for end in endings),
                relation=relation,
            )


RULES: dict[Scheme, tuple[Rule, ...]] = {
    scheme: tuple(_rules(scheme)) for scheme in get_args(Scheme)
}


def native_path(name: str, scheme: Scheme = "official") -> str | None:
    """The native path of a foreign tensor (of which it may be a part), or None."""
    for rule, _, foreign in _regexes(scheme):
        for regex in foreign:
            if (match := regex.fullmatch(name)) is not None:
                return rule.native.format(**_fields(match))
    return None


def foreign_names(path: str, scheme: Scheme = "official") -> tuple[str, ...]:
    """The foreign tensors that a native path stands for, mostly one; none if it has no name."""
    return _find(path, scheme)[1]


def to_native(
    tensors: Mapping[str, np.ndarray], template: Mapping[str, Any], scheme: Scheme = "official"
) -> dict[str, Any]:
    """Native variables of foreign tensors, types unchanged.

    Args:
      tensors: arrays by foreign name.
      template: variables of the model, or their shapes
        (``jax.eval_shape(lambda: init_variables(model, key))``), which say what must be there.
      scheme: whose names they are.

    Raises:
      NamesError: if tensors are missing, unexpected or misshapen; it lists all of them by both
        names.
    """
    problems, arrays = [], {}
    used: set[str] = set()
    for path, leaf in flatten_dict(template, sep="/").items():
        rule, names = _find(path, scheme)
        used.update(names)
        absent = [name for name in names if name not in tensors]
        if rule is None or absent:
            problems.append(f"missing: {', '.join(absent) or f'no {scheme} name'} (native {path})")
            continue
        parts = [np.asarray(tensors[name]) for name in names]
        try:
            arrays[path] = rule.to_native(parts)
            fits = arrays[path].shape == leaf.shape
        except (EinopsError, ValueError):
            fits = False
        if not fits:
            found = ", ".join(
                f"{name} {part.shape}" for name, part in zip(names, parts, strict=True)
            )
            problems.append(f"misshapen: {found} (native {path} is {leaf.shape})")
    problems += [
        f"unexpected: {name} (native {native_path(name, scheme) or 'none'})"
        for name in tensors
        if name not in used
    ]
    _raise_if_any(problems, "these tensors are not those of the model")
    return unflatten_dict(arrays, sep="/")


def from_native(
    variables: Mapping[str, Any], scheme: Scheme = "official", *, channels: int = 3
) -> dict[str, np.ndarray]:
    """Tensors by their foreign names of native variables, types unchanged.

    Args:
      variables: ``{"params": ..., "constants": ...}`` of a model, or a part of it.
      scheme: whose names they get.
      channels: of the model's images.

    Raises:
      NamesError: if there are variables without a foreign name or of another rank than they should
        have; it lists all of them.
    """
    problems = []
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in flatten_dict(variables, sep="/").items():
        rule, names = _find(path, scheme)
        if rule is None:
            problems.append(f"unexpected: {path} ({scheme} none)")
            continue
        try:
            tensors.update(zip(names, rule.to_foreign(np.asarray(leaf), channels), strict=True))
        except EinopsError:
            problems.append(f"misshapen: {path} {leaf.shape} ({scheme} {', '.join(names)})")
    _raise_if_any(problems, "these variables are not those of a published model")
    return tensors


def _find(path: str, scheme: Scheme) -> tuple[Rule | None, tuple[str, ...]]:
    for rule, native, _ in _regexes(scheme):
        if (match := native.fullmatch(path)) is not None:
            fields = _fields(match)
            return rule, tuple(name.format(**fields) for name in rule.foreign)
    return None, ()


@functools.cache
def _regexes(scheme: Scheme) -> list[tuple[Rule, re.Pattern[str], list[re.Pattern[str]]]]:
    """Each rule of a scheme, with what its native and its foreign names match."""
    return [
        (rule, _regex(rule.native), [_regex(name) for name in rule.foreign])
        for rule in RULES[scheme]
    ]


def _regex(pattern: str) -> re.Pattern[str]:
    # Odd pieces are the fields, as in "block_{i:02d}/attn".
    pieces = re.split(r"\{(\w+)(?::02d)?\}", pattern)
    return re.compile(
        "".join(
            f"(?P<{piece}>{_FIELDS[piece]})" if index % 2 else re.escape(piece)
            for index, piece in enumerate(pieces)
        )
    )


def _fields(match: re.Match[str]) -> dict[str, Any]:
    """The fields of a name that follows a pattern, numbers as int."""
    return {key: int(word) if word.isdigit() else word for key, word in match.groupdict().items()}


def _raise_if_any(problems: list[str], headline: str) -> None:
    if problems:
        lines = "\n  ".join(sorted(problems))
        raise NamesError(f"{headline}; {len(problems)} problems:\n  {lines}")
