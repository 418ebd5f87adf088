"""Images with the boundaries that people marked in them, laid out as in BSDS500."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from sam_jax.arrays import Bool, Shaped, UInt8
from sam_jax.errors import ConfigError, UserError
from sam_jax.files import data_files
from sam_jax.images import PICTURE_SUFFIXES, read_image

IMAGES, ANNOTATIONS = "images", "groundTruth"
_BOUNDARIES = "Boundaries"
_EXPECTED = (
    f"expected MATLAB's variable {ANNOTATIONS!r}, a cell for each annotator with a field "
    f"{_BOUNDARIES!r}, as BSDS500 has it"
)


class AnnotationError(UserError, ValueError):
    """A file of marked boundaries that cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class EdgeExample:
    """The files of an image and of the boundaries marked in it, which share their stem."""

    image: Path
    annotations: Path

    @property
    def name(self) -> str:
        """The stem."""
        return self.image.stem

    def read_image(self) -> UInt8[np.ndarray, "h w 3"]:
        """The image's pixels.

        Raises:
          ImageError: it cannot be read.
        """
        return read_image(self.image)

    def read_boundaries(
        self, pixels: Shaped[np.ndarray, "h w *channels"], picture: Path
    ) -> list[Bool[np.ndarray, "h w"]]:
        """Each annotator's boundaries, of the size of a picture.

        Args:
          pixels: the picture's.
          picture: its file, which a message names.

        Raises:
          AnnotationError: see ``read_boundaries``; or they are of another size.
        """
        boundaries = read_boundaries(self.annotations)
        sizes = {marked.shape for marked in boundaries}
        if sizes != {pixels.shape[:2]}:
            raise AnnotationError(
                f"{self.annotations} has boundaries of height and width {sorted(sizes)}; {picture} "
                f"is {pixels.shape[:2]}"
            )
        return boundaries


def list_examples(folder: Path, split: str = "") -> list[EdgeExample]:
    """The images of a folder with their annotations, by the images' names.

    Args:
      folder: with ``images/`` and ``groundTruth/`` in it.
      split: a folder in each of these, as in ``images/test/`` of the whole of BSDS500; none if
        empty.

    Raises:
      ConfigError: a folder is missing or empty, or an image has no annotations or the other way
        round: scores over a part of the images are other scores.
    """
    images = _by_stem(folder, IMAGES, split, PICTURE_SUFFIXES)
    annotations = _by_stem(folder, ANNOTATIONS, split, (".mat",))
    for found, others, what in (
        (images, annotations, "annotations"),
        (annotations, images, "image"),
    ):
        alone = [path for stem, path in found.items() if stem not in others]
        if alone:
            raise ConfigError(
                f"{alone[0]} has no {what} of the same name, like {len(alone) - 1} others of "
                f"{len(found)}: add them, or take the files away, as scores over fewer images are "
                "other scores"
            )
    return [EdgeExample(path, annotations[stem]) for stem, path in sorted(images.items())]


def files_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files of a folder, and of none in it, by their names without their endings.

    Raises:
      ConfigError: there is no such folder, nothing in it, or two files share a stem.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}")
    files: dict[str, Path] = {}
    for path in data_files(folder, suffixes)[0]:
        if path.parent != folder:
            continue
        if path.stem in files:
            raise ConfigError(f"{files[path.stem]} and {path} have the same name: remove one")
        files[path.stem] = path
    if not files:
        raise ConfigError(f"{folder} holds no files that end in {' '.join(suffixes)}")
    return files


def _by_stem(folder: Path, kind: str, split: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
    try:
        return files_by_stem(folder / kind / split, suffixes)
    except ConfigError as error:
        parts = sorted(p.name for p in (folder / kind).glob("*/")) if not split else []
        hint = f"; there are the splits {', '.join(parts)}" if parts else ""
        raise ConfigError(
            f"{error}: the data of an edge evaluation is a folder with {IMAGES}/ and "
            f"{ANNOTATIONS}/, in each of them a folder for the split if there are several{hint}"
        ) from None


def read_boundaries(path: Path) -> list[Bool[np.ndarray, "h w"]]:
    """Each annotator's boundaries in a ``.mat`` file; nothing in it is executed.

    Raises:
      AnnotationError: it is no such file, is damaged, or holds something else.
    """
    # Training knows edge evaluation, too, and starts sooner without SciPy.
    from scipy.io import loadmat, whosmat

    try:
        content = loadmat(path, variable_names=[ANNOTATIONS])
        names = [name for name, *_ in whosmat(path)]
    # Damaged bytes end in errors of every kind, of zlib and struct among them.
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise AnnotationError(
            f"{path} is damaged, cut short or no MATLAB file before version 7.3 "
            f"({reason}); {_EXPECTED}"
        ) from None
    if ANNOTATIONS not in content:
        raise AnnotationError(f"{path} holds {names[:5]}; {_EXPECTED}")
    boundaries = [_marked(cell, path) for cell in np.ravel(content[ANNOTATIONS])]
    if not boundaries:
        raise AnnotationError(f"{path} has no annotator; {_EXPECTED}")
    return boundaries


def _marked(cell: Any, path: Path) -> np.ndarray:
    """The boundaries of an annotator's cell, which is a structure in an array."""
    try:
        marked = np.asarray(np.ravel(cell)[0][_BOUNDARIES])
        if marked.ndim == 2 and marked.size and marked.dtype.kind in "buif":
            return marked != 0
    except (IndexError, KeyError, ValueError, TypeError):
        pass
    raise AnnotationError(f"{path}: an annotator has no boundaries; {_EXPECTED}")
