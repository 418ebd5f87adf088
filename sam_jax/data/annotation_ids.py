"""The ids of a COCO file's annotations, by the numbers that masks have once they are read."""

import json
from pathlib import Path

from sam_jax import rle
from sam_jax.data.mask_stores import most_common_size
from sam_jax.data.sources.coco_file import read_coco
from sam_jax.data.sources.listed_images import ListedImage, segmentation_to_rle


def mask_numbers(path: Path, *, keep_crowds: bool = False) -> dict[str, dict[str, int]]:
    """Numbers of the usable masks of each image, by file name and annotation id.

    A mask's number is its place among those of its image that evaluation uses: annotations that
    are unusable, empty or of another size than the image have none, nor have those without an id.

    Args:
      path: the JSON.
      keep_crowds: whether annotations with iscrowd are objects, as in evaluation.

    Raises:
      ConfigError: it is not in COCO form.
      OSError: it cannot be read.
    """
    images, _ = read_coco(path, keep_crowds)
    annotations = json.loads(path.read_bytes())["annotations"]
    own_ids = {f"annotations[{n}]": one.get("id") for n, one in enumerate(annotations)}
    found = {}
    for image in images:
        ids = [own_ids[where] for where in _usable(image)]
        numbers = {str(own_id): place for place, own_id in enumerate(ids) if own_id is not None}
        found[image.file_name] = numbers
    return found


def _usable(image: ListedImage) -> list[str]:
    """The annotations of an image, by their places in the file, that become masks."""
    read = []
    for where, segmentation in image.segmentations:
        try:
            mask, _ = segmentation_to_rle(segmentation, image.hw)
            read.append((where, mask, rle.run_lengths(mask)))
        except rle.BadRleError:
            continue
    hw = image.hw or most_common_size([mask for _, mask, _ in read])
    return [where for where, mask, runs in read if tuple(mask["size"]) == hw and runs[1::2].any()]
