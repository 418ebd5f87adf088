"""The boxes of a detector's file, by the pictures of a folder."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sam_jax.errors import ConfigError
from sam_jax.files import NamedFiles
from sam_jax.image_channels import header_of
from sam_jax.images import ImageError
from sam_jax.inference.detections import (
    Detection,
    Detections,
    Name,
    check_boxes,
    read_detections,
)


@dataclasses.dataclass(frozen=True)
class PictureBoxes:
    """Boxes by picture.

    Attributes:
      path: the detector's file.
      digest: a short name of its contents.
      min_score: boxes of a lower score were left out; None if all were taken.
      by_picture: boxes of the pictures that have any, in the order of the file.
      categories: COCO's categories by a box's label, or by its category_id if it has no label.
      missing: a line for each image of the file that is none of the pictures.
      remarks: lines about boxes that were left out or cut.
    """

    path: Path
    digest: str
    min_score: float | None
    by_picture: Mapping[Path, Sequence[Detection]]
    categories: Mapping[Name, Mapping[str, Any]]
    missing: Sequence[str]
    remarks: Sequence[str]


def boxes_of_pictures(
    path: Path,
    pictures: Sequence[Path],
    root: Path,
    min_score: float | None = None,
    in_channels: int | None = None,
) -> PictureBoxes:
    """Reads a detector's file, and finds the picture of each box.

    A ``file_name`` is found below ``root`` as ``NamedFiles`` finds it. An ``image_id`` is a
    picture's name, or its name without ending, or the number that this is.

    Args:
      path: see ``read_detections``.
      pictures: below ``root``.
      root: a folder.
      min_score: boxes of a lower score are left out; None takes all.
      in_channels: of the pictures; None for 8-bit RGB.

    Raises:
      ConfigError: the file or one of its boxes is refused, a name may mean several pictures, two
        names mean the same one, or no box is of any of the pictures.
    """
    every = read_detections(path)
    detections = every if min_score is None else every.above(min_score)
    remarks = []
    if num_below := len(every) - len(detections):
        remarks.append(
            f"{path}: {num_below} of {len(every)} boxes have a score below {min_score:g}"
        )
    found = _found(detections, pictures, root)
    missing = {name: len(boxes) for name, boxes in detections.by_image.items() if name not in found}
    if missing and not found:
        name = next(iter(missing))
        raise ConfigError(
            f"{path}: none of its {len(missing)} images is among the {len(pictures)} pictures of "
            f"{root}: its first one has the {detections.names} {name!r}, the first picture is "
            f"{pictures[0].relative_to(root).as_posix()!r}; write file_names as they are below "
            "that folder"
        )
    lines = [
        f"{path}: {count} boxes of {detections.names} {name!r}, which is none of the pictures"
        for name, count in missing.items()
    ]
    leaving = check_boxes(detections, _sizes(found, in_channels))
    if leaving:
        name, detection = leaving[0]
        remarks.append(
            f"{path}: {len(leaving)} boxes end outside of their pictures and were cut, such as "
            f"{detection.place} of {name!r}"
        )
    return PictureBoxes(
        path,
        hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest(),
        min_score,
        {found[name]: boxes for name, boxes in detections.by_image.items() if name in found},
        every.categories(),
        lines,
        remarks,
    )


def _found(detections: Detections, pictures: Sequence[Path], root: Path) -> dict[Name, Path]:
    """The picture that each image of the file is."""
    files, known = NamedFiles(root), set(pictures)
    by_stem: dict[Name, list[Path]] = {}
    for picture in pictures:
        stem = picture.stem
        by_stem.setdefault(stem, []).append(picture)
        if stem.isascii() and stem.isdigit():
            by_stem.setdefault(int(stem), []).append(picture)
    found: dict[Name, Path] = {}
    owners: dict[Path, Name] = {}
    for name in detections.by_image:
        try:
            picture = files.find(name) if isinstance(name, str) else None
        except ConfigError as error:
            raise ConfigError(f"{detections.path}: {error}") from error
        if picture is None and detections.names == "image_id":
            same = by_stem.get(name, [])
            if len(same) > 1:
                raise ConfigError(
                    f"{detections.path}: image_id {name!r} may be {same[0]} or {same[1]}: write "
                    "file_name in place of image_id"
                )
            picture = same[0] if same else None
        if picture is None or picture not in known:
            continue
        if (other := owners.setdefault(picture, name)) != name:
            raise ConfigError(
                f"{detections.path}: {other!r} and {name!r} are both the picture {picture}: put "
                "its boxes under one name"
            )
        found[name] = picture
    return found


def _sizes(found: Mapping[Name, Path], in_channels: int | None) -> dict[Name, tuple[int, int]]:
    """Sizes of upright pictures; those that cannot be read are named when it is their turn."""
    sizes = {}
    for name, picture in found.items():
        try:
            header = header_of(picture.read_bytes(), str(picture), in_channels)
            sizes[name] = header.upright_hw
        except (ImageError, OSError):
            continue
    return sizes
