"""Encoder, prompts and automatic masks beside the published code: same weights, same images.

python -m benchmarks.masks [--variant vit_b | --checkpoint RUN] [--images FOLDER ...]

Both run in one process, in turns, and every time is the best of its calls. Without a checkpoint
the weights are fresh, and the thresholds of the automatic masks are such that about ``--pass-rate``
of the candidates pass the first, and half of those the second. It needs the packages of
``requirements-torch.lock``.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import published, report
from benchmarks.pictures import pictures_in
from sam_jax.data.sources.synthetic import SyntheticSource
from sam_jax.inference.automatic import SA1B_OPTIONS, AutomaticOptions, generate_masks
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.inference.prompts import Prompt
from sam_jax.model_config import ModelConfig, build_model
from sam_jax.models.sam import init_variables
from sam_jax.models.variants import VARIANTS
from sam_jax.weights.load import load

# Beyond this, two scores or boxes are not the same.
SCORE_TOLERANCE = 1e-3
SAME_MASK_IOU = 0.99


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: seconds of both sides, and what is the same."""

    name: str
    seconds: float
    peer_seconds: float
    agreement: str = ""
    differing: Sequence[str] = ()

    @property
    def speedup(self) -> float:
        """Factor by which we are faster than the peer."""
        return self.peer_seconds / self.seconds


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs everything on both sides and prints one table."""
    args = _parse(argv)
    model, variables = _weights(args)
    images = _images(args)
    predictor = Predictor(model, variables, Buckets((1,), (1,), (1, 64), (1,)))
    peer = _Peer(model.config, variables, args.dtype)
    options = _options(args, predictor, images[0])
    rows = [_encoder_row(predictor, peer, images[0], args.repeats)]
    rows += [_prompt_row(predictor, peer, images[0], n, args.repeats) for n in (1, 64)]
    searches = {"automatic masks": options}
    if args.crops:
        searches["the same with crops"] = dataclasses.replace(
            options,
            points_per_side=options.points_per_side // 2,
            crop_n_layers=1,
            crop_n_points_downscale_factor=2,
        )
    if args.clean_up:
        searches["the same with clean-up"] = dataclasses.replace(
            options, min_mask_region_area=SA1B_OPTIONS.min_mask_region_area
        )
    if args.sa1b:
        # The published generator has not all that they ask for.
        known = published.generator_arguments(SA1B_OPTIONS)
        searches["SA-1B's options"] = dataclasses.replace(AutomaticOptions(), **known)
    rows += [_automatic_row(name, predictor, peer, images, each) for name, each in searches.items()]
    _publish(args, rows, options, len(images))
    return rows


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("masks", __doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="vit_b")
    parser.add_argument("--checkpoint", help="weights of any form, in place of fresh ones")
    parser.add_argument(
        "--images", type=Path, nargs="+", help="folders, by default made-up pictures"
    )
    parser.add_argument("--num-images", type=int, default=1, help="for automatic masks")
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--crops", action="store_true", help="search one layer of crops as well")
    parser.add_argument("--clean-up", action="store_true", help="remove small regions as well")
    parser.add_argument("--sa1b", action="store_true", help="search with SA-1B's options as well")
    parser.add_argument("--pass-rate", type=float, default=0.4, help="see above (%(default)s)")
    parser.add_argument("--pred-iou-thresh", type=float, help="in place of --pass-rate")
    parser.add_argument("--stability-score-thresh", type=float, help="in place of --pass-rate")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args(argv)


def _weights(args: argparse.Namespace) -> Any:
    if args.checkpoint:
        model, variables = load(args.checkpoint)
        return model.clone(dtype=jnp.dtype(args.dtype)), variables
    model = build_model(ModelConfig(args.variant, dtype=args.dtype))
    return model, init_variables(model, jax.random.key(0))


def _images(args: argparse.Namespace) -> list[np.ndarray]:
    if not args.images:
        source = SyntheticSource(args.num_images, image_size=(768, 1024), seed=0)
        return [np.asarray(source[index].image) for index in range(args.num_images)]
    return pictures_in(args.images, args.num_images)


def _options(args: argparse.Namespace, predictor: Predictor, image: np.ndarray) -> AutomaticOptions:
    options = AutomaticOptions(points_per_side=args.points_per_side)
    if args.pred_iou_thresh is not None or args.stability_score_thresh is not None:
        return dataclasses.replace(
            options,
            pred_iou_thresh=args.pred_iou_thresh or 0.0,
            stability_score_thresh=args.stability_score_thresh or 0.0,
        )
    if args.checkpoint:
        return options
    everything = predictor.predict_points(
        predictor.embed([image]),
        [np.random.default_rng(0).uniform(0, min(image.shape[:2]) - 1, (16, 2))],
        points_per_batch=16,
        iou_threshold=-np.inf,
    )
    (found,) = everything
    offset = 0.1 * float(found.low_res_logits.std())
    inner, outer = ((found.low_res_logits > side * offset).sum(axis=(-2, -1)) for side in (1, -1))
    return dataclasses.replace(
        options,
        # Of all candidates, since none was below minus infinity.
        pred_iou_thresh=float(np.quantile(found.iou_predictions, 1 - args.pass_rate)),
        stability_score_offset=offset,
        stability_score_thresh=float(np.median(inner / np.maximum(outer, 1))),
    )


class _Peer:
    """The published model with our weights."""

    def __init__(self, config: Any, variables: Any, dtype: str):
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self.dtype = dtype
        self.model = published.with_weights(config, variables, self.device)
        self.predictor = published.segment_anything().SamPredictor(self.model)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Products in the chosen type; what was begun is done at the end."""
        import torch

        enabled = self.dtype != "float32"
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=enabled):
            yield
        if self.device == "cuda":
            torch.cuda.synchronize()


def _in_turns(
    ours: Callable[[], Any], theirs: Callable[[], Any], peer: _Peer, repeats: int
) -> tuple[float, float]:
    """Best seconds of either, after one call that warms up."""
    best = [float("inf")] * 2
    for round_ in range(repeats + 1):
        for side, call in enumerate((ours, theirs)):
            with peer.running() if side else contextlib.nullcontext():
                start = time.perf_counter()
                jax.block_until_ready(call())
            if round_:
                best[side] = min(best[side], time.perf_counter() - start)
    return best[0], best[1]


def _encoder_row(predictor: Predictor, peer: _Peer, image: np.ndarray, repeats: int) -> Row:
    """Row of times from the picture to its embedding, resizing included."""
    ours, theirs = _in_turns(
        lambda: predictor.embed([image]).features,
        lambda: peer.predictor.set_image(image),
        peer,
        repeats,
    )
    return Row("image embedding", ours, theirs)


def _prompt_row(
    predictor: Predictor, peer: _Peer, image: np.ndarray, num_prompts: int, repeats: int
) -> Row:
    """Row of times from clicks to three masks of the image's size each."""
    import torch

    points = np.random.default_rng(0).uniform(0, min(image.shape[:2]) - 1, (num_prompts, 2))
    embeddings = predictor.embed([image])
    prompts = [Prompt(points=[point]) for point in points]
    with peer.running():
        peer.predictor.set_image(image)
    scaled = peer.predictor.transform.apply_coords(points, image.shape[:2])
    coords = torch.as_tensor(scaled[:, None], dtype=torch.float32, device=peer.device)
    labels = torch.ones(num_prompts, 1, dtype=torch.int64, device=peer.device)

    def ours() -> Any:
        return predictor.predict(embeddings, [prompts])[0].masks()

    def theirs() -> Any:
        return peer.predictor.predict_torch(coords, labels)[0].cpu()

    seconds = _in_turns(ours, theirs, peer, 5 * repeats if num_prompts == 1 else repeats)
    return Row(f"{num_prompts} click{'s' * (num_prompts > 1)} to masks", *seconds)


def _automatic_row(
    name: str,
    predictor: Predictor,
    peer: _Peer,
    images: Sequence[np.ndarray],
    options: AutomaticOptions,
) -> Row:
    """Row of times from pictures to records, in seconds per picture."""
    generator = published.segment_anything().SamAutomaticMaskGenerator(
        peer.model, **published.generator_arguments(options)
    )
    small = dataclasses.replace(options, points_per_side=2, crop_n_layers=0)
    generate_masks(predictor, images[0], small)
    seconds = [0.0, 0.0]
    total = matched = extra = 0
    differing: list[str] = []
    for number, image in enumerate(images):
        start = time.perf_counter()
        found = generate_masks(predictor, image, options)
        seconds[0] += time.perf_counter() - start
        start = time.perf_counter()
        with peer.running():
            expected = generator.generate(image)
        seconds[1] += time.perf_counter() - start
        missing, additional = _differences(found, expected)
        total, matched = total + len(expected), matched + len(expected) - len(missing)
        extra += len(additional)
        differing += [
            f"image {number}, {side}: {_closeness(record, [*found, *expected], options)}"
            for side, records in (("theirs only", missing), ("ours only", additional))
            for record in records
        ]
    return Row(
        name,
        seconds[0] / len(images),
        seconds[1] / len(images),
        f"{matched} of {total}, {extra} more",
        differing,
    )


def _differences(
    found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of theirs without one of ours, and the other way round."""
    left = list(found)
    missing = []
    for reference in expected:
        twin = next((record for record in left if _same(record, reference)), None)
        if twin is None:
            missing.append(reference)
        else:
            # By identity: records hold arrays, which do not compare as a whole.
            left = [record for record in left if record is not twin]
    return missing, left


def _same(record: dict[str, Any], reference: dict[str, Any]) -> bool:
    for field in ("predicted_iou", "stability_score"):
        if abs(record[field] - reference[field]) > SCORE_TOLERANCE:
            return False
    if not np.allclose(record["point_coords"], reference["point_coords"]):
        return False
    one, other = record["segmentation"], reference["segmentation"]
    return np.sum(one & other) >= SAME_MASK_IOU * np.sum(one | other)


def _closeness(
    record: dict[str, Any], others: Sequence[dict[str, Any]], options: AutomaticOptions
) -> str:
    """Distances of a record from the thresholds that decide about it, as text."""
    boxes = np.array([_xyxy(other["bbox"]) for other in others if other is not record])
    overlaps = [_box_iou(_xyxy(record["bbox"]), box) for box in boxes]
    nearest = min((abs(iou - options.box_nms_thresh) for iou in overlaps), default=np.inf)
    return (
        f"area {record['area']}, predicted IoU {record['predicted_iou']:.6f}, "
        f"{record['predicted_iou'] - options.pred_iou_thresh:+.1e} of its threshold; stability "
        f"{record['stability_score'] - options.stability_score_thresh:+.1e} of its; the box IoU "
        f"nearest to that of suppression is {nearest:.1e} from it"
    )


def _xyxy(xywh: Sequence[float]) -> np.ndarray:
    x, y, width, height = xywh
    return np.array([x, y, x + width, y + height])


def _box_iou(one: np.ndarray, other: np.ndarray) -> float:
    sides = np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None)
    overlap = sides.prod()
    union = (one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - overlap
    return float(overlap / union) if union else 0.0


def _publish(
    args: argparse.Namespace, rows: Sequence[Row], options: AutomaticOptions, num_images: int
) -> None:
    weights = args.checkpoint or f"fresh {args.variant}"
    table = Table(title=f"{weights}, {args.dtype}, {jax.devices()[0].device_kind}")
    for heading in ("", "sam_jax", "segment_anything", "faster", "same records"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.seconds:.3g} s",
            f"{row.peer_seconds:.3g} s",
            f"{row.speedup:.2f} x",
            row.agreement,
        )
    console = Console()
    console.print(table)
    for line in itertools.chain.from_iterable(row.differing for row in rows):
        console.print(line)
    if args.out:
        record = {
            "rows": [{**dataclasses.asdict(row), "speedup": row.speedup} for row in rows],
            "options": dataclasses.asdict(options),
            "num_images": num_images,
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
