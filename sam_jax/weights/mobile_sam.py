"""The part of MobileSAM's published files that segments nothing: TinyViT's classifier."""

from collections.abc import Mapping

import numpy as np

from sam_jax.models.tiny_vit import TinyViTConfig

_ENCODER = "image_encoder"
_CLASSIFIER = (f"{_ENCODER}.norm_head.", f"{_ENCODER}.head.")
# PyTorch's count of the batches that made the running statistics.
_COUNTER = ".bn.num_batches_tracked"
# Of ImageNet, which TinyViT was pre-trained on.
_NUM_CLASSES = 1000


def is_left_out(name: str) -> bool:
    """True for a published tensor that no mask depends on."""
    return name.startswith(_CLASSIFIER) or name.endswith(_COUNTER)


def unused_classifier(config: TinyViTConfig) -> Mapping[str, np.ndarray]:
    """A classifier of zeros, without which MobileSAM's code does not load a file strictly."""
    dim = config.embed_dims[-1]
    return {
        f"{_ENCODER}.norm_head.weight": np.ones(dim, np.float32),
        f"{_ENCODER}.norm_head.bias": np.zeros(dim, np.float32),
        f"{_ENCODER}.head.weight": np.zeros((_NUM_CLASSES, dim), np.float32),
        f"{_ENCODER}.head.bias": np.zeros(_NUM_CLASSES, np.float32),
    }
