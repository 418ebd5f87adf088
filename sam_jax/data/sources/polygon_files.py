"""JSON files of polygons that are not COCO's, in the forms of annotation tools and data sets."""

import posixpath
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal, TypeAlias

from sam_jax.data.sources import visible_files
from sam_jax.data.sources.json_form import (
    FormError,
    as_object,
    image_size,
    missing_or_wrong,
    parse,
    records,
    text,
    wrong,
)
from sam_jax.data.sources.listed_images import ListedImage, with_objects
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError

PolygonForm = Literal["via", "labelme", "visor", "woodscape"]

NO_POLYGON = "shapes that are no polygons"
SKIPPED_LABEL = "objects of skipped labels"

# An object: its place in the file, its label, and its polygons; None where it has another shape.
_Object: TypeAlias = tuple[str, str, list[Any] | None]
# An image without objects yet, and those of it.
_Entry: TypeAlias = tuple[ListedImage, list[_Object]]

_LABELME_POLYGONS = ("polygon", "", None)


def read_polygons(
    path: Path, form: PolygonForm, skip_labels: Collection[str] = ()
) -> tuple[list[ListedImage], Tally]:
    """The images in which there is a polygon, and what was left out of the files.

    Args:
      path: a JSON, or a folder (tree) of them.
      form: what wrote them. ``via``: a project or the annotations of the VGG Image Annotator.
        ``labelme``: a JSON for each picture, which it names from its own folder; shapes of one
        label and group are one object. ``visor``: a JSON for each video of EPIC-KITCHENS VISOR.
        ``woodscape``: a JSON for each picture, of WoodScape's instance annotations.
      skip_labels: labels of what is no object.

    Raises:
      OSError: a file cannot be read.
      ConfigError: there is no file, or one is not of the form; the message names the place, what
        stands there, and what should.
    """
    left_out = Tally()
    if path.is_dir():
        files = visible_files(path, (".json",), left_out)
        if not files:
            raise ConfigError(f"no JSON in {path}")
    else:
        files = [path]
    images: dict[str, ListedImage] = {}
    for file in files:
        below = file.relative_to(path) if path.is_dir() else PurePath(file.name)
        inside = below.as_posix() if path.is_dir() else ""
        try:
            for image, objects in _READERS[form](as_object(parse(file), "the file"), below):
                if image.file_name in images:
                    raise FormError(f"the image {image.file_name!r} stands in it, or before, twice")
                images[image.file_name] = image
                _add(image, objects, skip_labels, f"{inside}: " if inside else "", left_out)
        except FormError as error:
            raise ConfigError(f"{file} is not of the form {form!r}: {error}") from error
    return with_objects(images.values(), left_out), left_out


def _add(
    image: ListedImage,
    objects: list[_Object],
    skip_labels: Collection[str],
    prefix: str,
    left_out: Tally,
) -> None:
    for where, label, polygons in objects:
        if label in skip_labels:
            left_out.add(SKIPPED_LABEL, f"{prefix}{where} is {label!r}")
        elif polygons is None:
            left_out.add(NO_POLYGON, f"{prefix}{where}")
        else:
            image.segmentations.append((f"{prefix}{where}", [_flat(p) for p in polygons]))


def _flat(points: Any) -> Any:
    """The values [x, y, x, y, ...] of a list of points; anything else as it is, to be refused."""
    is_points = isinstance(points, list) and all(
        isinstance(point, list) and len(point) == 2 for point in points
    )
    return [value for point in points for value in point] if is_points else points


def _via(content: Mapping[str, Any], path: PurePath) -> Iterator[_Entry]:
    """Entries of a VIA file; a project has its annotations under a name of their own."""
    del path
    for key, record in content.get("_via_img_metadata", content).items():
        where = f"the entry {key!r}"
        name = text(as_object(record, where), "filename", where, "the name of a file")
        regions = record.get("regions")
        # Version 1 of VIA numbers them by names.
        regions = list(regions.values()) if isinstance(regions, dict) else regions
        if not isinstance(regions, list):
            raise missing_or_wrong(record, "regions", f"{where}.regions", "a list of objects")
        objects: list[_Object] = []
        for number, region in enumerate(regions):
            place = f"regions[{number}] of {name!r}"
            region = as_object(region, place)
            shape = as_object(region.get("shape_attributes"), f"{place}.shape_attributes")
            attributes = region.get("region_attributes")
            label = ", ".join(map(str, attributes.values())) if isinstance(attributes, dict) else ""
            xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
            if xs is None and ys is None:
                objects.append((place, label, None))
                continue
            if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
                raise wrong(place, shape, "as many values in all_points_x as in all_points_y")
            polygon = [list(point) for point in zip(xs, ys, strict=True)]
            objects.append((place, label, [polygon]))
        yield ListedImage(name, None, []), objects


def _labelme(content: Mapping[str, Any], path: PurePath) -> Iterator[_Entry]:
    """The entry of a LabelMe file, whose picture is named as it is stored beside the JSON."""
    name = text(content, "imagePath", "the file", "the name of a file")
    hw = image_size(content, "the file", name, ("imageHeight", "imageWidth"))
    objects: list[_Object] = []
    # Polygons of the objects that are drawn in several, as what is in front cuts them.
    groups: dict[tuple[str, str], list[Any]] = {}
    for number, shape in enumerate(records(content, "shapes")):
        where, label, group = f"shapes[{number}]", str(shape.get("label")), shape.get("group_id")
        if shape.get("shape_type") not in _LABELME_POLYGONS:
            objects.append((where, label, None))
            continue
        polygons = [] if group is None else groups.setdefault((label, str(group)), [])
        polygons.append(shape.get("points"))
        if len(polygons) == 1:
            objects.append((where, label, polygons))
    folder = path.parent.as_posix()
    if folder == ".":
        yield ListedImage(name, hw, []), objects
    else:
        yield ListedImage(posixpath.normpath(f"{folder}/{name}"), hw, [], (name,)), objects


def _visor(content: Mapping[str, Any], path: PurePath) -> Iterator[_Entry]:
    """Entries of a video of VISOR, whose frames lie in folders of participants and videos."""
    video = path.stem
    participant = video.split("_")[0]
    for number, record in enumerate(records(content, "video_annotations")):
        where = f"video_annotations[{number}]"
        image = as_object(record.get("image"), f"{where}.image")
        name = text(image, "name", f"{where}.image", "the name of a frame's file")
        objects: list[_Object] = []
        for place, entity in enumerate(records(record, "annotations", where)):
            segments = entity.get("segments")
            if not isinstance(segments, list):
                raise missing_or_wrong(
                    entity, "segments", f"{where}.annotations[{place}].segments", "polygons"
                )
            # Some are empty.
            polygons = [segment for segment in segments if segment] or None
            label = str(entity.get("name"))
            objects.append((f"{where}.annotations[{place}]", label, polygons))
        frame = f"{participant}/{video}/{name}"
        yield ListedImage(frame, None, [], (f"{video}/{name}", name)), objects


def _woodscape(content: Mapping[str, Any], path: PurePath) -> Iterator[_Entry]:
    """The entry of a WoodScape file, which stands under the file's own name."""
    record = as_object(content.get(path.name), repr(path.name), "what is marked in the picture")
    picture = f"{path.stem}.png"
    hw = image_size(record, path.name, picture, ("image_height", "image_width"))
    objects: list[_Object] = []
    for number, annotation in enumerate(records(record, "annotation", path.name)):
        where = f"annotation[{number}]"
        tags = annotation.get("tags")
        if not isinstance(tags, list):
            raise missing_or_wrong(annotation, "tags", f"{where}.tags", "a list of labels")
        label = ", ".join(map(str, tags))
        objects.append((where, label, [annotation.get("segmentation")]))
    yield ListedImage(picture, hw, []), objects


# Each takes what is in a file, and the file's path below the folder that was given.
_READERS: dict[str, Callable[[Mapping[str, Any], PurePath], Iterator[_Entry]]] = {
    "via": _via,
    "labelme": _labelme,
    "visor": _visor,
    "woodscape": _woodscape,
}
