"""A MobileSAM of small width that its published code can build, with random published tensors.

That code runs at 1024 pixels alone, and has a last stage of stride 1 only where it is 320 wide.
"""

import zlib
from pathlib import Path

import jax
import numpy as np

from sam_jax.models.mask_decoder import MaskDecoderConfig
from sam_jax.models.sam import SamConfig, variable_shapes
from sam_jax.models.tiny_vit import TinyViTConfig
from sam_jax.weights.names import from_native

SMALL = SamConfig(
    TinyViTConfig(
        embed_dims=(8, 12, 16, 320),
        depths=(1, 1, 2, 1),
        num_heads=(2, 3, 2, 4),
        mlp_rate=2.0,
        expand_rate=3.0,
    ),
    MaskDecoderConfig(mlp_dim=40, iou_head_dim=20),
)
# Outputs of the published code; tests/parity/test_mobile_sam.py writes the file.
FROZEN = Path(__file__).with_name("parity_tiny_mobile_sam.npz")
# Rows and columns of the embeddings that are kept.
FROZEN_STRIDE = 9


def random_tensors(config: SamConfig) -> dict[str, np.ndarray]:
    """Published tensors, each drawn by its name; statistics of normalisations among them."""
    template = variable_shapes(config)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), template)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith("running_var"):
            return np.exp(0.5 * normal)
        if name.endswith(("bias", "running_mean")):
            return 0.2 * normal
        if len(shape) == 1:
            return 1 + 0.2 * normal
        if name.endswith(("attention_biases", "gaussian_matrix")):
            return normal
        # A transposed convolution has its input channels first.
        is_transposed = "output_upscaling" in name
        fan_in = shape[0] if is_transposed else np.prod(shape[1:])
        return normal / np.sqrt(fan_in)

    return {
        name: draw(name, array.shape).astype(np.float32)
        for name, array in from_native(zeros).items()
    }


def image(size: tuple[int, int] = (1024, 1024)) -> np.ndarray:
    """A normalised image of coarse blobs, [1, h, w, 3]."""
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal((1, size[0] // 8, size[1] // 8, 3)).astype(np.float32)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)
