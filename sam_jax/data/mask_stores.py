"""The masks of data sets without their images, for whoever only wants to know what they are like.

Where annotations say the sizes of their images, no image is read: SA-1B's files, those that
``sam-jax masks`` writes, and COCO's. Other sources are read as they are for training.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from sam_jax.data.config import SourceConfig, build_source
from sam_jax.data.samples import image_hw
from sam_jax.data.sources import Source
from sam_jax.data.sources.coco_file import read_coco
from sam_jax.data.sources.listed_images import ListedImage, segmentation_to_rle
from sam_jax.data.sources.sa1b import AnnotationFile, Sa1bSource, parse_annotation
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError
from sam_jax.rle import BadRleError

# Names of a store's parts, where it is a folder: what ``sam-jax masks`` writes, and mask folders.
_ANNOTATIONS, _SETTINGS = "annotations", "settings.json"
_IMAGES, _MASKS = "images", "masks"
_KIND = "kind="
# What is a model's for training, and no field of a source.
_CHANNELS = "in_channels"
# Fields of a source that are no text, and those that are several of something.
_OTHERS: dict[str, Callable[[str], Any]] = {
    "background": int,
    _CHANNELS: int,
    "num_images": int,
    "seed": int,
    "weight": float,
    "components": {"true": True, "false": False}.__getitem__,
}
_SEVERAL: dict[str, type] = {
    "ignore_labels": int,
    "image_size": int,
    "num_objects": int,
    "radius_rates": float,
    "skip_labels": str,
    "mask_suffixes": str,
    "include": str,
}
_BETWEEN = "+"
# Annotations of one image are no larger; those of a data set may be, and are not parsed twice.
_MAX_BYTES_OF_ONE_IMAGE = 1 << 26


class ImageMasks(NamedTuple):
    """The masks of an image.

    Attributes:
      name: of the image.
      hw: its height and width; None where nothing says it, as of an image without masks.
      masks_rle: run lengths, not validated yet; see ``samples.Sample``.
      unusable: what was wrong with each annotation that is no RLE at all.
    """

    name: str
    hw: tuple[int, int] | None
    masks_rle: tuple[Mapping[str, Any], ...]
    unusable: tuple[str, ...] = ()


# Reads the masks of one image, in any process; raises SkippedSampleError where it has none.
MaskReader = Callable[[], ImageMasks]


@runtime_checkable
class MaskStore(Protocol):
    """The images of a data set by number, each of which may be read in another process.

    Attributes:
      name: of the data set.
      left_out: what of the data set is not among its images, by reason.
    """

    name: str
    left_out: Tally

    def __len__(self) -> int: ...

    def reader(self, index: int) -> MaskReader:
        """The reader of image number ``index``; it is small, and can be pickled."""
        ...


class Sa1bStore:
    """Annotations in SA-1B's form, with or without their images."""

    def __init__(self, source: Sa1bSource):
        self.name, self.left_out = source.name, source.left_out
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def reader(self, index: int) -> MaskReader:
        """See ``MaskStore``."""
        return functools.partial(_read_sa1b, self._source.annotation_file(index))


class CocoStore:
    """A COCO instance file; images that nothing is marked in are left out.

    Args:
      path: the JSON.
      name: of the data set.
      keep_crowds: whether annotations with iscrowd count as objects.

    Raises:
      ConfigError: it is not in COCO form, or no annotation can be used.
    """

    def __init__(self, path: Path, name: str = "coco", keep_crowds: bool = False):
        self.name = name
        self._images, self.left_out = read_coco(path, keep_crowds)
        if not self._images:
            raise ConfigError(f"{path} has no image with an annotation to use: {self.left_out}")

    def __len__(self) -> int:
        return len(self._images)

    def reader(self, index: int) -> MaskReader:
        """See ``MaskStore``."""
        return functools.partial(_read_coco, self._images[index])


class SampleStore:
    """Any source of samples; their images are read for their size, and not decoded."""

    def __init__(self, source: Source):
        self.name, self.left_out = source.name, source.left_out
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def reader(self, index: int) -> MaskReader:
        """See ``MaskStore``."""
        return functools.partial(_read_sample, self._source, index)


def open_store(store: str, name: str | None = None) -> MaskStore:
    """The masks that a path, or the fields of a ``SourceConfig``, stand for.

    Args:
      store: a COCO JSON; an SA-1B JSON of one image; a tar of SA-1B's, a folder of such or of JSON
        files, or a pattern; the folder that ``sam-jax masks`` wrote; a folder with ``images`` and
        ``masks``; or ``kind=mask_folder,path=A,masks=B`` and the like, with ``in_channels=4`` where
        images have other channels than RGB.
      name: of the data set; by default what its path ends with.

    Raises:
      ConfigError: it is none of these.
      OSError: it cannot be read, or is not there.
    """
    if store.startswith(_KIND):
        return _open_source(*_source_config(store, name))
    path = Path(store)
    if path.is_file() and path.suffix.lower() == ".json":
        name = name or "/".join(path.with_suffix("").parts[-2:])
        one = _annotation_of_one_image(path)
        return CocoStore(path, name) if one is None else _OneImage(one, name)
    name = name or path.name
    if (path / _ANNOTATIONS).is_dir() and (path / _SETTINGS).is_file():
        path = path / _ANNOTATIONS
    elif (path / _IMAGES).is_dir() and (path / _MASKS).is_dir():
        return _open_source(
            SourceConfig("mask_folder", str(path / _IMAGES), name=name, masks=str(path / _MASKS))
        )
    return Sa1bStore(Sa1bSource(path, name=name))


class _OneImage:
    """An annotation file in SA-1B's form, alone."""

    def __init__(self, file: AnnotationFile, name: str):
        self.name, self.left_out = name, Tally()
        self._file = file

    def __len__(self) -> int:
        return 1

    def reader(self, index: int) -> MaskReader:
        return functools.partial(_read_sa1b, self._file)


def _annotation_of_one_image(path: Path) -> AnnotationFile | None:
    """The file, if it is one of SA-1B's; None if it is anything else."""
    if path.stat().st_size > _MAX_BYTES_OF_ONE_IMAGE:
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    is_one = isinstance(content, dict) and "image" in content and "images" not in content
    return AnnotationFile(str(path), path) if is_one else None


def _source_config(text: str, name: str | None) -> tuple[SourceConfig, int | None]:
    """The source that ``kind=...,path=...`` describes, and the channels of its images.

    What is several has a plus between.
    """
    values: dict[str, Any] = {}
    for part in text.split(","):
        field, separator, value = part.partition("=")
        if not separator or not value:
            raise ConfigError(
                f"{text}: expected fields of a source with their values, as in "
                f"kind=mask_folder,path=A,masks=B; found {part!r}"
            )
        try:
            if field in _OTHERS:
                values[field] = _OTHERS[field](value)
            elif field in _SEVERAL:
                values[field] = tuple(map(_SEVERAL[field], value.split(_BETWEEN)))
            else:
                values[field] = value
        except (ValueError, KeyError):
            expected = "true or false" if field == "components" else "a number, several as in 0+255"
            raise ConfigError(f"{text}: {field} is {value!r}; expected {expected}") from None
    in_channels = values.pop(_CHANNELS, None)
    return SourceConfig.from_dict(values | ({} if name is None else {"name": name})), in_channels


def _open_source(config: SourceConfig, in_channels: int | None = None) -> MaskStore:
    if config.kind == "coco" and config.path is not None:
        return CocoStore(Path(config.path), config.name or "coco", config.crowd == "keep")
    source = build_source(config, in_channels)
    return Sa1bStore(source) if isinstance(source, Sa1bSource) else SampleStore(source)


def _read_sa1b(file: AnnotationFile) -> ImageMasks:
    masks_rle, unusable = parse_annotation(file.name, file.read())
    return ImageMasks(file.name, most_common_size(masks_rle), masks_rle, unusable)


def _read_coco(image: ListedImage) -> ImageMasks:
    masks_rle, unusable = [], []
    for where, segmentation in image.segmentations:
        try:
            mask, _ = segmentation_to_rle(segmentation, image.hw)
        except BadRleError as error:
            unusable.append(f"{where}: {error}")
        else:
            masks_rle.append(mask)
    hw = image.hw or most_common_size(masks_rle)
    return ImageMasks(image.file_name, hw, tuple(masks_rle), tuple(unusable))


def _read_sample(source: Source, index: int) -> ImageMasks:
    sample = source[index]
    return ImageMasks(sample.name, image_hw(sample), sample.masks_rle, sample.unusable_masks)


def most_common_size(masks_rle: Any) -> tuple[int, int] | None:
    """The size of most masks, as far as it is one: what they are, they say themselves."""
    sizes = Counter(
        tuple(size)
        for size in (rle.get("size") for rle in masks_rle)
        if isinstance(size, (list, tuple)) and len(size) == 2 and all(type(s) is int for s in size)
    )
    if not sizes:
        return None
    ((height, width), _), *_ = sizes.most_common(1)
    return height, width
