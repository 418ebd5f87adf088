"""Patch embeddings for images of another number of channels than weights were trained on."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sam_jax.arrays import Float, Shaped

_log = logging.getLogger(__name__)

# The layers that see the channels, of a ViT and of a TinyViT.
_PATCHES = "params/image_encoder/patch_embed/proj/kernel"
_CONVOLUTION = "params/image_encoder/patch_embed/conv1/kernel"


def with_channels(
    variables: Mapping[str, Any], num_before: int, num_channels: int, where: Any
) -> dict[str, Any]:
    """Variables of a model whose patch embedding takes so many channels; see ``inflated``.

    Args:
      variables: by native paths.
      num_before: channels that they take.
      num_channels: that they shall take.
      where: what to call the place they come from in the log.
    """
    if num_before == num_channels:
        return dict(variables)
    flat = dict(flatten_dict(variables, sep="/"))
    if _PATCHES in flat:
        rows, dim = flat[_PATCHES].shape
        kernel = np.asarray(flat[_PATCHES]).reshape(rows // num_before, num_before, dim)
        flat[_PATCHES] = inflated(kernel, num_channels, axis=1).reshape(-1, dim)
    else:
        flat[_CONVOLUTION] = inflated(np.asarray(flat[_CONVOLUTION]), num_channels, axis=2)
    say_inflated(num_before, num_channels, where)
    return unflatten_dict(flat, sep="/")


def say_inflated(num_before: int, num_channels: int, where: Any) -> None:
    """Says in the log that a patch embedding was made one of other channels."""
    _log.warning(
        "%s takes %d channels, the model %d: the patch embedding is inflated, its filters repeated "
        "and scaled so that the answer to equal channels stays",
        *(where, num_before, num_channels),
    )


def inflated(
    kernel: Shaped[np.ndarray, "*shape"], num_channels: int, *, axis: int
) -> Float[np.ndarray, "*inflated"]:
    """Filters for so many channels of those for others, float32.

    Channel k gets the filter of channel k mod n of the n there were, times n / c for the c there
    are. Where c is no multiple of n, some filters come more often than others, and what the sum of
    all then lacks is spread evenly over the channels. So an image whose channels are all equal
    gives what it gave before: weights that expect ImageNet's normalised grey see channels of mean 0
    and deviation 1 on the scale that they know. One channel gets the sum of all filters.

    Args:
      kernel: filters.
      num_channels: of the result.
      axis: of the channels.

    Source: Wightman, timm, ``adapt_input_conv``: repeated, times 3 / c; summed for one channel.
    Differs: the sum is exact for any c, where timm's is for multiples of 3 and for 1.
    """
    filters = np.moveaxis(np.asarray(kernel, np.float64), axis, 0)
    num_before = len(filters)
    total = filters.sum(axis=0)
    spread = repeated(filters, num_channels, axis=0) * (num_before / num_channels)
    spread += (total - spread.sum(axis=0)) / num_channels
    return np.moveaxis(spread, 0, axis).astype(np.float32)


def repeated(
    array: Shaped[np.ndarray, "*shape"], num_channels: int, *, axis: int
) -> Shaped[np.ndarray, "*repeated"]:
    """Filters or predictions for so many channels: k has those of k mod n of the n there were."""
    num_before = array.shape[axis]
    return np.take(array, np.arange(num_channels) % num_before, axis=axis)
