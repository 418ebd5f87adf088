"""How far masks and scores move in bfloat16, in ONNX Runtime and in 8 bits: trained weights.

python -m benchmarks.precision --checkpoint FILE --images FOLDER ... [--num-images 5]

Every picture is prompted at a grid of points, with three candidates each, in float32 and then in
other ways; the table says what differs from float32, and how long each took in the same run. It
needs the packages of ``requirements-torch.lock``.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.pictures import pictures_in
from sam_jax.export.onnx import DECODER, ENCODER, export_onnx
from sam_jax.inference.images import ImageEmbeddings, model_input
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.inference.prompts import Prompt
from sam_jax.ops.images import RGB
from sam_jax.weights.load import load

# An embedding [1, gh, gw, d], and of 16 points three candidates' logits and scores each.
Encode = Callable[[np.ndarray], np.ndarray]
Decode = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
POINTS_PER_SIDE = 4


@dataclasses.dataclass
class Way:
    """One way to compute the model, and what it gave.

    Attributes:
      name: for the table.
      encode, decode: its two halves.
      features, scores: largest differences from float32; embeddings' over their largest magnitude.
      ious: IoU of every mask with that of float32, of those with a pixel in either.
      encode_seconds, decode_seconds: best of all pictures.
    """

    name: str
    encode: Encode
    decode: Decode
    features: float = 0.0
    scores: float = 0.0
    ious: list[float] = dataclasses.field(default_factory=list)
    encode_seconds: float = np.inf
    decode_seconds: float = np.inf


def main(argv: Sequence[str] | None = None) -> list[Way]:
    """Runs all ways on all pictures and prints one table."""
    args = _parse(argv)
    model, variables = load(args.checkpoint)
    images = pictures_in(args.images, args.num_images)
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(Path(folder) / "onnx", model.config, variables, int8=True)
        full, half = (
            _JaxWay(model.clone(dtype=dtype), variables) for dtype in (jnp.float32, jnp.bfloat16)
        )
        runtime, eighth = (
            _OnnxWay(Path(folder) / "onnx", kind, model.image_size) for kind in ("", ".int8")
        )
        ways = [
            Way("float32", full.encode, full.decode),
            Way("bfloat16 encoder", half.encode, full.decode),
            Way("bfloat16 decoder", full.encode, half.decode),
            Way("bfloat16", half.encode, half.decode),
            Way("ONNX Runtime", runtime.encode, runtime.decode),
            Way("ONNX Runtime, 8-bit encoder", eighth.encode, runtime.decode),
            Way("ONNX Runtime, 8-bit decoder", runtime.encode, eighth.decode),
            Way("ONNX Runtime, 8-bit", eighth.encode, eighth.decode),
        ]
        for image in images:
            _compare(ways, image, model.image_size)
    _publish(args, ways, len(images))
    return ways


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("precision", __doc__)
    parser.add_argument("--checkpoint", required=True, help="trained weights of any form")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="folders")
    parser.add_argument("--num-images", type=int, default=5)
    return parser.parse_args(argv)


class _JaxWay:
    """The model in a type, its embeddings as float32."""

    def __init__(self, model: Any, variables: Any):
        buckets = Buckets((1,), (1,), (POINTS_PER_SIDE**2,), (1,))
        self._predictor = Predictor(model, variables, buckets)
        self._size_hw = model.image_size

    def encode(self, image: np.ndarray) -> np.ndarray:
        return np.asarray(self._predictor.embed([image]).features, np.float32)

    def decode(self, features: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Points are in pixels of the model's input: all of it counts as the picture.
        size = np.array([self._size_hw])
        embeddings = ImageEmbeddings(jnp.asarray(features), size, size, self._size_hw)
        prompts = [Prompt(points=[point]) for point in points]
        (answer,) = self._predictor.predict(embeddings, [prompts])
        return answer.low_res_logits, answer.iou_predictions


class _OnnxWay:
    """The exported files in ONNX Runtime, with as many threads as there are cores."""

    def __init__(self, folder: Path, kind: str, size_hw: tuple[int, int]):
        import onnxruntime

        self._size_hw = size_hw
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._encoder, self._decoder = (
            onnxruntime.InferenceSession(
                folder / name.replace(".onnx", f"{kind}.onnx"),
                options,
                providers=["CPUExecutionProvider"],
            )
            for name in (ENCODER, DECODER)
        )

    def encode(self, image: np.ndarray) -> np.ndarray:
        padded, (height, width) = model_input(image, self._size_hw)
        pixels = np.zeros(padded.shape, np.float32)
        mean, std = RGB.statistics
        pixels[:height, :width] = (padded[:height, :width] - mean) / std
        (found,) = self._encoder.run(None, {"images": pixels.transpose(2, 0, 1)[None]})
        return found.transpose(0, 2, 3, 1)

    def decode(self, features: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count, side = len(points), 4 * features.shape[1]
        inputs = {
            "image_embeddings": features.transpose(0, 3, 1, 2),
            # Pixels' centres, and the point that says that there is no box.
            "point_coords": np.stack([points, np.zeros_like(points)], axis=1),
            "point_labels": np.tile(np.array([[1, -1]], np.float32), (count, 1)),
            "mask_input": np.zeros((1, 1, side, side), np.float32),
            "has_mask_input": np.zeros(1, np.float32),
            "orig_im_size": np.array([side, side], np.float32),
        }
        _, scores, logits = self._decoder.run(None, inputs)
        # Without the candidate for several prompts.
        return logits[:, 1:], scores[:, 1:]


def _compare(ways: Sequence[Way], image: np.ndarray, size_hw: tuple[int, int]) -> None:
    """Adds a picture's differences to every way; the first is what the others are held against."""
    _, (height, width) = model_input(image, size_hw)
    steps = (np.arange(POINTS_PER_SIDE) + 0.5) / POINTS_PER_SIDE
    points = np.stack(np.meshgrid(width * steps, height * steps), axis=-1).reshape(-1, 2)
    points = points.astype(np.float32)
    reference: tuple[np.ndarray, ...] | None = None
    for way in ways:
        way.encode(image)
        start = time.perf_counter()
        features = way.encode(image)
        way.encode_seconds = min(way.encode_seconds, time.perf_counter() - start)
        way.decode(features, points)
        start = time.perf_counter()
        logits, scores = way.decode(features, points)
        way.decode_seconds = min(way.decode_seconds, time.perf_counter() - start)
        masks = logits > 0
        if reference is None:
            reference = features, scores, masks
        exact_features, exact_scores, exact_masks = reference
        error = np.abs(features - exact_features).max() / np.abs(exact_features).max()
        way.features = max(way.features, float(error))
        way.scores = max(way.scores, float(np.abs(scores - exact_scores).max()))
        union = np.sum(masks | exact_masks, axis=(-2, -1))
        overlap = np.sum(masks & exact_masks, axis=(-2, -1))
        way.ious += (overlap[union > 0] / union[union > 0]).tolist()


def _publish(args: argparse.Namespace, ways: Sequence[Way], num_images: int) -> None:
    table = Table(title=f"{args.checkpoint}, {num_images} pictures, {jax.devices()[0].device_kind}")
    for heading in (
        "",
        "embedding",
        "score",
        "mean IoU",
        "0.1 % of masks below",
        "IoU >= 0.99",
        "encode",
        "16 points",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    rows = []
    for way in ways:
        ious = np.array(way.ious)
        rows.append(
            {
                "name": way.name,
                "embedding_error": way.features,
                "score_error": way.scores,
                "mean_iou": float(ious.mean()),
                "iou_0.1_percent": float(np.quantile(ious, 0.001)),
                "iou_above_0.99": float(np.mean(ious >= 0.99)),
                "num_masks": len(ious),
                "encode_seconds": way.encode_seconds,
                "decode_seconds": way.decode_seconds,
            }
        )
        row: dict[str, Any] = rows[-1]
        table.add_row(
            way.name,
            f"{row['embedding_error']:.1e}",
            f"{row['score_error']:.1e}",
            f"{row['mean_iou']:.5f}",
            f"{row['iou_0.1_percent']:.4f}",
            f"{100 * row['iou_above_0.99']:.2f} %",
            f"{1000 * row['encode_seconds']:.0f} ms",
            f"{1000 * row['decode_seconds']:.0f} ms",
        )
    Console().print(table)
    if args.out:
        args.out.write_text(json.dumps({"rows": rows, "num_images": num_images}, indent=2) + "\n")


if __name__ == "__main__":
    main()
