"""The published PyTorch code at the same shapes, eager, on the same device.

Its weights are what its constructors make of them; the time does not depend on them. It needs the
packages of ``requirements-torch.lock``.
"""

import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import published
from benchmarks.timing import Timing, time_calls
from sam_jax.models.image_encoder import ImageEncoderConfig
from sam_jax.models.sam import SamConfig


def compare(ours: Timing, call: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """The peer's times, and how many times faster we are, best against best."""
    seconds = time_calls(call, repeats)
    return {
        "peer": "segment_anything, PyTorch eager",
        "peer_seconds": seconds,
        "peer_best_seconds": min(seconds),
        "peer_median_seconds": statistics.median(seconds),
        "speedup_over_peer": min(seconds) / ours.best,
    }


def encoder_call(
    config: ImageEncoderConfig, batch: int, dtype: str, *, backward: bool
) -> Callable[[], None]:
    """A call that encodes a batch of square images, and waits for it."""
    import torch

    device = _device()
    model = published.build(SamConfig(config)).image_encoder.to(device)
    images = torch.randn(batch, 3, *config.image_size, device=device)
    cotangents = torch.randn(batch, config.output_dim, *config.grid, device=device)

    def call():
        with torch.set_grad_enabled(backward), _autocast(device, dtype):
            embeddings = model(images)
        if backward:
            model.zero_grad()
            embeddings.backward(cotangents.to(embeddings.dtype))
        _wait(device)

    return call


def decoder_call(
    config: SamConfig, batch: int, num_prompts: int, num_points: int, dtype: str, with_mask: bool
) -> Callable[[], None]:
    """A call that decodes the prompts of each image in turn, as the published code takes them."""
    import torch

    device, size = _device(), config.image_encoder.image_size
    model = published.build(config).to(device).eval()
    prompt_encoder, mask_decoder = model.prompt_encoder, model.mask_decoder
    dim, grid = config.image_encoder.output_dim, config.image_encoder.grid
    embedding = torch.randn(1, dim, *grid, device=device)
    coords = torch.rand(num_prompts, num_points, 2, device=device) * size[0]
    labels = torch.ones(num_prompts, num_points, dtype=torch.int64, device=device)
    masks = None
    if with_mask:
        masks = torch.randn(num_prompts, 1, 4 * grid[0], 4 * grid[1], device=device)

    @torch.no_grad()
    def call():
        for _ in range(batch):
            with _autocast(device, dtype):
                sparse, dense = prompt_encoder((coords, labels), None, masks)
                mask_decoder(
                    image_embeddings=embedding,
                    image_pe=prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=not with_mask,
                )
        _wait(device)

    return call


def _device() -> str:
    """Torch's name of JAX's default device.

    Raises:
      RuntimeError: if torch has no build for it.
    """
    import torch

    platform = jax.default_backend()
    if platform == "gpu" and torch.cuda.is_available():
        return "cuda"
    if platform == "cpu":
        return "cpu"
    raise RuntimeError(f"this PyTorch cannot run on JAX's device, a {platform}: drop --peer")


def _autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    """Parameters stay float32, as ours do, and products are of the type."""
    import torch

    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=torch.bfloat16)


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
