"""A folder for each image, in which there are a picture and a mask file for each object."""

import logging
from pathlib import Path

from sam_jax.data.label_maps import LabelMap, read_label_map
from sam_jax.data.mask_files import as_one_object, read_mask_files
from sam_jax.data.samples import Sample, read_picture_file, sample_of_file
from sam_jax.data.sources import truth_bytes
from sam_jax.data.sources.label_map_files import MASK_SUFFIXES, NO_MASK_FILE
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError
from sam_jax.files import data_files, is_hidden
from sam_jax.image_channels import hint_of_arrays, image_suffixes
from sam_jax.images import Orientation

_log = logging.getLogger(__name__)

NO_PICTURE = "folders without a picture"


class ImageFoldersSource:
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
        self.name = name
        self.left_out = Tally()
        self._orientation, self._in_channels = orientation, in_channels
        self._entries: list[tuple[str, Path, list[Path]]] = []
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
                self._entries.append((folder.name, pictures[0], mask_files))
        if not self._entries:
            raise ConfigError(
                f"none of the {len(folders)} folders in {root} has a picture in {images}/ and "
                f"masks in {masks}/"
                + (f": {self.left_out}" if self.left_out else "")
                + hint_of_arrays(root, in_channels)
            )
        for line in self.left_out.lines():
            _log.warning("%s: left out: %s", root, line)

    def _files(self, folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
        if not folder.is_dir():
            return []
        found, hidden = data_files(folder, suffixes)
        if hidden:
            self.left_out.add("hidden files", str(hidden[0]), len(hidden))
        return found

    def __len__(self) -> int:
        return len(self._entries)

    def file_name(self, index: int) -> str:
        """The name of the image's folder."""
        return self._entries[index][0]

    def num_masks(self, index: int) -> int:
        """The number of mask files."""
        return len(self._entries[index][2])

    def truth(self, index: int) -> bytes:
        """The files of its masks.

        Raises:
          OSError: one of them cannot be read.
        """
        return truth_bytes(self.file_name(index), self._entries[index][2])

    def __getitem__(self, index: int) -> Sample:
        """The image at 0 <= index < len, and its masks.

        Raises:
          CorruptSampleError: the image is gone. Mask files that are damaged are left out.
        """
        _, path, mask_files = self._entries[index]
        image = read_picture_file(path)
        found = read_mask_files(mask_files, self._read)
        return sample_of_file(path, image, self.name, self._orientation, *found, self._in_channels)

    def _read(self, file: Path) -> LabelMap:
        return as_one_object(read_label_map(file, orientation=self._orientation))
