"""A folder of images beside a folder of mask images."""

import collections
import logging
import unicodedata
from collections.abc import Container, Sequence
from pathlib import Path

from sam_jax.data.label_maps import LabelMap, read_label_map
from sam_jax.data.mask_files import as_one_object, count_masks
from sam_jax.data.sources import visible_files
from sam_jax.data.sources.masked_pictures import (
    MASK_SUFFIXES,
    NO_MASK_FILE,
    MaskedPicture,
    MaskedPicturesSource,
)
from sam_jax.errors import ConfigError
from sam_jax.image_channels import hint_of_arrays, image_suffixes
from sam_jax.images import Orientation

_log = logging.getLogger(__name__)


class MaskFolderSource(MaskedPicturesSource):
    """Images with masks drawn as images.

    For the image `sub/cat.jpg`, any of these in the folder of masks is its:

    - `sub/cat.png`, a label map: every grey value, palette index or colour
      other than 0 (black) is one object. A black and white mask is a label
      map with one object;
    - `sub/cat/*.png` or `sub/cat_*.png`, one mask a file: everything that is
      not 0 (black).

    `docs/annotations.md` has all forms of such files, and what is refused.
    """

    def __init__(
        self,
        path: str | Path,
        masks: str | Path,
        name: str = "mask_folder",
        background: int | None = None,
        ignore_labels: Sequence[int] = (),
        orientation: Orientation = "upright",
        in_channels: int | None = None,
    ):
        """Matches the files; none is opened yet.

        Args:
          path: the folder (tree) of images.
          masks: the folder (tree) of masks, in PNG, BMP, TIFF or NumPy's NPY.
          name: what `Sample.dataset` says.
          background: the label that is no object: a grey value, palette index or colour 0xRRGGBB;
            None is black.
          ignore_labels: labels that are neither object nor background.
          orientation: see `Sample`; masks that are stored turned are taken by it.
          in_channels: see `Sample`; if there are some, images may be `.npy`, too.

        Raises:
          FileNotFoundError: a folder does not exist.
          ConfigError: two images differ in their suffix only, or two label maps of one; or no mask
            belongs to any image.
        """
        super().__init__(name, orientation, in_channels)
        self._background, self._ignore_labels = background, tuple(ignore_labels)
        images: dict[str, Path] = {}
        for stem, image in self._files(path, image_suffixes(in_channels)):
            if stem in images:
                raise ConfigError(f"{images[stem]} and {image} would share their masks")
            images[stem] = image
        # Names that differ in case only match where no name is equal.
        folded: dict[str, list[str]] = collections.defaultdict(list)
        for stem in images:
            folded[stem.casefold()].append(stem)
        found: dict[str, list[Path]] = collections.defaultdict(list)
        label_maps: dict[str, Path] = {}
        num_masks = 0
        for stem, mask in self._files(masks, MASK_SUFFIXES):
            num_masks += 1
            owner = _owner(stem, images)
            if owner is None and (alike := _owner(stem.casefold(), folded)):
                owner, *others = folded[alike]
                if others:
                    raise ConfigError(
                        f"{mask} may belong to {images[owner]} or {images[others[0]]}: write its "
                        "name as the image's is"
                    )
            if owner is None:
                self.left_out.add("mask files without an image", str(mask))
                continue
            if stem.casefold() == owner.casefold():
                _check_alone(mask, label_maps.setdefault(owner, mask), images[owner])
            found[owner].append(mask)
        if not found:
            left_out = f". Left out: {self.left_out}" if self.left_out else ""
            raise ConfigError(
                f"none of the {num_masks} masks (png, bmp, tif, npy) in {masks} belongs "
                f"to one of the {len(images)} images in {path}; for cat.jpg, "
                f"cat.png, cat_*.png and cat/*.png would{left_out}"
                + ("" if images else hint_of_arrays(Path(path), in_channels))
            )
        for stem in sorted(images.keys() - found.keys()):
            self.left_out.add(NO_MASK_FILE, str(images[stem]))
        for line in self.left_out.lines():
            _log.warning("%s: left out: %s", path, line)
        self._pictures = [MaskedPicture(stem, images[stem], found[stem]) for stem in sorted(found)]
        self._label_maps = frozenset(label_maps.values())

    def _files(self, folder: str | Path, suffixes: Sequence[str]) -> list[tuple[str, Path]]:
        """(path below the folder without suffix, path) of its files, sorted."""
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}")
        # The same letters may be stored composed or not, as in zips from other systems.
        return sorted(
            (
                unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix()),
                path,
            )
            for path in visible_files(folder, suffixes, self.left_out)
        )

    def num_masks(self, index: int) -> int:
        """The number of masks; of files only label maps are read for it.

        Raises:
          CorruptSampleError: the label map cannot be read.
        """
        _, path, mask_files = self._pictures[index]
        label_maps = [file for file in mask_files if file in self._label_maps]
        num_others = len(mask_files) - len(label_maps)
        return num_others + (count_masks(label_maps, self._read, path) if label_maps else 0)

    def _read(self, file: Path) -> LabelMap:
        found = read_label_map(file, self._background, self._ignore_labels, self._orientation)
        return found if file in self._label_maps else as_one_object(found)


def _check_alone(label_map: Path, first: Path, image: Path) -> None:
    """Refuses a second label map of an image."""
    if label_map != first:
        raise ConfigError(
            f"{first} and {label_map} would both be label maps of {image}, and its objects would "
            "count twice: keep one"
        )


def _owner(stem: str, images: Container[str]) -> str | None:
    """The image a mask belongs to; of `cat` and `cat_2`, the longer match."""
    folder = stem.rpartition("/")[0]
    if stem not in images and folder in images:
        return folder
    while stem and stem not in images:
        stem = stem.rpartition("_")[0]
    return stem or None
