"""The image encoder against the device's fastest matrix product.

python -m benchmarks.encoder --variant vit_b --batch 1 [--backward] [--peer torch torch-compile]
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from benchmarks import limits, peer, report
from benchmarks.random_inputs import random_like
from benchmarks.timing import Timing, compile_for, time_compiled
from sam_jax import flop_counts
from sam_jax.model_config import ModelConfig
from sam_jax.models.layers import Remat
from sam_jax.models.sam import Sam, SamConfig
from sam_jax.models.variants import VARIANTS
from sam_jax.ops.attention import Implementation


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Times the encoder, forward or forward and backward, and reports it."""
    args = parse(argv)
    image_size = args.image_size and (args.image_size, args.image_size)
    config = ModelConfig(args.variant, image_size).sam

    def peer_call(name):
        return peer.encoder_call(
            name,
            config,
            args.batch,
            args.dtype,
            backward=args.backward,
            compile_mode=args.compile_mode,
        )

    peers = peer.time_peers(args.peer, peer_call, args.repeats)
    timing = _time(args, config)
    passes = flop_counts.TRAINING_FACTOR if args.backward else 1
    flops, useful = (
        passes * args.batch * flop_counts.encoder_flops(config.image_encoder, useful=only)
        for only in (False, True)
    )
    limit = limits.matmul_flops_per_second(args.dtype, jax.devices()[:1])
    rates = [
        report.Rate("FLOP/s", flops / timing.best, limit),
        report.Rate("FLOP/s without padding", useful / timing.best, limit),
        report.Rate("images/s", args.batch / timing.best),
    ]
    facts: dict[str, Any] = {"work_flops": flops, "useful_flops": useful}
    facts |= peer.compare(timing, peers)
    return report.publish("encoder", argv, args, timing, rates, facts=facts)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the benchmark."""
    parser = report.parser("encoder", __doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="vit_b")
    parser.add_argument("--image-size", type=int, help="side in pixels, by default the variant's")
    parser.add_argument("--batch", type=int, default=1, help="images (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attention", choices=get_args(Implementation), default="auto")
    parser.add_argument("--backward", action="store_true", help="gradients of the parameters too")
    parser.add_argument("--remat", choices=get_args(Remat), default="none")
    parser.add_argument("--scan", action="store_true", help="loops over equal blocks")
    peer.add_options(parser)
    return parser.parse_args(argv)


def _time(args: argparse.Namespace, config: SamConfig) -> Timing:
    model = Sam(config, args.remat, args.scan, args.attention, jnp.dtype(args.dtype))
    image_shapes = jax.ShapeDtypeStruct((args.batch, *model.image_size, 3), jnp.float32)
    images = random_like(image_shapes)
    init, encode = (functools.partial(f, method=Sam.encode) for f in (model.init, model.apply))
    variables = random_like(jax.eval_shape(init, jax.random.key(0), image_shapes))
    arguments = [variables, images]
    function: Any = encode
    if args.backward:
        embeddings = jax.eval_shape(encode, variables, images)
        arguments.append(random_like(embeddings))
        function = _gradients(encode)
    compiled, seconds = compile_for(jax.jit(function), *arguments)
    return time_compiled(
        compiled, lambda: compiled(*arguments), compile_seconds=seconds, repeats=args.repeats
    )


def _gradients(function: Any) -> Any:
    def gradients(variables, images, cotangents):
        return jax.vjp(lambda variables: function(variables, images), variables)[1](cotangents)

    return gradients


if __name__ == "__main__":
    main()
