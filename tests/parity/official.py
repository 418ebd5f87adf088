"""The published PyTorch model: built at any size, given random weights, run on numpy arrays."""

import contextlib
import ctypes
import platform
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import published
from sam_jax.models.sam import SamConfig, variable_shapes
from sam_jax.weights.names import to_native

# Every file of comparisons imports this one: without torch they are all skipped here.
torch = pytest.importorskip("torch", reason="needs requirements-torch.lock")
nn = torch.nn
# Other tests have the other cores, and threads that wait for one another burn what they wait for.
torch.set_num_threads(1)

# Values that are drawn for a tensor. Larger ones repeat them: drawing takes longer than computing
# with them does, and no row or column of theirs has a length that divides a prime.
MAX_DRAWN = 65_537

# Largest allowed difference, over the largest magnitude of the reference's output.
RELATIVE_TOLERANCE = 1e-5


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest absolute difference over the reference's largest magnitude."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_equal(ours: Any, theirs: Any, tolerance: float = RELATIVE_TOLERANCE) -> None:
    error = relative_error(ours, theirs)
    assert error <= tolerance, f"relative error {error:.1e} > {tolerance:.0e}"


def build(config: SamConfig, seed: int = 0) -> Any:
    """The published model in the shape of a config, square or not, with random weights.

    The published encoder is built for square images only, but nothing in its forward pass needs
    that: its tables of positions are exchanged for ones of the right shape.
    """
    encoder, grid = config.image_encoder, config.image_encoder.grid
    model = published.build(config)
    if grid[0] != grid[1]:
        model.image_encoder.pos_embed = nn.Parameter(torch.zeros(1, *grid, encoder.embed_dim))
        for index in encoder.global_attention_blocks:
            attention = model.image_encoder.blocks[index].attn
            head_dim = encoder.embed_dim // encoder.num_heads
            attention.rel_pos_h = nn.Parameter(torch.zeros(2 * grid[0] - 1, head_dim))
            attention.rel_pos_w = nn.Parameter(torch.zeros(2 * grid[1] - 1, head_dim))
    randomize(model, seed)
    quieten(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def randomize(model: Any, seed: int) -> None:
    """Random values for every tensor, scaled so that activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Any, std: float, mean: float = 0.0) -> None:
        drawn = tensor if tensor.numel() <= MAX_DRAWN else tensor.new_empty(MAX_DRAWN)
        nn.init.trunc_normal_(drawn, mean, std, mean - 2 * std, mean + 2 * std, generator=generator)
        if drawn is not tensor:
            times = -(-tensor.numel() // MAX_DRAWN)
            tensor.copy_(drawn.repeat(times)[: tensor.numel()].view(tensor.shape))

    linear = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or name in ("pixel_mean", "pixel_std"):
                continue
            if name == "bias":
                normal(tensor, 0.2)
            elif isinstance(module, linear):
                # A transposed convolution has its input channels first, and no cell of its output
                # sees more than one of its input.
                transposed = isinstance(module, nn.ConvTranspose2d)
                fan_in = len(tensor) if transposed else tensor[0].numel()
                normal(tensor, fan_in**-0.5)
            elif name == "weight" and tensor.ndim == 1:
                normal(tensor, 0.2, mean=1.0)
            elif name.startswith("rel_pos"):
                normal(tensor, 0.3)
            else:
                normal(tensor, 1.0)


# What ends in a norm, with residual branches and without.
FEEDS_A_NORM = re.compile(
    r".*(patch_embed\.proj|attn\.proj|out_proj|lin2|neck\.[02]|mask_downscaling\.3|upscaling\.0)"
)


@torch.no_grad()
def quieten(model: Any) -> None:
    """Makes what norms take in small, so that their epsilon shows.

    At a variance of one, 1e-5 instead of 1e-6 changes less than the tolerance of a comparison.
    """
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        gain = 1.0
        if name.endswith("mask_downscaling.0"):  # its input has a deviation of 6
            gain = 0.02
        elif FEEDS_A_NORM.fullmatch(name):
            gain = 0.1
        elif weight.ndim == 1:  # a norm, whose output reaches the next one
            gain = 0.3
        for tensor in module.parameters(recurse=False):
            tensor *= gain
    model.image_encoder.pos_embed *= 0.1


def numpy_state(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def native_variables(model: Any, config: SamConfig) -> dict[str, Any]:
    """The same weights for our model."""
    template = variable_shapes(config)
    return jax.tree.map(jax.numpy.asarray, to_native(numpy_state(model), template))


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Has the C library keep what the published code frees until the block ends.

    Its attention weights are hundreds of megabytes a block, which the system would map anew each
    time: as much work as computing them.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    # Of mallopt(3), with their values by default.
    mmap_max, trim_threshold = (-4, 65_536), (-1, 128 << 10)
    library.mallopt(mmap_max[0], 0)
    library.mallopt(trim_threshold[0], -1)
    yield
    library.mallopt(*mmap_max)
    library.mallopt(*trim_threshold)
    library.malloc_trim(0)


@torch.no_grad()
def encode(model: Any, images: np.ndarray) -> np.ndarray:
    """Image embeddings [b, gh, gw, d] of normalised images [b, h, w, 3]."""
    embeddings = model.image_encoder(torch.from_numpy(images).permute(0, 3, 1, 2))
    return embeddings.permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def embed_prompts(model: Any, prompts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sparse [p, t, d] and dense [p, gh, gw, d] embeddings of the prompts of one image."""
    sparse, dense = _embed_prompts(model, prompts)
    return sparse.numpy(), dense.permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def decode(
    model: Any,
    embedding: np.ndarray,
    prompts: Mapping[str, np.ndarray],
    *,
    multimask_output: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [p, m, lh, lw] and predicted IoU [p, m] for the prompts of one embedded image."""
    sparse, dense = _embed_prompts(model, prompts)
    logits, iou = model.mask_decoder(
        image_embeddings=torch.from_numpy(embedding).permute(2, 0, 1)[None],
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask_output,
    )
    return logits.numpy(), iou.numpy()


def _embed_prompts(model: Any, prompts: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
    given = {key: torch.from_numpy(value) for key, value in prompts.items()}
    points = None
    if "point_coords" in given:
        points = (given["point_coords"], given["point_labels"])
    return model.prompt_encoder(points, given.get("boxes"), given.get("mask_inputs"))
