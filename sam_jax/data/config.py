"""The data section of a config, checked: what to load and how."""

import dataclasses
import inspect
import types
from collections.abc import Mapping
from typing import Any, Literal, get_args

from sam_jax.buckets import is_url
from sam_jax.configuration import from_mapping
from sam_jax.data.crops import CropTransform
from sam_jax.data.label_encodings import Encoding
from sam_jax.data.sources import Source
from sam_jax.data.sources.coco import CocoSource, Crowd, VideoCocoSource
from sam_jax.data.sources.image_folders import ImageFoldersSource
from sam_jax.data.sources.images import ImagesSource
from sam_jax.data.sources.joined import JoinedSource
from sam_jax.data.sources.label_map_files import LabelMapsSource
from sam_jax.data.sources.mask_folder import MaskFolderSource
from sam_jax.data.sources.panoptic import PanopticSource, Stuff
from sam_jax.data.sources.polygon_files import PolygonForm
from sam_jax.data.sources.polygons import PolygonSource
from sam_jax.data.sources.sa1b import Sa1bSource
from sam_jax.data.sources.share import ShareSource
from sam_jax.data.sources.synthetic import SyntheticSource
from sam_jax.data.sources.tfds import TfdsImagesSource, TfdsSource
from sam_jax.data.transforms import TrainTransform
from sam_jax.errors import ConfigError
from sam_jax.images import Orientation

SourceKind = Literal[
    "synthetic",
    "coco",
    "video_coco",
    "polygons",
    "panoptic",
    "sa1b",
    "tfds",
    "images",
    "tfds_images",
    "mask_folder",
    "label_maps",
    "image_folders",
    "joined",
]

_CLASSES: dict[str, type] = {
    "synthetic": SyntheticSource,
    "coco": CocoSource,
    "video_coco": VideoCocoSource,
    "polygons": PolygonSource,
    "panoptic": PanopticSource,
    "sa1b": Sa1bSource,
    "tfds": TfdsSource,
    "images": ImagesSource,
    "tfds_images": TfdsImagesSource,
    "mask_folder": MaskFolderSource,
    "label_maps": LabelMapsSource,
    "image_folders": ImageFoldersSource,
    "joined": JoinedSource,
}

# Kinds that read buckets as they read disks, and the fields that may be URLs.
_IN_BUCKETS = ("sa1b", "images", "coco", "video_coco")
_LOCATIONS = ("path", "images", "masks")

# Metadata of a field that no config sets: the program takes it from the model.
OF_THE_MODEL = types.MappingProxyType({"of_the_model": True})

# What a field may say.
_CHOICES: dict[str, Any] = {
    "kind": SourceKind,
    "crowd": Crowd,
    "stuff": Stuff,
    "form": PolygonForm,
    "encoding": Encoding,
    "orientation": Orientation,
}


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One data set. Fields that are None keep the source's own default.

    Attributes:
      kind: which reader.
      path: coco, video_coco, panoptic: the annotation JSON. polygons: a JSON or a folder of them.
        sa1b, images: a tar, a folder or a glob. tfds, tfds_images: the prepared data set's version
        folder. mask_folder, label_maps: the folder of images. image_folders: the folder of their
        folders. sa1b, images, coco, video_coco: also a URL, s3://BUCKET/... or gs://BUCKET/...
      weight: how often to draw from this source, relative to the others; its size does not matter.
      share: the part of the images that is used, as an interval of [0, 1] after a shuffle that is
        always the same: (0.0, 0.8) to train on and (0.8, 1.0) to evaluate on have none in common.
        None for all.
      name: what samples say they come from; None means the kind.
      images: coco, video_coco, polygons, panoptic: the image folder. image_folders: the name of the
        folder with the picture.
      crowd: coco, video_coco, panoptic: "skip" leaves annotations with iscrowd out, "keep" takes
        them for objects.
      stuff: panoptic: "keep" takes regions of stuff for objects, "skip" leaves them out.
      form: polygons: what wrote the files: "via", "labelme", "visor" or "woodscape".
      skip_labels: polygons: labels of what is no object.
      masks: mask_folder, label_maps, panoptic: the folder of masks. image_folders: the name of the
        folder with the masks.
      background: mask_folder, label_maps: the label of what is no object; see there.
      ignore_labels: mask_folder, label_maps: labels that are neither object nor background, such as
        outlines.
      image_suffix: label_maps: the end of an image's name.
      mask_suffixes: label_maps: what takes its place in the names of its label maps.
      encoding: label_maps: "ade20k" or "cityscapes", where the files are theirs.
      components: label_maps: whether each connected piece of a label is an object of its own.
      include: label_maps: patterns of the images' paths.
      parts: joined: the sources that make it up, SourceConfigs or mappings of their fields; their
        names and weights are not read.
      split: tfds, tfds_images: which split, as in "train" or "train[:100]".
      cache_dir: sa1b, images: where tar indices are kept, on a disk; see
        `data.sources.tars.current_indices`.
      orientation: of all that reads files: which way up pictures are that EXIF turns, where the
        sizes of their masks do not tell: "upright" (the default) or "stored". Mask files likewise.
      num_images: synthetic: how many.
      image_size: synthetic: (h, w) in pixels.
      num_objects: synthetic: fewest and most objects in an image.
      radius_rates: synthetic: smallest and largest radius over the image's shorter side.
      seed: synthetic: which family of images.
    """

    kind: SourceKind
    path: str | None = None
    weight: float = 1.0
    share: tuple[float, float] | None = None
    name: str | None = None
    images: str | None = None
    crowd: Crowd | None = None
    stuff: Stuff | None = None
    form: PolygonForm | None = None
    skip_labels: tuple[str, ...] | None = None
    masks: str | None = None
    background: int | None = None
    ignore_labels: tuple[int, ...] | None = None
    image_suffix: str | None = None
    mask_suffixes: tuple[str, ...] | None = None
    encoding: Encoding | None = None
    components: bool | None = None
    include: tuple[str, ...] | None = None
    parts: tuple[Any, ...] | None = None
    split: str | None = None
    cache_dir: str | None = None
    orientation: Orientation | None = None
    num_images: int | None = None
    image_size: tuple[int, int] | None = None
    num_objects: tuple[int, int] | None = None
    radius_rates: tuple[float, float] | None = None
    seed: int | None = None

    def __post_init__(self):
        for field, known in _CHOICES.items():
            if getattr(self, field) not in (None, *get_args(known)):
                raise ValueError(
                    f"{field} must be one of {get_args(known)}: {getattr(self, field)!r}"
                )
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, got {self.weight}")
        if self.share is not None and not 0 <= self.share[0] < self.share[1] <= 1:
            raise ValueError(f"share must be 0 <= first < last <= 1, got {self.share}")
        if self.parts is not None:
            parts = tuple(
                part if isinstance(part, SourceConfig) else SourceConfig.from_dict(part)
                for part in self.parts
            )
            object.__setattr__(self, "parts", parts)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SourceConfig":
        """The config with these fields; errors as `configuration.from_mapping`."""
        return from_mapping(cls, values, "sources")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The input pipeline.

    Attributes:
      sources: what to draw from: a source first, by weight, then an image of it. SourceConfigs;
        they may be given as mappings of their fields.
      image_size: (H, W) of the model input, pixels; W a multiple of 8.
      batch_size: images per step over all processes.
      max_masks: p, masks per image.
      seed: order of the images, choice of masks, augmentation.
      num_threads: threads that read and decode, in each process that does. Decoding releases
        Python's lock only in part: beyond a few threads use workers.
      num_workers: worker processes; 0 decodes in this process. They are spawned: the program's own
        code must be under `if __name__ == "__main__"`.
      prefetch_examples: examples each decoding process keeps ready.
      prefetch_batches: batches kept ready.
      max_corrupt_rate: the tolerated fraction of unusable samples.
      corrupt_grace: samples to see before that fraction is judged; as many unusable ones in a row
        always stop the run.
      crop_area_rates: see `CropTransform`: examples are then images alone, for pre-training, and
        of what follows only flips and the decoding concern them. None for images with masks.
      max_area_rate: see `TrainTransform`, as for the rest.
      min_mask_area_px: as there.
      hflip_rate: as there.
      scale_jitter: as there.
      color_jitter: as there.
      reduced_decoding: as there.
      in_channels: as there; the program takes it from the model.
    """

    sources: tuple[Any, ...]
    image_size: tuple[int, int]
    batch_size: int
    max_masks: int = 64
    seed: int = 0
    num_threads: int = 4
    num_workers: int = 0
    prefetch_examples: int = 16
    prefetch_batches: int = 2
    max_corrupt_rate: float = 0.05
    corrupt_grace: int = 200
    crop_area_rates: tuple[float, float] | None = None
    max_area_rate: float = 0.9
    min_mask_area_px: int = 1
    hflip_rate: float = 0.0
    scale_jitter: tuple[float, float] | None = None
    color_jitter: float = 0.0
    reduced_decoding: bool = True
    in_channels: int | None = dataclasses.field(default=None, metadata=OF_THE_MODEL)

    def __post_init__(self):
        sources = tuple(
            source if isinstance(source, SourceConfig) else SourceConfig.from_dict(source)
            for source in self.sources
        )
        object.__setattr__(self, "sources", sources)
        if not sources:
            raise ValueError("sources is empty")
        if self.batch_size < 1 or self.corrupt_grace < 1:
            raise ValueError("batch_size and corrupt_grace must be at least 1")
        if self.num_threads < 0 or self.num_workers < 0 or self.prefetch_batches < 0:
            raise ValueError("thread, worker and prefetch counts cannot be negative")
        self.transform()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataConfig":
        """The config with these fields; errors as `configuration.from_mapping`."""
        return from_mapping(cls, values, "data")

    def transform(self) -> TrainTransform | CropTransform:
        """The transform these options describe.

        Raises:
          ValueError: they make no sense.
        """
        if self.crop_area_rates is not None:
            return CropTransform(
                image_size=self.image_size,
                crop_area_rates=self.crop_area_rates,
                hflip_rate=self.hflip_rate,
                reduced_decoding=self.reduced_decoding,
                in_channels=self.in_channels,
            )
        names = [field.name for field in dataclasses.fields(TrainTransform)]
        return TrainTransform(**{name: getattr(self, name) for name in names})


def build_source(config: SourceConfig, in_channels: int | None = None) -> Source:
    """The opened source.

    Args:
      config: what to open.
      in_channels: channels of the images that the model takes; None for 8-bit RGB.

    Raises:
      ConfigError: an option is given that this kind of source does not have, one it needs is
        missing, it has no other images than 8-bit RGB, or it does not read the bucket that a URL
        names.
    """
    cls = _CLASSES[config.kind]
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("kind", "weight", "share") and getattr(config, field.name) is not None
    }
    parameters = dict(inspect.signature(cls).parameters)
    takes_channels = parameters.pop("in_channels", None) is not None or config.kind == "joined"
    unknown = sorted(set(given) - set(parameters))
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in given
    ]
    if unknown or missing:
        raise ConfigError(
            f"a source of kind {config.kind!r} takes {list(parameters)}; "
            f"superfluous: {unknown}, missing: {missing}"
        )
    for field in _LOCATIONS:
        if config.kind not in _IN_BUCKETS and is_url(given.get(field)):
            raise ConfigError(
                f"{field} is {given[field]}, and kind {config.kind!r} reads disks only; "
                "copy it to one, or mount the bucket. Kinds that read buckets: "
                f"{', '.join(_IN_BUCKETS)}"
            )
    if in_channels is not None and not takes_channels:
        raise ConfigError(
            f"a source of kind {config.kind!r} has 8-bit RGB, and the model takes {in_channels} "
            "channels as they are stored (model.in_channels): take files of them, as with kind "
            "'mask_folder' or 'coco', or leave model.in_channels None"
        )
    if config.parts is not None:
        name = config.name or config.kind
        given["parts"] = [
            build_source(dataclasses.replace(part, name=name), in_channels) for part in config.parts
        ]
    elif in_channels is not None:
        given["in_channels"] = in_channels
    source: Source = cls(**given)
    return source if config.share is None else ShareSource(source, config.share)
