"""A folder for each image, in which there are a picture and a mask file for each object."""

import logging
from pathlib import Path

from sam_jax.data.label_maps import LabelMap, read_label_map
from sam_jax.data.mask_files import as_one_object
from sam_jax.data.sources import visible_files
from sam_jax.data.sources.masked_pictures import (
    MASK_SUFFIXES,
    NO_MASK_FILE,
    MaskedPicture,
    MaskedPicturesSource,
)
from sam_jax.errors import ConfigError
from sam_jax.files import is_hidden
from sam_jax.image_channels import hint_of_arrays, image_suffixes
from sam_jax.images import Orientation

_log = logging.getLogger(__name__)

NO_PICTURE = "folders without a picture"


class ImageFoldersSource(MaskedPicturesSource):
    """Images of folders `ID/images/*.png` with masks `ID/masks/*.png`, as BBBC038 has them.

    A mask file is one object: everything in it that is not 0 (black).

    Args:
      path: the folder of these folders.
      images: the name of the folder with the picture.
      masks: the name of the folder with its masks.
      name: what `Sample.dataset` says.
      orientation: see `Sample`; masks that are stored turned are taken by it.
      in_channels: see `Sample`; if there are some, images may be `.npy`, too.

    Raises:
      FileNotFoundError: the folder does not exist.
      ConfigError: a folder has several pictures, or none has a picture with a mask.
    """

    def __init__(
        self,
        path: str | Path,
        images: str = "images",
        masks: str = "masks",
        name: str = "image_folders",
        orientation: Orientation = "upright",
        in_channels: int | None = None,
    ):
        root = Path(path)
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root}")
        super().__init__(name, orientation, in_channels)
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
        for folder in folders:
            if is_hidden(folder.relative_to(root)):
                continue
            pictures = self._files(folder / images, image_suffixes(in_channels))
            if len(pictures) > 1:
                raise ConfigError(
                    f"{folder / images} has {len(pictures)} pictures, {pictures[0].name} and "
                    f"{pictures[1].name} among them; expected one, whose masks are in "
                    f"{folder / masks}"
                )
            mask_files = self._files(folder / masks, MASK_SUFFIXES)
            if not pictures:
                self.left_out.add(NO_PICTURE, str(folder))
            elif not mask_files:
                self.left_out.add(NO_MASK_FILE, str(pictures[0]))
            else:
                self._pictures.append(MaskedPicture(folder.name, pictures[0], mask_files))
        if not self._pictures:
            raise ConfigError(
                f"none of the {len(folders)} folders in {root} has a picture in {images}/ and "
                f"masks in {masks}/"
                + (f": {self.left_out}" if self.left_out else "")
                + hint_of_arrays(root, in_channels)
            )
        for line in self.left_out.lines():
            _log.warning("%s: left out: %s", root, line)

    def _files(self, folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
        return visible_files(folder, suffixes, self.left_out) if folder.is_dir() else []

    def num_masks(self, index: int) -> int:
        """The number of mask files."""
        return len(self._pictures[index].mask_files)

    def _read(self, file: Path) -> LabelMap:
        return as_one_object(read_label_map(file, orientation=self._orientation))
