"""The start of training: an encoder from masked-autoencoder pre-training, the rest fresh."""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sam_jax.arrays import Array
from sam_jax.models.sam import Sam, SamConfig, init_variables
from sam_jax.weights.files import WeightsError
from sam_jax.weights.geometry import vit_variant
from sam_jax.weights.names import foreign_names, to_native

# What pre-training has and the encoder has not: the class token, the norm after the last block,
# and the decoder that pre-training throws away.
_DROPPED = ("cls_token", "mask_token", "norm.", "decoder_")


def start_from_mae(model: Sam, tensors: Mapping[str, np.ndarray], key: Array) -> dict[str, Any]:
    """Variables of a model whose encoder continues a masked autoencoder's, float32.

    Positions are interpolated to the model's grid, without that of the class token; so are filters
    of another patch size (ViT-H is pre-trained with 14 pixels). What pre-training has not is as
    fresh as in ``init_variables``: tables of relative positions at zero, neck, prompt encoder and
    mask decoder at random.

    Args:
      model: of the checkpoint's depth and width.
      tensors: of the checkpoint, by MAE's names.
      key: for what is drawn at random.

    Raises:
      WeightsError: if there are no square positions.
      NamesError: if the checkpoint is of another encoder.

    Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners"; Li et al. 2022,
    "Exploring Plain Vision Transformer Backbones for Object Detection", A.2 (the filters).
    """
    encoder = model.config.image_encoder
    kept = {name: array for name, array in tensors.items() if not name.startswith(_DROPPED)}
    if "pos_embed" in kept:
        kept["pos_embed"] = _resize_bicubic(_grid_of_positions(kept["pos_embed"]), encoder.grid)
    if (name := "patch_embed.proj.weight") in kept and kept[name].ndim == 4:
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


def mae_config(tensors: Mapping[str, np.ndarray], where: Any) -> SamConfig:
    """The published variant whose encoder a masked autoencoder's is.

    Raises:
      WeightsError: if there is none.
    """
    width = tensors["patch_embed.proj.weight"].shape[0]
    depth = len(
        {
            name
            for name in tensors
            if name.endswith(".attn.qkv.weight") and name.startswith("blocks.")
        }
    )
    if config := vit_variant(width, depth):
        return config
    raise WeightsError(
        f"{where} is a masked autoencoder of {depth} blocks of width {width}: no variant has such "
        "an encoder"
    )


def _grid_of_positions(positions: np.ndarray) -> np.ndarray:
    """Positions [1, h, w, d] of [1, 1 + h * w, d], square, the class token's first."""
    side = round((positions.shape[1] - 1) ** 0.5) if positions.ndim == 3 else 0
    if positions.ndim != 3 or side * side + 1 != positions.shape[1]:
        raise WeightsError(
            f"pos_embed has shape {positions.shape}, expected [1, 1 + n * n, d] with the class "
            "token's position first"
        )
    return positions[:, 1:].reshape(1, side, side, -1)


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
