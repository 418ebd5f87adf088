"""A YouTube-VIS or OVIS file, read and checked: its frames with what is marked in each."""

from typing import Any

from sam_jax.buckets import DataPath
from sam_jax.data.sources.coco_file import CROWD, NO_SEGMENTATION
from sam_jax.data.sources.json_form import (
    FormError,
    Id,
    Ids,
    as_object,
    flag,
    identifier,
    image_size,
    missing_or_wrong,
    parse,
    records,
    wrong,
)
from sam_jax.data.sources.listed_images import ListedImage, with_objects
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError

OF_NO_VIDEO = "annotations of a video that is not in the file"


def read_video_coco(path: DataPath, keep_crowds: bool) -> tuple[list[ListedImage], Tally]:
    """The frames in which something is marked, and what was left out of the file.

    A video has `file_names` of its frames, and an annotation follows one object through it: its
    `segmentations` hold an RLE, polygons or null for each frame.

    Args:
      path: the JSON.
      keep_crowds: whether annotations with iscrowd are used like others.

    Raises:
      OSError: the file cannot be read.
      ConfigError: it is not of that form; the message names the place, what stands there, and what
        should.
    """
    try:
        return _read(parse(path), keep_crowds)
    except FormError as error:
        raise ConfigError(f"{path} is not a YouTube-VIS file: {error}") from error


def _read(content: Any, keep_crowds: bool) -> tuple[list[ListedImage], Tally]:
    content = as_object(content, "the file", "an object with videos and annotations")
    videos: dict[Id, list[ListedImage]] = {}
    ids = Ids("videos", "give each video an id of its own, as when files are merged")
    for number, video in enumerate(records(content, "videos")):
        where = f"videos[{number}]"
        names = video.get("file_names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise missing_or_wrong(video, "file_names", f"{where}.file_names", "names of files")
        hw = image_size(video, where, names[0] if names else "")
        video_id = ids.add(number, identifier(video, "id", where), f"{names[:1]}")
        videos[video_id] = [ListedImage(name, hw, []) for name in names]
    left_out = Tally()
    for number, annotation in enumerate(records(content, "annotations")):
        where = f"annotations[{number}]"
        video_id = identifier(annotation, "video_id", where)
        is_crowd = flag(annotation, "iscrowd", where)
        segmentations = annotation.get("segmentations")
        if video_id not in videos:
            left_out.add(OF_NO_VIDEO, f"{where} with video_id {video_id!r}")
        elif not segmentations:
            left_out.add(NO_SEGMENTATION, where)
        elif is_crowd and not keep_crowds:
            left_out.add(CROWD, where)
        else:
            _hand_out(segmentations, videos[video_id], f"{where}.segmentations")
    frames = [frame for video in videos.values() for frame in video]
    return with_objects(frames, left_out), left_out


def _hand_out(segmentations: Any, frames: list[ListedImage], where: str) -> None:
    """Gives each frame its part of an object's segmentations; null is where it is not seen."""
    if not isinstance(segmentations, list) or len(segmentations) != len(frames):
        found = (
            f"{len(segmentations)} of them" if isinstance(segmentations, list) else segmentations
        )
        raise wrong(where, found, f"one for each of the video's {len(frames)} frames")
    for number, (frame, segmentation) in enumerate(zip(frames, segmentations, strict=True)):
        if segmentation:
            frame.segmentations.append((f"{where}[{number}]", segmentation))
