"""Overlays, label maps and linked pictures, beside a folder's files of annotations."""

import dataclasses
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam_jax import rle
from sam_jax.arrays import Shaped, UInt8, UInt16
from sam_jax.errors import ConfigError
from sam_jax.image_channels import header_of, rgb_view
from sam_jax.images import ImageError, upright_copy
from sam_jax.inference.candidates import label_map
from sam_jax.resizing import resize_image
from sam_jax.visualize import overlay_masks, palette, save_picture
from sam_jax.weights.files import written_whole

ANNOTATIONS_FOLDER = "annotations"
OVERLAYS_FOLDER = "overlays"
LABELS_FOLDER = "labels"
# Overlays are pictures to look at: a larger image is shown at this size.
_OVERLAY_SIDE_PX = 1600
# Masks that are drawn at once.
_DRAWN_TOGETHER = 64
# Most masks that a 16-bit label map can tell apart.
_MAX_LABEL = 65_535


@dataclasses.dataclass(frozen=True)
class Extras:
    """Overlays, label maps and links, made of a picture's masks besides their annotation file.

    Attributes:
      target: the folder that all goes to.
      overlays, label_maps, links: what is asked for.
      in_channels: of the model.
    """

    target: Path
    overlays: bool
    label_maps: bool
    links: bool
    in_channels: int | None

    @property
    def wanted(self) -> list[str]:
        """Folders of what is asked for; that of annotations has the links."""
        asked = {
            OVERLAYS_FOLDER: self.overlays,
            LABELS_FOLDER: self.label_maps,
            ANNOTATIONS_FOLDER: self.links,
        }
        return [folder for folder, is_wanted in asked.items() if is_wanted]

    def missing(self, relative: Path) -> list[str]:
        """Folders of what a picture lacks."""
        return [
            folder
            for folder in self.wanted
            if not is_there(
                (self.target / folder / relative).with_suffix(
                    relative.suffix if folder == ANNOTATIONS_FOLDER else ".png"
                )
            )
        ]

    def put(
        self,
        folders: Collection[str],
        path: Path,
        relative: Path,
        annotation: Mapping[str, Any],
        pixels: Shaped[np.ndarray, "h w c"] | None,
    ) -> None:
        """Writes what goes to these folders; overlays alone take the picture's pixels."""
        records = annotation["annotations"]
        if OVERLAYS_FOLDER in folders and pixels is not None:
            picture = overlay_of(rgb_view(pixels), records)
            _save_picture(self.target / OVERLAYS_FOLDER / relative, picture)
        if LABELS_FOLDER in folders:
            hw = annotation["image"]["height"], annotation["image"]["width"]
            labels = _label_picture(path, records, hw)
            _save_picture(self.target / LABELS_FOLDER / relative, labels)
        if ANNOTATIONS_FOLDER in folders:
            _put_beside(path, self.target / ANNOTATIONS_FOLDER / relative, self.in_channels)


def overlay_of(
    pixels: UInt8[np.ndarray, "h w 3"], records: Sequence[Mapping[str, Any]]
) -> UInt8[np.ndarray, "oh ow 3"]:
    """The picture under its masks, reduced if it is large."""
    height, width = pixels.shape[:2]
    scale = min(1.0, _OVERLAY_SIDE_PX / max(height, width))
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    picture = pixels if scale == 1.0 else resize_image(pixels, size)
    colors = palette(len(records))
    # Some at a time, which would be gigabytes for all masks of a large picture; the largest first.
    order = sorted(range(len(records)), key=lambda index: -records[index]["area"])
    for start in range(0, len(order), _DRAWN_TOGETHER):
        part = order[start : start + _DRAWN_TOGETHER]
        masks = [
            rle.resample(rle.run_lengths(records[index]["segmentation"]), (height, width), size)
            for index in part
        ]
        picture = overlay_masks(picture, np.stack(masks), [colors[index] for index in part])
    return picture


def is_there(file: Path) -> bool:
    """True if there is such a file."""
    try:
        return file.is_file()
    except OSError:
        return False  # a name that cannot be


def _save_picture(path: Path, picture: np.ndarray) -> None:
    with written_whole(path.with_suffix(".png")) as unfinished:
        save_picture(unfinished, picture)


def _label_picture(
    path: Path, records: Sequence[Mapping[str, Any]], hw: tuple[int, int]
) -> UInt16[np.ndarray, "h w"]:
    if len(records) > _MAX_LABEL:
        raise ConfigError(f"{path} has {len(records)} masks: too many for 16 bits")
    return label_map(records, hw).astype(np.uint16)


def _put_beside(path: Path, beside: Path, in_channels: int | None) -> None:
    """Links a picture, or copies it upright if it is stored turned: its masks are upright."""
    if beside.exists() and not beside.is_symlink():
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be read any more: {error.strerror or error}") from None
    if header_of(content, str(path), in_channels).orientation != 1:
        if in_channels is not None:
            raise ImageError(
                f"{path} is stored turned, and its channels would be lost in an upright copy: save "
                "it upright, or leave link_pictures out"
            )
        with written_whole(beside) as unfinished:
            unfinished.write_bytes(upright_copy(content, str(path)))
        return
    beside.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first, since another process may do the same; a short one, as the picture's
    # may be as long as names can be.
    link = beside.with_name(f".{uuid.uuid4().hex[:8]}.link")
    link.symlink_to(path.resolve())
    link.replace(beside)
