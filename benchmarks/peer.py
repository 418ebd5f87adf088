"""The published PyTorch code at the same shapes, eager, on the same device.

Its weights are what its constructors make of them; the time does not depend on them. It needs the
packages of ``requirements-torch.lock``.
"""

import contextlib
import functools
import importlib
import importlib.util
import statistics
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

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
    model = _image_encoder(config).to(device)
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
    prompt_encoder, mask_decoder = (part.to(device).eval() for part in _decoder_parts(config))
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


def _image_encoder(config: ImageEncoderConfig) -> Any:
    import torch

    return _segment_anything().modeling.ImageEncoderViT(
        img_size=config.image_size[0],
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_rate,
        out_chans=config.output_dim,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        global_attn_indexes=tuple(config.global_attention_blocks),
        window_size=config.window_size,
    )


def _decoder_parts(config: SamConfig) -> tuple[Any, Any]:
    modeling = _segment_anything().modeling
    encoder, decoder = config.image_encoder, config.mask_decoder
    transformer = modeling.TwoWayTransformer(
        depth=decoder.depth,
        embedding_dim=encoder.output_dim,
        num_heads=decoder.num_heads,
        mlp_dim=decoder.mlp_dim,
    )
    return (
        modeling.PromptEncoder(
            embed_dim=encoder.output_dim,
            image_embedding_size=encoder.grid,
            input_image_size=encoder.image_size,
            mask_in_chans=config.mask_channels,
        ),
        modeling.MaskDecoder(
            transformer_dim=encoder.output_dim,
            transformer=transformer,
            iou_head_hidden_dim=decoder.iou_head_dim,
        ),
    )


def _segment_anything() -> ModuleType:
    """The package, which imports torchvision for parts that are not timed here."""
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("segment_anything")
    functional = ModuleType("torchvision.transforms.functional")
    boxes = ModuleType("torchvision.ops.boxes")
    functional.__dict__.update(resize=None, to_pil_image=None)
    boxes.__dict__.update(batched_nms=None, box_area=None)
    missing = {module.__name__: module for module in (functional, boxes)}
    for name in ("torchvision", "torchvision.ops", "torchvision.transforms"):
        missing[name] = ModuleType(name)
    sys.modules.update(missing)
    try:
        return importlib.import_module("segment_anything")
    finally:
        for name in missing:
            del sys.modules[name]


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
