"""Masked autoencoders: the start of training from one, and their weights in and out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import cv2
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sam_jax.arrays import Array
from sam_jax.models.masked_autoencoder import MaskedAutoencoder
from sam_jax.models.masked_autoencoder import init_variables as init_autoencoder
from sam_jax.models.sam import Sam, SamConfig, init_variables
from sam_jax.ops.positional import sincos_positions
from sam_jax.weights.files import WeightsError
from sam_jax.weights.geometry import Hints, channels_of, vit_variant
from sam_jax.weights.inflation import inflated, repeated, say_inflated
from sam_jax.weights.names import foreign_names, from_native, to_native

# What pre-training has and the encoder has not: the class token, the norm after the last block,
# and the decoder that pre-training throws away.
_DROPPED = ("cls_token", "mask_token", "norm.", "decoder_")
_POSITIONS, _DECODER_POSITIONS = "pos_embed", "decoder_pos_embed"
_PATCHES, _PREDICTION = "patch_embed.proj.weight", "decoder_pred"


def start_from_mae(
    model: Sam,
    tensors: Mapping[str, np.ndarray],
    key: Array,
    *,
    grid: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Variables of a model whose encoder continues a masked autoencoder's, float32.

    Positions are interpolated to the model's grid, without that of the class token; so are filters
    of another patch size (ViT-H is pre-trained with 14 pixels), and those for another number of
    channels are inflated (``inflation.inflated``). What pre-training has not is as
    fresh as in ``init_variables``: tables of relative positions at zero, neck, prompt encoder and
    mask decoder at random.

    Args:
      model: of the checkpoint's depth and width.
      tensors: of the checkpoint, by MAE's names.
      key: for what is drawn at random.
      grid: rows and columns of the checkpoint's positions; None for as many of both.

    Raises:
      WeightsError: if the positions are none of such a grid.
      NamesError: if the checkpoint is of another encoder.

    Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners"; Li et al. 2022,
    "Exploring Plain Vision Transformer Backbones for Object Detection", A.2 (the filters).
    """
    encoder = model.config.image_encoder
    kept = {name: array for name, array in tensors.items() if not name.startswith(_DROPPED)}
    if _POSITIONS in kept:
        of_grid = _grid_of_positions(kept[_POSITIONS], grid)
        kept[_POSITIONS] = _resize_bicubic(of_grid, encoder.grid)
    num_channels = model.config.channels.count
    if (name := _PATCHES) in kept and kept[name].ndim == 4:
        if (num_before := kept[name].shape[1]) != num_channels:
            kept[name] = inflated(kept[name], num_channels, axis=1)
            say_inflated(num_before, num_channels, "the masked autoencoder")
        filters = kept[name].transpose(2, 3, 0, 1).reshape(*kept[name].shape[2:], -1)
        resized = _resize_bicubic(filters[None], (encoder.patch_size,) * 2)[0]
        kept[name] = resized.reshape(
            encoder.patch_size, encoder.patch_size, *kept[name].shape[:2]
        ).transpose(2, 3, 0, 1)
    fresh = flatten_dict(init_variables(model, key), sep="/")
    template = {path: leaf for path, leaf in fresh.items() if foreign_names(path, "mae")}
    trained = flatten_dict(to_native(kept, unflatten_dict(template, sep="/"), "mae"), sep="/")
    trained = {path: np.asarray(array, np.float32) for path, array in trained.items()}
    return unflatten_dict(fresh | trained, sep="/")


def mae_config(tensors: Mapping[str, np.ndarray], where: Any, hints: Hints) -> SamConfig:
    """The published variant whose encoder a masked autoencoder's is, of the tensors' channels.

    Raises:
      WeightsError: if there is none, or nothing tells the statistics of its channels.
    """
    width, count = tensors[_PATCHES].shape[:2]
    depth = len(
        {
            name
            for name in tensors
            if name.endswith(".attn.qkv.weight") and name.startswith("blocks.")
        }
    )
    if config := vit_variant(width, depth):
        return dataclasses.replace(config, channels=channels_of(count, hints, where))
    raise WeightsError(
        f"{where} is a masked autoencoder of {depth} blocks of width {width}: no variant has such "
        "an encoder"
    )


def mae_tensors(model: MaskedAutoencoder, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors by the published names of a masked autoencoder, its fixed positions with them."""
    params = {"params": variables["params"]}
    tensors = from_native(params, "mae", channels=model.channels.count)
    return tensors | {name: _with_class(table) for name, table in _fixed_positions(model).items()}


def autoencoder_variables(
    model: MaskedAutoencoder,
    tensors: Mapping[str, np.ndarray],
    where: Any,
    *,
    inflates: bool = False,
) -> dict[str, Any]:
    """Variables of a masked autoencoder from tensors by their published names, float32.

    Positions are not read, since ours are the same fixed sines at every size.

    Args:
      model: the model.
      tensors: of the checkpoint.
      where: what to call the place they come from in messages.
      inflates: whether they may be for another number of channels, where training starts.

    Raises:
      NamesError: if tensors are missing, as the decoder's in a file that is meant for fine-tuning,
        unexpected or misshapen.
      WeightsError: if the positions are others.
    """
    kept = dict(tensors)
    for name, table in _fixed_positions(model).items():
        found, expected = kept.pop(name, None), _with_class(table)
        if found is not None and found.shape == expected.shape:
            distance = np.abs(found.astype(np.float32) - expected).max()
            # Half precision has three digits.
            if not distance < 1e-2:
                raise WeightsError(
                    f"{where}: {name} differs by {distance:.2g} from the fixed sines that MAE "
                    "pre-training has; it was trained further, and cannot go on as one"
                )
    if inflates:
        kept = _of_channels(kept, model, where)
    template = jax.eval_shape(lambda: init_autoencoder(model, jax.random.key(0)))
    params = to_native(kept, {"params": template["params"]}, "mae")["params"]
    return {"params": jax.tree.map(lambda a: np.asarray(a, np.float32), params), "constants": {}}


def _of_channels(
    tensors: Mapping[str, np.ndarray], model: MaskedAutoencoder, where: Any
) -> dict[str, np.ndarray]:
    """Tensors of an autoencoder for the model's channels: filters inflated, predictions repeated.

    What is predicted of a channel that was not there is what is predicted of the one whose filter
    it gets.
    """
    kept, num_channels = dict(tensors), model.channels.count
    filters = kept.get(_PATCHES)
    if filters is None or filters.ndim != 4 or filters.shape[1] == num_channels:
        return kept
    num_before = filters.shape[1]
    kept[_PATCHES] = inflated(filters, num_channels, axis=1)
    for name in (f"{_PREDICTION}.weight", f"{_PREDICTION}.bias"):
        if (found := kept.get(name)) is not None and len(found) % num_before == 0:
            # Rows are the pixels of a patch, and of each the channels.
            pixels = found.reshape(-1, num_before, *found.shape[1:])
            kept[name] = repeated(pixels, num_channels, axis=1).reshape(-1, *found.shape[1:])
    say_inflated(num_before, num_channels, where)
    return kept


def _fixed_positions(model: MaskedAutoencoder) -> dict[str, np.ndarray]:
    """Positions [gh, gw, d] of encoder and decoder by their published names."""
    grid = model.encoder.grid
    return {
        _POSITIONS: sincos_positions(grid, model.encoder.embed_dim),
        _DECODER_POSITIONS: sincos_positions(grid, model.config.decoder_dim),
    }


def _with_class(positions: np.ndarray) -> np.ndarray:
    """Positions [1, 1 + h * w, d] of [h, w, d], the class token's, zero, first."""
    flat = positions.reshape(-1, positions.shape[-1])
    return np.concatenate([np.zeros_like(flat[:1]), flat])[None]


def _grid_of_positions(positions: np.ndarray, grid: tuple[int, int] | None) -> np.ndarray:
    """Positions [1, h, w, d] of [1, 1 + h * w, d], the class token's first; None for a square."""
    if grid is None and positions.ndim == 3:
        grid = (round((positions.shape[1] - 1) ** 0.5),) * 2
    if grid is None or positions.ndim != 3 or grid[0] * grid[1] + 1 != positions.shape[1]:
        raise WeightsError(
            f"pos_embed has shape {positions.shape}, expected [1, 1 + n * n, d] with the class "
            "token's position first"
        )
    return positions[:, 1:].reshape(1, *grid, -1)


def _resize_bicubic(grid: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """A table [1, h, w, d] at another size.

    OpenCV's cubic kernel is PyTorch's (a = -0.75, half-pixel centres, edges repeated, no
    antialiasing); JAX's is another.
    """
    if grid.shape[1:3] == size_hw:
        return grid
    channels = np.moveaxis(grid[0].astype(np.float32), -1, 0)
    resized = [
        cv2.resize(channel, size_hw[::-1], interpolation=cv2.INTER_CUBIC) for channel in channels
    ]
    return np.stack(resized, axis=-1)[None]
