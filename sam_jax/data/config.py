"""The data section of a config, checked: what to load and how."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args

from sam_jax.configuration import from_mapping
from sam_jax.data.sources import Source
from sam_jax.data.sources.coco import CocoSource, Crowd
from sam_jax.data.sources.mask_folder import MaskFolderSource
from sam_jax.data.sources.sa1b import Sa1bSource
from sam_jax.data.sources.synthetic import SyntheticSource
from sam_jax.data.sources.tfds import TfdsSource
from sam_jax.data.transforms import TrainTransform
from sam_jax.errors import ConfigError
from sam_jax.images import Orientation

SourceKind = Literal["synthetic", "coco", "sa1b", "tfds", "mask_folder"]

_CLASSES: dict[str, type] = {
    "synthetic": SyntheticSource,
    "coco": CocoSource,
    "sa1b": Sa1bSource,
    "tfds": TfdsSource,
    "mask_folder": MaskFolderSource,
}


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One data set. Fields that are None keep the source's own default.

    Attributes:
      kind: which reader.
      path: coco: the annotation JSON. sa1b: a tar, a folder or a glob. tfds: the prepared data
        set's version folder. mask_folder: the folder of images.
      weight: how often to draw from this source, relative to the others; its size does not matter.
      name: what samples say they come from; None means the kind.
      images: coco: the image folder.
      crowd: coco: "skip" leaves annotations with iscrowd out, "keep" takes them for objects.
      masks: mask_folder: the folder of masks.
      background: mask_folder: the label of what is no object; see there.
      ignore_labels: mask_folder: labels that are neither object nor background, such as outlines.
      split: tfds: which split, as in "train" or "train[:100]".
      cache_dir: sa1b: where tar indices are kept.
      orientation: coco, sa1b, tfds, mask_folder: which way up pictures are that EXIF turns, where
        the sizes of their masks do not tell: "upright" (the default) or "stored". Mask files
        likewise.
      num_images: synthetic: how many.
      image_size: synthetic: (h, w) in pixels.
      num_objects: synthetic: fewest and most objects in an image.
      radius_rates: synthetic: smallest and largest radius over the image's shorter side.
      seed: synthetic: which family of images.
    """

    kind: SourceKind
    path: str | None = None
    weight: float = 1.0
    name: str | None = None
    images: str | None = None
    crowd: Crowd | None = None
    masks: str | None = None
    background: int | None = None
    ignore_labels: tuple[int, ...] | None = None
    split: str | None = None
    cache_dir: str | None = None
    orientation: Orientation | None = None
    num_images: int | None = None
    image_size: tuple[int, int] | None = None
    num_objects: tuple[int, int] | None = None
    radius_rates: tuple[float, float] | None = None
    seed: int | None = None

    def __post_init__(self):
        if self.crowd is not None and self.crowd not in get_args(Crowd):
            raise ValueError(f"crowd must be one of {get_args(Crowd)}: {self.crowd!r}")
        if self.kind not in get_args(SourceKind):
            raise ValueError(f"kind must be one of {get_args(SourceKind)}: {self.kind}")
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, got {self.weight}")
        if self.orientation not in (None, *get_args(Orientation)):
            raise ValueError(
                f"orientation must be one of {get_args(Orientation)}: {self.orientation!r}"
            )

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
      max_area_rate: see `TrainTransform`, as for the rest.
      min_mask_area_px: as there.
      hflip_rate: as there.
      scale_jitter: as there.
      color_jitter: as there.
      reduced_decoding: as there.
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
    max_area_rate: float = 0.9
    min_mask_area_px: int = 1
    hflip_rate: float = 0.0
    scale_jitter: tuple[float, float] | None = None
    color_jitter: float = 0.0
    reduced_decoding: bool = True

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

    def transform(self) -> TrainTransform:
        """The transform these options describe.

        Raises:
          ValueError: they make no sense.
        """
        names = [field.name for field in dataclasses.fields(TrainTransform)]
        return TrainTransform(**{name: getattr(self, name) for name in names})


def build_source(config: SourceConfig) -> Source:
    """The opened source.

    Raises:
      ConfigError: an option is given that this kind of source does not have, or one it needs is
        missing.
    """
    cls = _CLASSES[config.kind]
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("kind", "weight") and getattr(config, field.name) is not None
    }
    parameters = inspect.signature(cls).parameters
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
    return cls(**given)
