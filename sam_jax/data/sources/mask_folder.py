"""A folder of images beside a folder of mask images."""

import collections
import logging
import os
from pathlib import Path

import numpy as np

from sam_jax.data import rle
from sam_jax.data.samples import CorruptSampleError, Sample
from sam_jax.errors import ConfigError
from sam_jax.images import DECODE_ERRORS, PICTURE_SUFFIXES, Orientation, decode_in_own_mode

_log = logging.getLogger(__name__)
# Lossy formats smear labels into each other at every outline.
_MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
# More labels than this is a photograph in the wrong folder.
_MAX_LABELS = 10_000


class MaskFolderSource:
    """Images with masks drawn as images.

    For the image `sub/cat.jpg`, any of these in the folder of masks is its:

    - `sub/cat.png`, a label map: every grey value, palette index or colour
      other than 0 (black) is one object. A black and white mask is a label
      map with one object;
    - `sub/cat/*.png` or `sub/cat_*.png`, one mask a file: everything that is
      not 0 (black).
    """

    def __init__(
        self,
        path: str | Path,
        masks: str | Path,
        name: str = "mask_folder",
        orientation: Orientation = "upright",
    ):
        """Matches the files; none is opened yet.

        Args:
            path: the folder (tree) of images.
            masks: the folder (tree) of masks, in PNG, BMP or TIFF.
            name: what `Sample.dataset` says.
            orientation: see `Sample`; masks that are stored turned are taken
                by it.

        Raises:
            FileNotFoundError: a folder does not exist.
            ConfigError: two images differ in their suffix only, or no mask
                belongs to any image.
        """
        self.name = name
        self._orientation = orientation
        images: dict[str, Path] = {}
        for stem, image in _files(path, PICTURE_SUFFIXES):
            if stem in images:
                raise ConfigError(f"{images[stem]} and {image} would share their masks")
            images[stem] = image
        # Per image: (is it a label map, the file).
        found: dict[str, list[tuple[bool, Path]]] = collections.defaultdict(list)
        strays = []
        for stem, mask in _files(masks, _MASK_SUFFIXES):
            owner = _owner(stem, images)
            if owner is None:
                strays.append(mask)
            else:
                found[owner].append((stem == owner, mask))
        if not found:
            raise ConfigError(
                f"none of the {len(strays)} masks (png, bmp, tif) in {masks} belongs "
                f"to one of the {len(images)} images in {path}; for cat.jpg, "
                "cat.png, cat_*.png and cat/*.png would"
            )
        bare = sorted(images.keys() - found.keys())
        for what, names in (("images without a mask", bare), ("stray masks", strays)):
            if names:
                _log.warning("%s: %d %s, e.g. %s", path, len(names), what, names[0])
        self._pairs = [(images[stem], found[stem]) for stem in sorted(found)]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        """The image at 0 <= index < len, and its masks.

        Raises:
            CorruptSampleError: the image is gone, or a label map has
                thousands of labels. Unreadable mask files are left out.
        """
        path, mask_files = self._pairs[index]
        try:
            image = path.read_bytes()
        except FileNotFoundError as error:
            raise CorruptSampleError(str(path), "missing image") from error
        masks_rle, unusable = [], []
        for is_label_map, file in mask_files:
            try:
                labels = _read_labels(file, self._orientation)
            except DECODE_ERRORS as error:
                unusable.append(f"{file}: {error}")
                continue
            if not is_label_map:
                labels = (labels != 0).astype(np.uint8)
            elif (count := np.unique(labels).size) > _MAX_LABELS:
                detail = f"{file} has {count} labels; is it a photograph?"
                raise CorruptSampleError(str(path), "too many labels", detail)
            masks_rle += rle.from_labels(labels)
        return Sample(
            image, tuple(masks_rle), self.name, str(path), tuple(unusable), self._orientation
        )


def _files(folder: str | Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(path below the folder without suffix, path) of its files, sorted."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    found = []
    for parent, _, names in os.walk(folder):
        for file_name in names:
            path = Path(parent, file_name)
            if path.suffix.lower() in suffixes:
                found.append((path.relative_to(folder).with_suffix("").as_posix(), path))
    return sorted(found)


def _owner(stem: str, images: dict[str, Path]) -> str | None:
    """The image a mask belongs to; of `cat` and `cat_2`, the longer match."""
    folder = stem.rpartition("/")[0]
    if stem not in images and folder in images:
        return folder
    while stem and stem not in images:
        stem = stem.rpartition("_")[0]
    return stem or None


def _read_labels(path: Path, orientation: Orientation) -> np.ndarray:
    """The label of each pixel, integers [h, w]; 0 is background."""
    image = decode_in_own_mode(path.read_bytes(), str(path), orientation)
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        image = image.convert("RGB")
    labels = np.asarray(image)
    if labels.ndim == 3:
        labels = labels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    return labels
