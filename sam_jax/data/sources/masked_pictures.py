"""Picture files whose masks are files of their own: what the sources that find them share."""

from pathlib import Path
from typing import NamedTuple

from sam_jax.data.label_maps import LabelMap
from sam_jax.data.mask_files import read_mask_files
from sam_jax.data.samples import Sample, read_picture_file, sample_of_file
from sam_jax.data.sources import truth_bytes
from sam_jax.data.tally import Tally
from sam_jax.images import Orientation

# Lossy formats smear labels into each other at every outline.
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".npy")
NO_MASK_FILE = "images without a mask file"


class MaskedPicture(NamedTuple):
    """A picture and the files of its masks.

    Attributes:
      file_name: see ``ListingSource.file_name``.
      image: the picture's file.
      mask_files: in the order of their masks.
    """

    file_name: str
    image: Path
    mask_files: list[Path]


class MaskedPicturesSource:
    """Samples of pictures with mask files, which a subclass finds and reads the labels of.

    Args:
      name: what `Sample.dataset` says.
      orientation: see `Sample`; mask files that are stored turned are taken by it.
      in_channels: see `Sample`; if there are some, images may be `.npy`, too.
    """

    def __init__(self, name: str, orientation: Orientation, in_channels: int | None):
        self.name = name
        self.left_out = Tally()
        self._orientation, self._in_channels = orientation, in_channels
        self._pictures: list[MaskedPicture] = []

    def __len__(self) -> int:
        return len(self._pictures)

    def file_name(self, index: int) -> str:
        """The picture's name, see ``MaskedPicture``."""
        return self._pictures[index].file_name

    def truth(self, index: int) -> bytes:
        """The files of its masks.

        Raises:
          OSError: one of them cannot be read.
        """
        picture = self._pictures[index]
        return truth_bytes(picture.file_name, picture.mask_files)

    def __getitem__(self, index: int) -> Sample:
        """The picture at 0 <= index < len, and its masks.

        Raises:
          CorruptSampleError: the picture is gone. Mask files that are damaged, or are not what they
            should be, are left out.
        """
        _, path, mask_files = self._pictures[index]
        image = read_picture_file(path)
        found = read_mask_files(mask_files, self._read)
        return sample_of_file(path, image, self.name, self._orientation, *found, self._in_channels)

    def _read(self, file: Path) -> LabelMap:
        """The labels of a mask file.

        Raises:
          LabelMapError: they are none.
          OSError: it cannot be read.
        """
        raise NotImplementedError
