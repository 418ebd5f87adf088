"""The few masks of an evaluation that are worth a picture, and the picture."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sam_jax import rle
from sam_jax.arrays import UInt8
from sam_jax.data.pipeline import EvalExample
from sam_jax.errors import ConfigError
from sam_jax.evaluation.clicks import keyed_number
from sam_jax.evaluation.evaluation import Record
from sam_jax.evaluation.targets import mask_key, tight_box
from sam_jax.image_channels import rgb_view
from sam_jax.visualize import Example, example_sheet

# The typical masks are those nearest to the median among so many drawn at random.
_NUM_CANDIDATES = 16


@dataclasses.dataclass(frozen=True)
class Scored:
    """A mask and its IoU.

    Attributes:
      iou: by which it is chosen.
      key: names the mask, for ties and draws.
      example: number of its image's example.
      record: what is known of it.
    """

    iou: float
    key: str
    example: int
    record: Mapping[str, Any]


def sheet(
    records: Sequence[Record], measure: str, num_each: int, read: Callable[[int], EvalExample]
) -> UInt8[np.ndarray, "_ _ 3"]:
    """The worst, most typical and best masks with prompt, prediction and ground truth.

    Args:
      records: of images that were prompted for masks.
      measure: whose IoU ranks the masks.
      num_each: how many of each sort.
      read: reads an example by its number, once more.

    Raises:
      ConfigError: an image does not have its mask any more.
    """
    scored = [
        Scored(
            mask["ious"][measure],
            mask_key(record["dataset"], record["image"], mask["mask"]),
            number,
            mask,
        )
        for number, record in enumerate(records)
        for mask in record.get("masks", ())
    ]
    examples = [
        _drawn(
            mask.record,
            read(mask.example),
            f"{sort}\nIoU {mask.iou:.1%}\n{records[mask.example]['dataset']}",
        )
        for sort, chosen in choose(scored, num_each).items()
        for mask in chosen
    ]
    median = statistics.median(mask.iou for mask in scored)
    title = f"{measure}: IoU of {len(scored):,} masks, median {median:.1%}"
    return example_sheet(examples, title=title)


def choose(scored: Sequence[Scored], num_each: int) -> dict[str, list[Scored]]:
    """The worst, the most typical and the best masks, no image twice in a sort.

    Ties are broken by the masks' names, so the choice does not depend on the order.

    Args:
      scored: masks; may be none.
      num_each: how many of each sort.
    """
    if not scored:
        return {}
    median = statistics.median(mask.iou for mask in scored)
    drawn = _first_of_each_image(
        sorted(scored, key=lambda mask: (keyed_number(mask.key), mask.key)), _NUM_CANDIDATES
    )
    best = sorted(scored, key=lambda mask: (-mask.iou, mask.key))
    return {
        "worst": _first_of_each_image(sorted(scored, key=lambda m: (m.iou, m.key)), num_each),
        "typical": sorted(drawn, key=lambda mask: abs(mask.iou - median))[:num_each],
        "best": _first_of_each_image(best, num_each)[::-1],
    }


def _first_of_each_image(ranked: Iterable[Scored], number: int) -> list[Scored]:
    chosen: dict[int, Scored] = {}
    for mask in ranked:
        if len(chosen) == number:
            break
        chosen.setdefault(mask.example, mask)
    return list(chosen.values())


def _drawn(mask: Mapping[str, Any], example: EvalExample, caption: str) -> Example:
    """The example that a mask's record and its image make.

    Raises:
      ConfigError: the image has no such mask any more.
    """
    found = len(example.mask_runs)
    if mask["mask"] >= found:
        raise ConfigError(
            f"{example.name} has {found} masks now; expected a mask {mask['mask']} (from 0), which "
            "was scored: its annotations changed since; evaluate into another folder"
        )
    (ground_truth,) = example.decode_masks([mask["mask"]])
    size = (ground_truth.shape[0], ground_truth.shape[1])
    clicks = np.array(mask["clicks"], int).reshape(-1, 3)
    return Example(
        image=rgb_view(example.image),
        ground_truth=ground_truth,
        prediction=rle.decode(rle.run_lengths({"size": size, "counts": mask["counts"]}), size),
        caption=caption,
        point_coords=clicks[:, :2],
        point_labels=clicks[:, 2],
        box_xyxy=None if len(clicks) else tight_box(ground_truth),
    )
