"""Masks of a folder of pictures, automatic or from boxes; it goes on where it was stopped."""

import dataclasses
import errno
import hashlib
import itertools
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sam_jax import places
from sam_jax.errors import ConfigError
from sam_jax.files import data_files
from sam_jax.image_channels import (
    hint_of_arrays,
    image_suffixes,
    read_pixels,
)
from sam_jax.images import ImageError
from sam_jax.inference.automatic import AutomaticOptions
from sam_jax.inference.box_masks import BoxOptions
from sam_jax.inference.detections import Name
from sam_jax.inference.folder_extras import (
    ANNOTATIONS_FOLDER,
    LABELS_FOLDER,
    OVERLAYS_FOLDER,
    Extras,
    is_there,
)
from sam_jax.inference.picture_boxes import PictureBoxes
from sam_jax.inference.picture_masks import Picture, picture_masks
from sam_jax.inference.predictor import Predictor
from sam_jax.weights.files import WeightsError, written_whole

_log = logging.getLogger(__name__)
SETTINGS_NAME = "settings.json"
SKIPPED_NAME = "skipped.txt"
COCO_NAME = "coco.json"
# What automatic masks are masks of, in COCO's form.
_OBJECT: Mapping[str, Any] = {"id": 1, "name": "object", "supercategory": "object"}
# Pictures that are read ahead of the model.
_READ_AHEAD = 2
# Bytes at a file's start in which its image is named: a path has up to 4,096, and in JSON up to six
# letters for each.
_HEAD_BYTES = 32_768
# Errors about the name of one file; all others would happen to the next picture, too.
_OF_THE_NAME = (
    errno.ENAMETOOLONG,
    errno.EILSEQ,
    errno.EINVAL,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
)


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress through the pictures of a folder.

    Attributes:
      done: pictures that are finished, also by earlier calls, or skipped.
      total: pictures in the folder.
      path: the last one.
      num_masks: that it has; None if it was skipped.
    """

    done: int
    total: int
    path: Path
    num_masks: int | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """Outcome of annotating a folder: numbers of pictures and masks, and what was skipped.

    Attributes:
      num_annotated: pictures that were searched.
      num_before: pictures whose masks were there before.
      num_completed: of those, how many got overlays, label maps or links that they lacked.
      num_masks: of the pictures that were searched.
      skipped: pictures that were not, each with the reason.
    """

    num_annotated: int
    num_before: int
    num_completed: int
    num_masks: int
    skipped: Sequence[str]


def list_pictures(source: Path, in_channels: int | None = None) -> list[Path]:
    """A picture file itself, or all those below a folder, as `data_files` has them.

    Args:
      source: the file or the folder.
      in_channels: of the model, whose images may be ``.npy`` if it is not None.

    Raises:
      ConfigError: if there is none, or two differ in their suffix alone.
      OSError: if a folder cannot be read.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ConfigError(f"{source} does not exist")
    suffixes = image_suffixes(in_channels)
    found, hidden = data_files(source, suffixes)
    if not found:
        hint = hint_of_arrays(source, in_channels)
        but = f", but {len(hidden)} hidden files such as {hidden[0]}" if hidden else ""
        raise ConfigError(f"{source} holds no picture ({', '.join(suffixes)}){but}{hint}")
    if hidden:
        _log.warning("%s: %d hidden files left out, e.g. %s", source, len(hidden), hidden[0])
    by_stem: dict[Path, Path] = {}
    for path in found:
        other = by_stem.setdefault(path.with_suffix(""), path)
        if other is not path:
            raise ConfigError(f"{other} and {path} would share one annotation file; rename one")
    return found


def check_target(source: Path, target: Path) -> None:
    """Finds out whether masks can be written to a folder; leaves nothing behind.

    Raises:
      ConfigError: if it lies among the pictures, or they among what is written.
      PlaceError: if it cannot be written to.
    """
    _check_apart(source, source if source.is_dir() else source.parent, target)
    for name in ("", ANNOTATIONS_FOLDER, OVERLAYS_FOLDER, LABELS_FOLDER):
        places.check_folder(target / name)


def annotate_folder(
    predictor: Predictor,
    source: Path,
    target: Path,
    options: AutomaticOptions | BoxOptions | None = None,
    *,
    boxes: PictureBoxes | None = None,
    coco: bool = False,
    overlays: bool = True,
    label_maps: bool = False,
    link_pictures: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Writes the masks of all pictures in the form of SA-1B's annotations, one file per picture.

    A picture whose file is there is not searched again, so a call that was stopped is finished by
    the same call; an overlay, a label map or a link that it lacks is made from its file. Pictures
    that cannot be read are skipped and named in ``skipped.txt``; the next call tries them again.
    ``settings.json`` keeps how the masks were made.

    Args:
      predictor: of the model.
      source: a picture, or a folder, sub-folders included.
      target: a folder outside of ``source``. Files in its ``annotations`` are named like the
        pictures.
      options: how to search; with ``boxes``, BoxOptions.
      boxes: masks are made of these boxes, one each, in place of everything in a picture. Label
        and score of each box stand beside its mask.
      coco: writes ``coco.json`` in COCO's form as well, of all pictures.
      overlays: writes pictures of the masks in ``overlays``.
      label_maps: writes maps without overlaps in ``labels``, see ``candidates.label_map``, as PNGs
        of 16 bits.
      link_pictures: links the pictures beside their annotations, which makes ``annotations`` a
        folder to train on. Masks are of upright pictures: of those that are stored turned, as
        their EXIF says, an upright copy is written, see
        ``sam_jax.images.upright_copy``.
      on_progress: called after each picture.

    Raises:
      ConfigError: if there is no picture, the target lies among them, or it holds masks that were
        made otherwise, or of another picture under the same name.
    """
    masks = picture_masks(options, boxes)
    pictures = list_pictures(source, predictor.in_channels)
    root = source if source.is_dir() else source.parent
    check_target(source, target)
    _check_endings(pictures if link_pictures else [], image_suffixes(predictor.in_channels))
    made_by = {"weights": predictor.fingerprint(), "source": str(root.resolve())}
    _keep_settings(target, {**made_by, **masks.settings()})
    files = {
        path: (target / ANNOTATIONS_FOLDER / path.relative_to(root)).with_suffix(".json")
        for path in pictures
    }
    before, left, skipped = _sorted_out(files, root)
    num_before, num_masks, num_annotated = len(before), 0, 0
    extras = Extras(target, overlays, label_maps, link_pictures, predictor.in_channels)
    num_completed = _complete(extras, before, root, skipped)
    opened = deque[tuple[Path, np.ndarray]]()

    def report(path: Path, count: int | None) -> None:
        done = num_before + num_annotated + len(skipped)
        on_progress(Progress(done, len(pictures), path, count))

    def readable() -> Iterator[Picture]:
        for path, pixels in _read_ahead(left, predictor.in_channels):
            if isinstance(pixels, ImageError):
                skipped.append(str(pixels))
                report(path, None)
                continue
            opened.append((path, pixels))
            yield path, pixels

    try:
        for records in masks.records(predictor, readable()):
            path, pixels = opened.popleft()
            relative = path.relative_to(root)
            try:
                annotation = sa1b_annotation(records, relative, pixels.shape[:2])
                extras.put(extras.wanted, path, relative, annotation, pixels)
                # Last, since this is the file that says that the picture is done.
                _write_json(files[path], annotation)
            except (ImageError, WeightsError, OSError) as error:
                if not _is_of_one_picture(error):
                    raise
                skipped.append(f"{path}: {error}")
                report(path, None)
                continue
            num_masks, num_annotated = num_masks + len(records), num_annotated + 1
            report(path, len(records))
    finally:
        skipped += masks.missing
        _write_skipped(target / SKIPPED_NAME, skipped)
    if coco:
        done = [files[path] for path in pictures if is_there(files[path])]
        write_coco(done, target / COCO_NAME, masks.categories)
    return Summary(num_annotated, num_before, num_completed, num_masks, skipped)


def _complete(extras: Extras, files: Mapping[Path, Path], root: Path, skipped: list[str]) -> int:
    """Makes what annotated pictures lack, and counts those; names in ``skipped`` what cannot be."""
    num_completed = 0
    for path, file in files.items():
        relative = path.relative_to(root)
        if not (folders := extras.missing(relative)):
            continue
        try:
            is_seen = OVERLAYS_FOLDER in folders
            pixels = read_pixels(path, extras.in_channels) if is_seen else None
            extras.put(folders, path, relative, _read_json(file), pixels)
        except (ImageError, OSError) as error:
            if not _is_of_one_picture(error):
                raise
            skipped.append(f"{path}: {error}")
            continue
        num_completed += 1
    return num_completed


def _sorted_out(
    files: Mapping[Path, Path], root: Path
) -> tuple[dict[Path, Path], list[Path], list[str]]:
    """Pictures that are done, with their files; those that are not; why others cannot be."""
    done, left, skipped = {}, [], []
    for path, file in files.items():
        try:
            if _is_done(file, path.relative_to(root)):
                done[path] = file
            else:
                _check_not_of_another(file, path, root)
                left.append(path)
        except OSError as error:
            skipped.append(f"{path}: its masks cannot be in {file}: {error.strerror}")
    return done, left, skipped


def _is_of_one_picture(error: Exception) -> bool:
    """True if an error is of one picture alone, and would not come back with the next one."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return not isinstance(cause, OSError) or cause.errno in _OF_THE_NAME


def sa1b_annotation(
    records: Sequence[Mapping[str, Any]], path: Path, size: tuple[int, ...]
) -> dict[str, Any]:
    """Contents of an image's annotation file in SA-1B's form.

    Ids of masks are unique among those of their image, whose own follows from its name.

    Args:
      records: with COCO's compressed run lengths.
      path: what to call the image.
      size: its height and width.
    """
    height, width = size
    name = path.as_posix()
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    # 53 bits, which every reader of JSON takes for the number that it is.
    image_id = int.from_bytes(digest) >> 11
    return {
        "image": {"file_name": name, "image_id": image_id, "width": width, "height": height},
        "annotations": [{"id": number, **record} for number, record in enumerate(records)],
    }


def write_coco(
    annotation_files: Sequence[Path],
    target: Path,
    categories: Mapping[Name, Mapping[str, Any]] | None = None,
) -> None:
    """Puts SA-1B's annotation files together in one of COCO, the masks of one at a time in memory.

    Images and masks are numbered anew, from 1. Boxes are COCO's: a mask one pixel wide has width 1,
    where SA-1B says 0.

    Args:
      annotation_files: by image.
      target: the file to write.
      categories: COCO's, by the ``label`` of a mask or, where it has none, its ``category_id``. By
        default all masks are of one category, "object".

    Raises:
      ConfigError: if a file is damaged, or has a label that is none of the categories.
    """
    listed = list((categories or {0: _OBJECT}).values())
    with written_whole(target) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.write('{"info": {"description": "masks by sam_jax"}, "licenses": [],\n')
        file.write(f'"categories": {json.dumps(listed)},\n')
        annotation_ids, images, separator = itertools.count(1), [], "\n"
        file.write('"annotations": [')
        for image_id, source in enumerate(annotation_files, start=1):
            content = _read_json(source)
            images.append(json.dumps(_coco_image(content, image_id), allow_nan=False))
            for entry in _coco_annotations(content, source, image_id, annotation_ids, categories):
                file.write(separator + json.dumps(entry, allow_nan=False))
                separator = ",\n"
        file.write('\n],\n"images": [\n' + ",\n".join(images) + "\n]}\n")


def _read_ahead(paths: Sequence[Path], in_channels: int | None) -> Iterator[tuple[Path, Any]]:
    """Pictures in their order, or the error in place of one; the next are read meanwhile."""

    def read(path: Path) -> Any:
        try:
            return read_pixels(path, in_channels)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        waiting = deque((path, pool.submit(read, path)) for path in paths[:_READ_AHEAD])
        following = iter(paths[_READ_AHEAD:])
        while waiting:
            path, pixels = waiting.popleft()
            yield path, pixels.result()
            if (next_path := next(following, None)) is not None:
                waiting.append((next_path, pool.submit(read, next_path)))


def _check_apart(source: Path, root: Path, target: Path) -> None:
    """Refuses to write where pictures are read."""
    root, target = root.resolve(), target.resolve()
    if source.is_dir() and target.is_relative_to(root):
        raise ConfigError(f"{target} lies in {root}, whose pictures are read: give another folder")
    for name in (ANNOTATIONS_FOLDER, OVERLAYS_FOLDER, LABELS_FOLDER):
        if root.is_relative_to(target / name):
            raise ConfigError(
                f"{root}, whose pictures are read, lies in {target / name}, which is written to: "
                "give another folder"
            )


def _check_endings(pictures: Sequence[Path], suffixes: Sequence[str]) -> None:
    """Refuses pictures that would not be found beside their masks."""
    for picture in pictures:
        if picture.suffix.lower() not in suffixes:
            raise ConfigError(
                f"{picture} has no picture's ending: beside its masks nobody would find it; rename "
                f"it ({', '.join(suffixes)}), or leave link_pictures out"
            )


def _is_done(file: Path, relative: Path) -> bool:
    """True if a file is there, complete, and of this picture, not of one with another suffix."""
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD_BYTES)
            opened.seek(max(opened.seek(0, os.SEEK_END) - 4, 0))
            end = opened.read()
    except FileNotFoundError:
        return False
    name = json.dumps({"file_name": relative.as_posix()})[1:-1].encode()
    return name in head and end.endswith(b"]}\n")


def _check_not_of_another(file: Path, path: Path, root: Path) -> None:
    """Refuses to replace the masks of another picture, which is there with another ending."""
    try:
        name = json.loads(file.read_text(encoding="utf-8"))["image"]["file_name"]
        other = root / name
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return  # cut off, or nobody's: it is written anew
    if other != path and is_there(other):
        raise ConfigError(
            f"{file} has the masks of {other}, which those of {path} would replace: rename one, or "
            "give another folder"
        )


def _keep_settings(target: Path, settings: dict[str, Any]) -> None:
    """Writes how masks are made; refuses if those that are there were made otherwise."""
    path = target / SETTINGS_NAME
    # These say how much is done at once, which changes no mask.
    chosen = {
        name: value
        for name, value in settings.items()
        if name not in ("points_per_batch", "regions_per_batch", "host_memory_mib")
    }
    if path.exists():
        before = _read_json(path)
        changed = [
            f"{name} was {before.get(name)!r}, is {value!r}"
            for name, value in chosen.items()
            if before.get(name) != value
        ]
        if changed:
            raise ConfigError(
                f"{target} holds masks that were made otherwise ({'; '.join(changed)}): give "
                "another folder, or the same options"
            )
        return
    _write_json(path, chosen)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged; remove it and go on")
    return content


def _write_json(path: Path, content: Any) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def _write_skipped(path: Path, skipped: Sequence[str]) -> None:
    if skipped:
        with written_whole(path) as unfinished:
            text = "\n".join(skipped) + "\n"
            unfinished.write_bytes(text.encode("utf-8", errors="backslashreplace"))
    else:
        path.unlink(missing_ok=True)


def _coco_image(content: Mapping[str, Any], image_id: int) -> dict[str, Any]:
    image = {key: content["image"][key] for key in ("file_name", "width", "height")}
    return {"id": image_id, **image}


def _coco_annotations(
    content: Mapping[str, Any],
    source: Path,
    image_id: int,
    ids: Iterator[int],
    categories: Mapping[Name, Mapping[str, Any]] | None,
) -> list[dict[str, Any]]:
    annotations = []
    for annotation in content["annotations"]:
        category = _OBJECT
        if categories:
            name = annotation.get("label", annotation.get("category_id"))
            if name not in categories:
                raise ConfigError(
                    f"{source}: a mask's label is {name!r}; expected one of "
                    f"{', '.join(map(repr, list(categories)[:8]))}; remove the file and go on"
                )
            category = categories[name]
        x, y, width, height = annotation["bbox"]
        is_empty = not annotation["area"]
        annotations.append(
            {
                **annotation,
                "id": next(ids),
                "image_id": image_id,
                "category_id": category["id"],
                "iscrowd": 0,
                "bbox": [x, y, 0, 0] if is_empty else [x, y, width + 1, height + 1],
            }
        )
    return annotations
