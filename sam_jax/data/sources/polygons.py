"""Annotations in JSON files of polygons that are not COCO's."""

from collections.abc import Sequence
from pathlib import Path

from sam_jax.data.sources.listed_images import ListedImagesSource
from sam_jax.data.sources.polygon_files import PolygonForm, read_polygons
from sam_jax.images import Orientation


class PolygonSource(ListedImagesSource):
    """Images of VIA, LabelMe, VISOR or WoodScape files with the polygons of each object.

    Polygons are rasterised as COCO's are; several of one object are united. Images without a
    polygon in use are left out.

    Args:
      path: a JSON, or a folder (tree) of them.
      form: what wrote them; see `polygon_files.read_polygons`.
      images: the folder of the images; None means `images` beside the JSON or the folder of them.
      name: what `Sample.dataset` says.
      skip_labels: labels of what is no object, such as "void".
      orientation: see `Sample`.
      in_channels: see `Sample`.

    Raises:
      FileNotFoundError: the JSON or the folder does not exist.
      ConfigError: a file is not of the form, there is no usable image, or a name of an image may
        mean several files.
    """

    def __init__(
        self,
        path: str | Path,
        form: PolygonForm,
        images: str | Path | None = None,
        name: str = "polygons",
        skip_labels: Sequence[str] = (),
        orientation: Orientation = "upright",
        in_channels: int | None = None,
    ):
        path = Path(path)
        found, left_out = read_polygons(path, form, frozenset(skip_labels))
        super().__init__(
            found,
            left_out,
            path=path,
            folder=Path(images) if images is not None else path.parent / "images",
            name=name,
            orientation=orientation,
            in_channels=in_channels,
        )
