"""Annotations in COCO's instance format, and LVIS's: one JSON, a folder of images."""

from typing import Literal, get_args

from sam_jax.buckets import DataPath, data_path
from sam_jax.data.sources.coco_file import CROWD, read_coco
from sam_jax.data.sources.listed_images import ListedImagesSource
from sam_jax.data.sources.video_coco_file import read_video_coco
from sam_jax.errors import ConfigError
from sam_jax.images import Orientation

Crowd = Literal["skip", "keep"]

_KEEP_CROWDS = '; crowd="keep" takes annotations with iscrowd for objects'


class CocoSource(ListedImagesSource):
    """Images of a COCO instance file with their polygons or RLEs.

    Images without an annotation in use are left out. Classes are not read. `docs/annotations.md`
    has the whole of what is used and what is not.

    Args:
      path: the JSON, on a disk or in a bucket.
      images: the folder of the images, likewise; None means `images` beside the JSON. A file_name
        may repeat the folder's own name.
      name: what `Sample.dataset` says.
      crowd: what becomes of annotations with iscrowd: COCO means groups by it, which are no
        objects, and CVAT all that was painted with a brush. "skip" leaves them out, "keep" takes
        them as objects.
      orientation: see `Sample`.
      in_channels: see `Sample`.

    Raises:
      FileNotFoundError: the JSON or the folder does not exist.
      ConfigError: the JSON is not in COCO form, holds no usable image, or a file_name may mean
        several files.
    """

    _read = staticmethod(read_coco)

    def __init__(
        self,
        path: str | DataPath,
        images: str | DataPath | None = None,
        name: str = "coco",
        crowd: Crowd = "skip",
        orientation: Orientation = "upright",
        in_channels: int | None = None,
    ):
        if crowd not in get_args(Crowd):
            raise ConfigError(f"crowd is {crowd!r}; expected one of {get_args(Crowd)}")
        path = data_path(path)
        folder = data_path(images) if images is not None else path.parent / "images"
        if not folder.is_dir():
            # Said before the file is read, which may take a minute.
            raise FileNotFoundError(f"no image folder {folder}; say where with images=")
        found, left_out = self._read(path, crowd == "keep")
        super().__init__(
            found,
            left_out,
            path=path,
            folder=folder,
            name=name,
            orientation=orientation,
            in_channels=in_channels,
            advice=_KEEP_CROWDS if left_out.counts[CROWD] else "",
        )


class VideoCocoSource(CocoSource):
    """Frames of a YouTube-VIS or OVIS file, each with the RLEs or polygons of what is in it.

    Frames in which nothing is marked are left out; otherwise as `CocoSource`.
    """

    _read = staticmethod(read_video_coco)

    def __init__(
        self,
        path: str | DataPath,
        images: str | DataPath | None = None,
        name: str = "video_coco",
        crowd: Crowd = "skip",
        orientation: Orientation = "upright",
        in_channels: int | None = None,
    ):
        super().__init__(path, images, name, crowd, orientation, in_channels)
