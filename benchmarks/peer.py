"""The published PyTorch code at the same shapes and on the same device, as it is and made fast.

Its weights are made up; the time does not depend on them. It needs the packages of
``requirements-torch.lock``.
"""

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks import published
from benchmarks.timing import Timing, time_calls
from sam_jax.models.sam import SamConfig

# Eager as published; with segment-anything-fast's ideas (see ``fast``), eager; and compiled.
EAGER, SDPA, COMPILED = PEERS = ("torch", "torch-sdpa", "torch-compile")
# Of float32 results to the largest published one; convolutions of GPUs may round to 10 bits.
_TOLERANCE = 1e-3

Call = Callable[[], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of benchmarks that have peers."""
    parser.add_argument(
        "--peer",
        choices=PEERS,
        nargs="+",
        default=(),
        help="time the published code as well: as it is, with fused attention, compiled",
    )
    parser.add_argument(
        "--compile-mode",
        help="of torch.compile; by default max-autotune on a GPU and default on a CPU",
    )


def time_peers(
    names: Sequence[str], make: Callable[[str], Call], repeats: int
) -> dict[str, dict[str, Any]]:
    """Each peer's times by its name, or the reason for none where memory does not suffice.

    To be called before JAX takes memory: PyTorch gives it back, and JAX does not.

    Args:
      names: of ``PEERS``.
      make: the call to time of a peer.
      repeats: timed calls of each.
    """
    return dict(_time_peer(name, make, repeats) for name in names)


def compare(ours: Timing, peers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Facts of a record: the peers' times, and how many times faster we are, best against best."""
    for times in peers.values():
        if "best_seconds" in times:
            times["speedup"] = times["best_seconds"] / ours.best
    return {"peers": peers} if peers else {}


def _time_peer(name: str, make: Callable[[str], Call], repeats: int) -> tuple[str, dict[str, Any]]:
    import torch

    on_gpu = _device() == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        name, call, first = _started(name, make)
        seconds = time_calls(call, repeats)
        return name, {
            "first_call_seconds": first,
            "seconds": seconds,
            "best_seconds": min(seconds),
            "median_seconds": statistics.median(seconds),
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        }
    except torch.OutOfMemoryError:
        return name, {"failed": "out of memory"}
    finally:
        call = None
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _started(name: str, make: Callable[[str], Call]) -> tuple[str, Call, float]:
    """A peer that was called once, by its name, and the seconds that the first call took."""
    from torch._dynamo.exc import TorchDynamoException

    call = make(name)
    start = time.perf_counter()
    try:
        call()
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        print(f"torch.compile does not work here ({reason}): timing {SDPA}", file=sys.stderr)
        return _started(SDPA, make)
    return name, call, time.perf_counter() - start


def encoder_call(
    peer: str,
    config: SamConfig,
    batch: int,
    dtype: str,
    *,
    backward: bool,
    compile_mode: str | None = None,
) -> Call:
    """A call that encodes a batch of square images, and waits for it.

    As published, parameters are float32 as ours are, and products of the type. Made fast, they are
    of the type too where no gradients are wanted.

    Raises:
      RuntimeError: if what was made fast has other results than the published code.
    """
    import torch

    device = _device()
    model, shape = _build(config, device), config.image_encoder
    encoder = model.image_encoder
    images = torch.randn(batch, 3, *shape.image_size, device=device)
    cotangents = torch.randn(batch, shape.output_dim, *shape.grid, device=device)
    cast_to = dtype
    if peer != EAGER:
        _speed_up(model, lambda: encoder(images[:1]))
        if not backward:
            encoder, images = (x.to(getattr(torch, dtype)) for x in (encoder, images))
            cast_to = "float32"
    run = _compiled(encoder, device, compile_mode) if peer == COMPILED else encoder

    def call():
        _begin(device)
        encoder.zero_grad()
        with torch.set_grad_enabled(backward), _autocast(device, cast_to):
            embeddings = run(images)
        if backward:
            embeddings.backward(cotangents.to(embeddings.dtype))
        _wait(device)

    return call


def decoder_call(
    peer: str,
    config: SamConfig,
    batch: int,
    num_prompts: int,
    num_points: int,
    dtype: str,
    *,
    with_mask: bool,
    compile_mode: str | None = None,
) -> Call:
    """A call that decodes the prompts of each image, and waits for it.

    As published, one image after the other, as that code takes them; made fast, all at once.

    Raises:
      RuntimeError: if what was made fast has other results than the published code.
    """
    import torch

    from benchmarks import fast

    device, size = _device(), config.image_encoder.image_size
    model = _build(config, device)
    dim, grid = config.image_encoder.output_dim, config.image_encoder.grid
    embeddings = torch.randn(batch, dim, *grid, device=device)
    coords = torch.rand(batch, num_prompts, num_points, 2, device=device) * size[0]
    labels = torch.ones(batch, num_prompts, num_points, dtype=torch.int64, device=device)
    masks = None
    if with_mask:
        masks = torch.randn(batch, num_prompts, 1, 4 * grid[0], 4 * grid[1], device=device)

    def arguments(images):
        points = (coords[images].flatten(0, 1), labels[images].flatten(0, 1))
        return embeddings[images], points, None if masks is None else masks[images].flatten(0, 1)

    def decode(embeddings, points, masks):
        return fast.decode_images(model, embeddings, points, masks, multimask_output=not with_mask)

    in_turn = [arguments(slice(i, i + 1)) for i in range(batch)]
    groups = in_turn if peer == EAGER else [arguments(slice(batch))]
    if peer != EAGER:
        _speed_up(model, lambda: decode(*in_turn[0])[0])
    run = _compiled(decode, device, compile_mode) if peer == COMPILED else decode

    def call():
        _begin(device)
        with torch.no_grad(), _autocast(device, dtype):
            for group in groups:
                run(*group)
        _wait(device)

    return call


def _build(config: SamConfig, device: str) -> Any:
    """The published model, whose constructors would leave relative positions without effect."""
    import torch

    model = published.build(config).to(device)
    for name, table in model.image_encoder.named_parameters():
        if name.endswith(("rel_pos_h", "rel_pos_w", "attention_biases")):
            torch.nn.init.normal_(table, std=0.1)
    # Not before: that is when TinyViT takes its attention's biases from their tables.
    return model.eval()


def _speed_up(model: Any, run: Callable[[], Any]) -> None:
    """Makes a published model fast, and sees to it that its results stay what they are."""
    import torch

    from benchmarks import fast

    with torch.no_grad():
        expected = run()
        fast.speed_up(model)
        error = float((run() - expected).abs().max() / expected.abs().max())
    if not error <= _TOLERANCE:
        raise RuntimeError(f"the fast peer is not the published model: it is off by {error:.1e}")


def _compiled(function: Any, device: str, mode: str | None) -> Any:
    import torch

    mode = mode or ("max-autotune" if device == "cuda" else "default")
    return torch.compile(function, mode=mode, dynamic=False)


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


def _begin(device: str) -> None:
    """Results of the call before may be overwritten."""
    import torch

    if device == "cuda":
        torch.compiler.cudagraph_mark_step_begin()


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
