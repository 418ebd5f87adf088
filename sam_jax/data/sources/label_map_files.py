"""Images with label maps whose names begin as theirs do."""

import collections
import fnmatch
import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from sam_jax.data.label_encodings import Encoding, components, read_encoded_labels
from sam_jax.data.label_maps import LabelMap, read_label_map
from sam_jax.data.mask_files import count_masks
from sam_jax.data.sources.masked_pictures import (
    MASK_SUFFIXES,
    NO_MASK_FILE,
    MaskedPicture,
    MaskedPicturesSource,
)
from sam_jax.errors import ConfigError
from sam_jax.files import data_files
from sam_jax.image_channels import hint_of_arrays, image_suffixes
from sam_jax.images import Orientation

_log = logging.getLogger(__name__)

NOT_INCLUDED = "images that include does not name"


class LabelMapsSource(MaskedPicturesSource):
    """Images whose objects are labels in files beside them, or in a tree of the same folders.

    The label maps of `city/a_leftImg8bit.png`, with the image suffix `_leftImg8bit.png`, are
    `city/a` and one of the mask suffixes. Each label of each file is an object.

    Args:
      path: the folder (tree) of the images.
      masks: the folder (tree) of the label maps; None is that of the images.
      image_suffix: the end of an image's name; None is the ending of any picture.
      mask_suffixes: what takes its place in the names of the label maps; `*` stands for anything,
        as in `_parts_*.png`.
      name: what `Sample.dataset` says.
      encoding: the form of the files where it is that of a data set, see
        `label_encodings.read_encoded_labels`; None is any label map, see `read_label_map`.
      background: the label that is no object; see `MaskFolderSource`.
      ignore_labels: labels that are neither object nor background.
      components: whether each connected piece of a label is an object of its own.
      include: patterns of the images' paths below the folder, as in `ego4d_*`; None is all.
      orientation: see `Sample`; label maps that are stored turned are taken by it.
      in_channels: see `Sample`; if there are some, images may be `.npy`, too.

    Raises:
      FileNotFoundError: a folder does not exist.
      ConfigError: no image has a label map, or options exclude each other.
    """

    def __init__(
        self,
        path: str | Path,
        masks: str | Path | None = None,
        image_suffix: str | None = None,
        mask_suffixes: Sequence[str] = (".png",),
        name: str = "label_maps",
        encoding: Encoding | None = None,
        background: int | None = None,
        ignore_labels: Sequence[int] = (),
        components: bool = False,
        include: Sequence[str] | None = None,
        orientation: Orientation = "upright",
        in_channels: int | None = None,
    ):
        if encoding is not None and (background is not None or ignore_labels):
            raise ConfigError(f"encoding {encoding!r} says itself what is background")
        super().__init__(name, orientation, in_channels)
        self._path = Path(path)
        self._encoding = encoding
        self._background, self._ignore_labels = background, tuple(ignore_labels)
        self._components = components
        mask_suffixes = tuple(mask_suffixes)
        masks = Path(masks) if masks is not None else self._path
        mask_files = _by_folder(masks, MASK_SUFFIXES)
        image_files = _by_folder(self._path, image_suffixes(in_channels))
        for folder, images in sorted(image_files.items()):
            for file_name, image in images:
                stem = _stem(file_name, image_suffix)
                if stem is None:
                    continue
                inside = f"{folder}/{file_name}" if folder else file_name
                found = _label_maps(stem, mask_suffixes, mask_files.get(folder, []))
                if image in found:
                    # Label maps of others may end like images.
                    continue
                if include is not None and not any(fnmatch.fnmatchcase(inside, p) for p in include):
                    self.left_out.add(NOT_INCLUDED, str(image))
                elif found:
                    self._pictures.append(MaskedPicture(inside, image, found))
                else:
                    self.left_out.add(NO_MASK_FILE, str(image))
        if not self._pictures:
            raise ConfigError(
                f"no image of {path} has a label map in {masks}: for an image of the name "
                f"x{image_suffix or '.jpg'}, one of "
                f"{', '.join(f'x{suffix}' for suffix in mask_suffixes)} would be"
                + (f". Left out: {self.left_out}" if self.left_out else "")
                + ("" if image_files else hint_of_arrays(self._path, in_channels))
            )
        for line in self.left_out.lines():
            _log.warning("%s: left out: %s", path, line)

    def num_masks(self, index: int) -> int:
        """The number of objects in the label maps, which are read for it.

        Raises:
          CorruptSampleError: none of the label maps can be read.
        """
        _, image, mask_files = self._pictures[index]
        return count_masks(mask_files, self._read, image)

    def _read(self, file: Path) -> LabelMap:
        if self._encoding is not None:
            found = read_encoded_labels(file, self._encoding, self._orientation)
        else:
            found = read_label_map(file, self._background, self._ignore_labels, self._orientation)
        return found._replace(labels=components(found.labels)) if self._components else found


def _by_folder(root: Path, suffixes: Sequence[str]) -> dict[str, list[tuple[str, Path]]]:
    """Names and paths of a tree's files, sorted, by the folder that they are in.

    The same letters may be stored composed or not, as in zips from other systems.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    found = collections.defaultdict(list)
    for path in data_files(root, suffixes)[0]:
        parent = path.parent.relative_to(root).as_posix()
        folder = unicodedata.normalize("NFC", "" if parent == "." else parent)
        found[folder].append((unicodedata.normalize("NFC", path.name), path))
    return dict(found)


def _stem(file_name: str, suffix: str | None) -> str | None:
    """The name without its end; None if it has another."""
    if suffix is None:
        return Path(file_name).stem
    return file_name.removesuffix(suffix) if file_name.endswith(suffix) else None


def _label_maps(
    stem: str, suffixes: Sequence[str], files: Sequence[tuple[str, Path]]
) -> list[Path]:
    """The files whose names are a stem and one of the suffixes, in the order of these."""
    found = []
    for suffix in suffixes:
        for name, path in files:
            end = name[len(stem) :]
            if name.startswith(stem) and fnmatch.fnmatchcase(end, suffix) and path not in found:
                found.append(path)
    return found
