"""The masks of an image that lie in files of their own."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sam_jax import rle
from sam_jax.data.label_maps import LabelMap, LabelMapError
from sam_jax.data.samples import CorruptSampleError


class MaskFiles(NamedTuple):
    """The content of mask files, as the fields of `Sample` of these names have it.

    Attributes:
      masks_rle: a mask for each object.
      unusable_masks: the files that cannot be used, and why.
      remarks: what had to be decided about others.
    """

    masks_rle: list[dict[str, Any]]
    unusable_masks: list[str]
    remarks: list[tuple[str, str]]


def read_mask_files(files: Iterable[Path], read: Callable[[Path], LabelMap]) -> MaskFiles:
    """The masks of all objects in some files, in their order.

    Args:
      files: of one image.
      read: the labels of a file; may raise LabelMapError or OSError, which costs that file.
    """
    found = MaskFiles([], [], [])
    for file in files:
        try:
            labels, decided = read(file)
        except (LabelMapError, OSError) as error:
            found.unusable_masks.append(f"{file}: {error}")
            continue
        found.masks_rle.extend(rle.from_labels(labels))
        found.remarks.extend((remark, str(file)) for remark in decided)
    return found


def count_masks(files: Iterable[Path], read: Callable[[Path], LabelMap], image: Path) -> int:
    """The number of masks that ``read_mask_files`` finds.

    Args:
      files: of one image.
      read: as there.
      image: whose files they are.

    Raises:
      CorruptSampleError: none of the files can be used.
    """
    counts, refused = [], []
    for file in files:
        try:
            # Labels have no gaps.
            counts.append(int(read(file).labels.max()))
        except (LabelMapError, OSError) as error:
            refused.append(f"{file}: {error}")
    if not counts:
        raise CorruptSampleError(str(image), "no valid mask", refused[0])
    return sum(counts)


def as_one_object(found: LabelMap) -> LabelMap:
    """All labels of a map as one."""
    return found._replace(labels=(found.labels != 0).astype(np.uint16))
