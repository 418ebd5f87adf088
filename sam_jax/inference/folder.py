"""Automatic masks of a folder of pictures, which goes on where it was stopped."""

import dataclasses
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sam_jax.arrays import UInt8
from sam_jax.convert.files import written_whole
from sam_jax.data import rle
from sam_jax.errors import ConfigError
from sam_jax.inference.automatic import AutomaticOptions, generate_masks_of_many
from sam_jax.inference.candidates import label_map
from sam_jax.inference.images import ImageError, open_image
from sam_jax.inference.predictor import Predictor
from sam_jax.visualize import overlay_masks, save_picture

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ANNOTATIONS_FOLDER = "annotations"
OVERLAYS_FOLDER = "overlays"
LABELS_FOLDER = "labels"
SETTINGS_NAME = "settings.json"
SKIPPED_NAME = "skipped.txt"
COCO_NAME = "coco.json"
# Ids of an image's masks start at its own id times this.
ANNOTATION_IDS_PER_IMAGE = 100_000
# Overlays are pictures to look at: a larger image is shown at this size.
_OVERLAY_SIDE_PX = 1600
# Pictures that are read ahead of the model.
_READ_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a folder is.

    Attributes:
      done: pictures that are finished, also by earlier calls, or skipped.
      total: pictures in the folder.
      path: the last one.
      num_masks: that it has.
    """

    done: int
    total: int
    path: Path
    num_masks: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What became of a folder's pictures."""

    num_annotated: int
    num_before: int
    num_masks: int
    skipped: Sequence[str]


def list_pictures(source: Path) -> list[Path]:
    """A picture file itself, or all those below a folder, sorted.

    Raises:
      ConfigError: if there is none, or two differ in their suffix alone.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ConfigError(f"{source} does not exist")
    found = [
        Path(folder) / name
        for folder, _, names in os.walk(source)
        for name in names
        if name.lower().endswith(PICTURE_SUFFIXES)
    ]
    if not found:
        raise ConfigError(f"{source} holds no picture ({', '.join(PICTURE_SUFFIXES)})")
    found.sort()
    by_stem: dict[Path, Path] = {}
    for path in found:
        other = by_stem.setdefault(path.with_suffix(""), path)
        if other is not path:
            raise ConfigError(f"{other} and {path} would share one annotation file; rename one")
    return found


def annotate_folder(
    predictor: Predictor,
    source: Path,
    target: Path,
    options: AutomaticOptions | None = None,
    *,
    checkpoint: str = "",
    coco: bool = False,
    overlays: bool = True,
    label_maps: bool = False,
    link_pictures: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Writes all masks of all pictures in the form of SA-1B's annotations, one file per picture.

    A picture whose file is there is not looked at again, so a call that was stopped is finished by
    the same call. Pictures that cannot be read are skipped and named in ``skipped.txt``; the next
    call tries them again. ``settings.json`` keeps how the masks were made.

    Args:
      predictor: of the model.
      source: a picture, or a folder, sub-folders included.
      target: a folder outside of ``source``. Files in its ``annotations`` are named like the
        pictures.
      options: how to search.
      checkpoint: what the predictor was loaded from, for ``settings.json``.
      coco: writes ``coco.json`` in COCO's form as well, of all pictures.
      overlays: writes pictures of the masks in ``overlays``.
      label_maps: writes maps without overlaps in ``labels``, see ``candidates.label_map``, as PNGs
        of 16 bits.
      link_pictures: links the pictures beside their annotations, which makes ``annotations`` a
        folder to train on.
      on_progress: called after each picture.

    Raises:
      ConfigError: if there is no picture, the target lies among them, or it holds masks that were
        made otherwise.
    """
    options = options or AutomaticOptions()
    pictures = list_pictures(source)
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(
            f"{target} lies in {source}, whose pictures are read: give another folder"
        )
    root = source if source.is_dir() else source.parent
    _keep_settings(target, {"checkpoint": checkpoint, **dataclasses.asdict(options)})
    files = {
        path: (target / ANNOTATIONS_FOLDER / path.relative_to(root)).with_suffix(".json")
        for path in pictures
    }
    ids = {path: number for number, path in enumerate(pictures, start=1)}
    left = [path for path in pictures if not files[path].exists()]
    num_before = done = len(pictures) - len(left)
    num_masks, skipped, opened = 0, [], deque[tuple[Path, np.ndarray]]()

    def readable() -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        for path, pixels in _read_ahead(left):
            if isinstance(pixels, ImageError):
                skipped.append(str(pixels))
                continue
            opened.append((path, pixels))
            yield pixels

    for records in generate_masks_of_many(predictor, readable(), options):
        path, pixels = opened.popleft()
        relative = path.relative_to(root)
        if overlays:
            drawn = (target / OVERLAYS_FOLDER / relative).with_suffix(".png")
            save_picture(drawn, overlay_of(pixels, records))
        if label_maps:
            labels = label_map(records, pixels.shape[:2]).astype(np.uint16)
            save_picture((target / LABELS_FOLDER / relative).with_suffix(".png"), labels)
        if link_pictures:
            _link(path, target / ANNOTATIONS_FOLDER / relative)
        # Last, since this is the file that says that the picture is done.
        _write_json(files[path], sa1b_annotation(records, relative, ids[path], pixels.shape[:2]))
        done, num_masks = done + 1, num_masks + len(records)
        on_progress(Progress(done + len(skipped), len(pictures), path, len(records)))
    _write_skipped(target / SKIPPED_NAME, skipped)
    if coco:
        annotated = [path for path in pictures if files[path].exists()]
        write_coco([files[path] for path in annotated], target / COCO_NAME)
    return Summary(len(left) - len(skipped), num_before, num_masks, skipped)


def sa1b_annotation(
    records: Sequence[Mapping[str, Any]], path: Path, image_id: int, size: tuple[int, int]
) -> dict[str, Any]:
    """What SA-1B's annotation file of an image holds.

    Args:
      records: with COCO's compressed run lengths.
      path: what to call the image.
      image_id: its number; ids of masks are ``image_id * 100_000`` and on.
      size: its height and width.
    """
    height, width = size
    first = image_id * ANNOTATION_IDS_PER_IMAGE
    return {
        "image": {
            "image_id": image_id,
            "width": width,
            "height": height,
            "file_name": path.as_posix(),
        },
        "annotations": [
            {"id": number, **record} for number, record in enumerate(records, start=first)
        ],
    }


def write_coco(annotation_files: Sequence[Path], target: Path) -> None:
    """Puts SA-1B's annotation files together in one of COCO, never more than one in memory.

    All masks are of one category, "object". Boxes are COCO's: a mask one pixel wide has width 1,
    where SA-1B says 0.
    """
    with written_whole(target) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.write('{"info": {"description": "automatic masks"}, "licenses": [],\n')
        file.write('"categories": [{"id": 1, "name": "object", "supercategory": "object"}],\n')
        for key, entries in (("images", _coco_images), ("annotations", _coco_annotations)):
            file.write(f'"{key}": [')
            separator = "\n"
            for source in annotation_files:
                content = json.loads(source.read_text(encoding="utf-8"))
                for entry in entries(content):
                    file.write(separator + json.dumps(entry))
                    separator = ",\n"
            file.write("\n]" + (",\n" if key == "images" else "}\n"))


def overlay_of(
    pixels: UInt8[np.ndarray, "h w 3"], records: Sequence[Mapping[str, Any]]
) -> UInt8[np.ndarray, "oh ow 3"]:
    """The picture under its masks, reduced if it is large."""
    from sam_jax.data.transforms import resize_image

    height, width = pixels.shape[:2]
    scale = min(1.0, _OVERLAY_SIDE_PX / max(height, width))
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    edges = [
        np.linspace(0, side, count + 1) for side, count in ((height, size[0]), (width, size[1]))
    ]
    masks = np.zeros((len(records), *size), bool)
    for mask, record in zip(masks, records, strict=True):
        mask[:] = rle.resample(rle.run_lengths(record["segmentation"]), (height, width), *edges)
    return overlay_masks(pixels if scale == 1.0 else resize_image(pixels, size), masks)


def _read_ahead(paths: Sequence[Path]) -> Iterator[tuple[Path, Any]]:
    """Pictures in their order, or the error in place of one; the next are read meanwhile."""

    def read(path: Path) -> Any:
        try:
            return open_image(path)
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


def _link(path: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(path.resolve())


def _keep_settings(target: Path, settings: dict[str, Any]) -> None:
    """Writes how masks are made; refuses if those that are there were made otherwise."""
    path = target / SETTINGS_NAME
    # How much is done at once changes no mask.
    chosen = {
        name: value
        for name, value in settings.items()
        if name not in ("points_per_batch", "regions_per_batch", "host_memory_mib")
    }
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError):
            raise ConfigError(
                f"{path} is damaged; remove it to go on with these settings"
            ) from None
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


def _write_json(path: Path, content: Any) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _write_skipped(path: Path, skipped: Sequence[str]) -> None:
    if skipped:
        with written_whole(path) as unfinished:
            unfinished.write_text("\n".join(skipped) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def _coco_images(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    image = dict(content["image"])
    yield {"id": image.pop("image_id"), **image}


def _coco_annotations(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        yield {
            **annotation,
            "image_id": content["image"]["image_id"],
            "category_id": 1,
            "iscrowd": 0,
            "bbox": [x, y, width + 1, height + 1],
        }
