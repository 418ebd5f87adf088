"""Mean IoU of a checkpoint beside the published code's under the same protocol, and baselines.

python -m benchmarks.quality --checkpoint FILE --data FOLDER [--max-images 8 --max-masks 8]

FOLDER holds one folder per data set, each with `val.json` and `images/`. Clicks, boxes and scores
are this package's on both sides; who answers the prompts differs. It needs the packages of
``requirements-torch.lock``.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import published, report
from configs.small_coco import sources
from sam_jax.evaluation.prompted import EvalConfig, PromptedMasks
from sam_jax.evaluation.run import Evaluator
from sam_jax.inference.images import model_input
from sam_jax.inference.predictor import Prediction
from sam_jax.inference.prompts import Prompt
from sam_jax.weights.load import load

CLICKS = (1, 3, 5)
BASELINES = ("box_grabcut", "box_ellipse", "box_filled", "disk")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluates both and prints one table."""
    args = _parse(argv)
    model, variables = load(args.checkpoint)
    config = EvalConfig(
        sources=sources(str(args.data), "val", "benchmarks.quality"),
        protocols=("center", "box"),
        num_clicks=CLICKS,
        baselines=BASELINES,
        max_images=args.max_images,
        max_masks_per_image=args.max_masks,
        images_per_call=1,
        prompts_per_call=args.max_masks or 16,
        num_examples=0,
    )
    devices = jax.local_devices()[:1]
    ours = Evaluator(model, PromptedMasks(config), devices=devices, show_progress=True)
    reports = {"sam_jax": ours(variables)}
    if not args.alone:
        peer = PublishedPredictor(model.config, variables)
        without = dataclasses.replace(config, baselines=())
        theirs = Evaluator(model, PromptedMasks(without), show_progress=True, predictor=peer)
        reports["published code"] = theirs(variables)
    _publish(args, reports)
    return reports


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("quality", __doc__)
    parser.add_argument("--checkpoint", required=True, help="trained weights of any form")
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets")
    parser.add_argument("--max-images", type=int, help="of each data set; by default all")
    parser.add_argument("--max-masks", type=int, help="of each image; by default all")
    parser.add_argument("--alone", action="store_true", help="without the published code")
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class _Embedded:
    """Images as the published code embedded them, one after the other."""

    features: Sequence[Any]
    original_hw: np.ndarray
    resized_hw: np.ndarray


class PublishedPredictor:
    """The published model behind the interface of ``Predictor`` that protocols use."""

    num_devices = 1

    def __init__(self, config: Any, variables: Mapping[str, Any]):
        self._model = published.with_weights(config, variables)
        self._predictor = published.segment_anything().SamPredictor(self._model)
        self._size_hw = config.image_encoder.image_size

    def with_variables(self, variables: Mapping[str, Any]) -> "PublishedPredictor":
        """Itself; its weights are those it was made with."""
        return self

    def embed(self, images: Sequence[np.ndarray]) -> _Embedded:
        """Embeddings of the images, resized as published."""
        features, resized = [], []
        for image in images:
            self._predictor.set_image(image)
            features.append(self._predictor.features)
            resized.append(model_input(image, self._size_hw)[1])
        sizes = np.array([image.shape[:2] for image in images])
        return _Embedded(features, sizes, np.array(resized))

    def predict(
        self, embeddings: _Embedded, prompts: Sequence[Sequence[Prompt]], *, multimask_output: bool
    ) -> list[Prediction]:
        """Answers of the published prompt encoder and mask decoder."""
        return [
            self._of_image(embeddings, image, of_image, multimask_output)
            for image, of_image in enumerate(prompts)
        ]

    def _of_image(
        self,
        embeddings: _Embedded,
        image: int,
        prompts: Sequence[Prompt],
        multimask_output: bool,
    ) -> Prediction:
        import torch

        original, resized = embeddings.original_hw[image], embeddings.resized_hw[image]
        scale = resized[::-1] / original[::-1]
        logits, scores = [], []
        for prompt in prompts:
            points = boxes = masks = None
            if len(prompt.points):
                coords = np.asarray(prompt.points, np.float64) * scale
                on_object = np.ones(len(coords)) if prompt.labels is None else prompt.labels
                points = _tensor(coords)[None], torch.as_tensor(np.asarray(on_object, int))[None]
            if prompt.box is not None:
                boxes = _tensor((np.reshape(prompt.box, (2, 2)) * scale).reshape(1, 4))
            if prompt.mask is not None:
                masks = _tensor(prompt.mask)[None, None]
            with torch.no_grad():
                sparse, dense = self._model.prompt_encoder(points, boxes, masks)
                low_res, iou = self._model.mask_decoder(
                    image_embeddings=embeddings.features[image],
                    image_pe=self._model.prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=multimask_output,
                )
            logits.append(low_res.numpy())
            scores.append(iou.numpy())
        m, side = 3 if multimask_output else 1, self._size_hw[0] // 4
        return Prediction(
            np.concatenate([np.zeros((0, m, side, side), np.float32), *logits]),
            np.concatenate([np.zeros((0, m), np.float32), *scores]),
            tuple(original.tolist()),
            tuple(resized.tolist()),
            self._size_hw,
        )


def _tensor(values: Any) -> Any:
    import torch

    return torch.as_tensor(np.asarray(values, np.float32))


# Columns of the table, by measure.
COLUMNS = {
    **{f"center_{n}": str(n) for n in CLICKS},
    "center_1_oracle": "best of 3",
    "box": "box",
    "box_grabcut": "GrabCut",
    "box_ellipse": "ellipse",
    "box_filled": "filled",
    "disk_center": "disk",
}


def _publish(args: argparse.Namespace, reports: Mapping[str, Any]) -> None:
    table = Table(title=f"Mean IoU (%) by clicks and from boxes, {args.checkpoint}")
    for heading in ("", "masks", *COLUMNS.values()):
        table.add_column(heading, justify="right" if heading else "left")
    for side, result in reports.items():
        table.add_section()
        table.add_row(side)
        rows = [(dataset.name, dataset.num_masks, dataset.miou) for dataset in result.datasets]
        rows.append(("mean", sum(number for _, number, _ in rows), result.mean))
        for name, number, miou in rows:
            cells = [f"{100 * miou[key]:.1f}" if key in miou else "" for key in COLUMNS]
            table.add_row(name, str(number), *cells)
    Console().print(table)
    if args.out:
        record = {
            side: {"mean": dict(r.mean), "datasets": [dataclasses.asdict(d) for d in r.datasets]}
            for side, r in reports.items()
        }
        args.out.write_text(json.dumps(record, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
