"""Prompt encoder and mask decoder against the device's fastest matrix product.

python -m benchmarks.decoder --variant vit_b --prompts 64 [--with-mask] [--peer torch torch-compile]
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import limits, peer, report
from benchmarks.random_inputs import random_like, random_prompts
from benchmarks.timing import Timing, compile_for, time_compiled
from sam_jax import flop_counts
from sam_jax.model_config import ModelConfig, build_model
from sam_jax.models.sam import Sam, init_variables
from sam_jax.models.variants import VARIANTS


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Times the decoder and reports it.

    As in training, prompts without a mask ask for three candidates and prompts with one for one.
    """
    args = parse(argv)
    image_size = args.image_size and (args.image_size, args.image_size)
    model = build_model(ModelConfig(args.variant, image_size, dtype=args.dtype))

    def peer_call(name):
        return peer.decoder_call(
            name,
            model.config,
            args.batch,
            args.prompts,
            args.points,
            args.dtype,
            with_mask=args.with_mask,
            compile_mode=args.compile_mode,
        )

    peers = peer.time_peers(args.peer, peer_call, args.repeats)
    timing = _time(args, model)
    not_a_point = 1
    flops = args.batch * flop_counts.decoder_flops(
        model.config,
        args.prompts,
        args.points + not_a_point,
        multimask_output=not args.with_mask,
        with_mask=args.with_mask,
    )
    limit = limits.matmul_flops_per_second(args.dtype, jax.devices()[:1])
    rates = [
        report.Rate("FLOP/s", flops / timing.best, limit),
        report.Rate("prompts/s", args.batch * args.prompts / timing.best),
    ]
    facts: dict[str, Any] = {"work_flops": flops}
    facts |= peer.compare(timing, peers)
    return report.publish("decoder", argv, args, timing, rates, facts=facts)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the benchmark."""
    parser = report.parser("decoder", __doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="vit_b")
    parser.add_argument("--image-size", type=int, help="side in pixels, by default the variant's")
    parser.add_argument("--batch", type=int, default=1, help="images (%(default)s)")
    parser.add_argument("--prompts", type=int, default=64, help="objects per image (%(default)s)")
    parser.add_argument("--points", type=int, default=1, help="points per object (%(default)s)")
    parser.add_argument("--with-mask", action="store_true", help="objects bring a mask as well")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    peer.add_options(parser)
    return parser.parse_args(argv)


def _time(args: argparse.Namespace, model: Sam) -> Timing:
    encoder = model.config.image_encoder
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    variables = {
        "params": {
            part: random_like(shapes["params"][part]) for part in ("prompt_encoder", "mask_decoder")
        },
        "constants": random_like(shapes["constants"]),
    }
    embeddings = random_like(
        jax.ShapeDtypeStruct((args.batch, *encoder.grid, encoder.output_dim), jnp.float32)
    )
    prompts = random_prompts(
        args.batch,
        args.prompts,
        args.points,
        model.image_size,
        model.low_res_size if args.with_mask else None,
    )

    def decode(variables, embeddings, prompts):
        return model.apply(
            variables,
            embeddings,
            prompts,
            multimask_output=not args.with_mask,
            method=Sam.decode,
        )

    compiled, seconds = compile_for(jax.jit(decode), variables, embeddings, prompts)
    return time_compiled(
        compiled,
        lambda: compiled(variables, embeddings, prompts),
        compile_seconds=seconds,
        repeats=args.repeats,
    )


if __name__ == "__main__":
    main()
