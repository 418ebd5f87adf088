"""Everything in an image: a grid of points is prompted, and the good masks are kept."""

import dataclasses
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
from pycocotools import mask as coco_mask

from sam_jax import rle
from sam_jax.arrays import Float, UInt8
from sam_jax.errors import ConfigError
from sam_jax.image_channels import as_pixels
from sam_jax.images import ImageError
from sam_jax.inference.arguments import checked_embeddings, images_in, one_image
from sam_jax.inference.candidates import (
    EDGE_TOLERANCE,
    Candidate,
    OutputMode,
    clean,
    cut_sides,
    join,
    mask_box,
    nms,
    nms_by_region,
    record_of,
)
from sam_jax.inference.images import ImageEmbeddings
from sam_jax.inference.predictor import Predictor
from sam_jax.inference.regions import Box, Region, crop_boxes, point_grid, tile_boxes
from sam_jax.inference.restore import restore_logits


@dataclasses.dataclass(frozen=True)
class AutomaticOptions:
    """Options of the mask generator; the defaults are the released one's.

    Attributes:
      points_per_side: points along each side of the grid on the whole image.
      points_per_batch: points that are prompted at once; with it memory grows, not with the image.
      pred_iou_thresh: masks need a higher predicted IoU; 0 takes all.
      stability_score_thresh: masks need this stability at least; 0 takes all.
      stability_score_offset: how far the logit's threshold moves for the stability.
      box_nms_thresh: of two masks of a crop whose boxes have a higher IoU, the one with the lower
        predicted IoU goes.
      crop_n_layers: layers of crops besides the whole image; layer i has ``4 ** i`` of them.
      crop_nms_thresh: the same among all crops, where the mask of the smaller crop stays.
      crop_overlap_ratio: overlap of the crops of the first layer, over the image's shorter side.
      crop_n_points_downscale_factor: layer i has this to the power of i times fewer points per
        side.
      min_mask_region_area: smaller holes are filled and smaller islands removed, pixels; 0 leaves
        all.
      max_area_rate: masks that cover more of the image go. The paper drops those of 95 % and more,
        the released code none.
      tile_px: side of the tiles that a larger image is searched in besides as a whole, for what is
        small in it; 0 for none. A tile's grid is that of the first layer of crops. Not with crops.
      tile_halo_px: neighbouring tiles share at least this much.
      tile_join_iou: masks that tiles cut are joined if they agree so far where both tiles see them.
      filter_at: where stability and boxes are measured. "original": in the image's pixels, like the
        released generator. "low_resolution": in the decoder's, so that only what stays is ever
        enlarged, for accelerators that find masks faster than the host can measure them.
      regions_per_batch: crops, tiles or images that each device embeds and prompts at once.
      host_memory_mib: what enlarged masks may take; fewer are measured at once if the image is
        large, but never less than one.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0
    max_area_rate: float = 1.0
    tile_px: int = 0
    tile_halo_px: int = 128
    tile_join_iou: float = 0.7
    filter_at: str = "original"
    regions_per_batch: int = 1
    host_memory_mib: int = 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name} must be a finite number, got {value}")
        for name in (
            "points_per_side",
            "points_per_batch",
            "crop_n_points_downscale_factor",
            "regions_per_batch",
            "host_memory_mib",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.crop_n_layers < 0 or self.min_mask_region_area < 0:
            raise ConfigError("crop_n_layers and min_mask_region_area must not be negative")
        if not 0 < self.max_area_rate <= 1 or not 0 <= self.crop_overlap_ratio < 1:
            raise ConfigError("max_area_rate must be in (0, 1], crop_overlap_ratio in [0, 1)")
        if self.filter_at not in ("original", "low_resolution"):
            raise ConfigError(
                f"filter_at must be 'original' or 'low_resolution', got {self.filter_at!r}"
            )
        if self.tile_px and self.crop_n_layers:
            raise ConfigError("tile_px and crop_n_layers exclude each other: set one of them to 0")
        if self.tile_px and not 2 * EDGE_TOLERANCE < self.tile_halo_px < self.tile_px:
            raise ConfigError(
                f"tile_halo_px must be above {2 * EDGE_TOLERANCE:g}, so that what one tile cuts is "
                f"whole in the next, and less than tile_px, {self.tile_px}; got {self.tile_halo_px}"
            )
        if not 0 < self.tile_join_iou <= 1:
            raise ConfigError(f"tile_join_iou must be in (0, 1], got {self.tile_join_iou}")
        finest = max(self.crop_n_layers, int(self.tile_px > 0))
        if self.points_per_side < self.crop_n_points_downscale_factor**finest:
            raise ConfigError(
                f"layer {finest} of crops has no points left: points_per_side "
                f"{self.points_per_side} / {self.crop_n_points_downscale_factor} ** {finest}"
            )


# What SA-1B's masks were made with, as far as the paper (appendix B) and the released annotations
# tell; the model that made them had three layers in its decoder, and was never released.
SA1B_OPTIONS = AutomaticOptions(
    crop_n_layers=2,
    crop_n_points_downscale_factor=2,
    min_mask_region_area=100,
    max_area_rate=0.95,
)


def generate_masks(
    predictor: Predictor,
    image: Any,
    options: Any = None,
    *,
    output_mode: Any = "binary_mask",
    embeddings: Any = None,
) -> list[dict[str, Any]]:
    """All masks of an image, as records of the released generator's form.

    A record has ``segmentation`` (by ``output_mode``), ``area`` in pixels, ``bbox`` and
    ``crop_box`` as ``[x, y, w, h]``, ``predicted_iou``, ``stability_score`` and ``point_coords``,
    the prompt.

    Nothing has a fixed capacity that could overflow. Masks are drawn only for points with a
    candidate of sufficient predicted IoU, enlarged one at a time, and kept as run lengths.

    Args:
      predictor: of the model.
      image: see ``sam_jax.image_channels.as_pixels``.
      options: how to search.
      output_mode: a boolean array, run lengths as a list, or COCO's compressed string.
      embeddings: of the whole image, if they are at hand; only without crops and tiles.

    Raises:
      ImageError: if the image cannot be used, or embeddings are of another one.
      PromptError: if embeddings are another model's.

    Source: Kirillov et al. 2023, appendix B; segment-anything, ``automatic_mask_generator.py``.
    """
    if isinstance(image, list | tuple):
        raise ImageError(
            f"image is a {type(image).__name__} of {len(image)}: generate_masks takes one image, "
            "generate_masks_of_many several"
        )
    image = one_image(image, "image")
    if embeddings is not None:
        embeddings = checked_embeddings(embeddings)
    (records,) = _generate(
        predictor, [image], _checked(options, output_mode), output_mode, embeddings
    )
    return records


def generate_masks_of_many(
    predictor: Predictor,
    images: Any,
    options: Any = None,
    *,
    output_mode: Any = "coco_rle",
    multimask_output: bool = True,
) -> Iterator[list[dict[str, Any]]]:
    """``generate_masks`` of a stream of images, in their order; of what ``embed`` takes.

    As many regions as ``options.regions_per_batch`` are embedded and prompted at once on each of
    the predictor's devices, of one image or of several; no more images than that are in memory.

    Args:
      predictor: see ``generate_masks``.
      images: what ``Predictor.embed`` takes.
      options: see ``generate_masks``.
      output_mode: see ``generate_masks``.
      multimask_output: three candidates of each point, or the single one.

    Raises:
      ImageError: if an image cannot be used; those before it have been answered.
    """
    checked = _checked(options, output_mode)
    found = images_in(images, predictor.in_channels)
    return _generate(predictor, found, checked, output_mode, None, multimask_output)


def _checked(options: Any, output_mode: Any) -> AutomaticOptions:
    if output_mode not in get_args(OutputMode):
        expected = " or ".join(map(repr, get_args(OutputMode)))
        raise ConfigError(f"output_mode is {output_mode!r}; expected {expected}")
    if options is None:
        return AutomaticOptions()
    if not isinstance(options, AutomaticOptions):
        raise ConfigError(
            f"options is a {type(options).__name__}; expected AutomaticOptions, as in "
            "AutomaticOptions(points_per_side=16)"
        )
    return options


# Masks that wait in line for each worker that measures them, so that none is idle.
_LINE_PER_WORKER = 4


@dataclasses.dataclass(eq=False)
class _Search:
    """An image on its way: what was found so far, and how many regions are still to be searched."""

    pixels: UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w c"]
    regions: list[Region]
    num_left: int
    found: list[Candidate] = dataclasses.field(default_factory=list)
    fragments: list[Candidate] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.pixels.shape[:2]
        return height, width


@dataclasses.dataclass(frozen=True, eq=False)
class _Measured:
    """A mask of a region before suppression.

    Attributes:
      candidate: the mask; its run lengths are empty while ``low_res_logits`` stand for them.
      low_res_logits: of a mask that was measured at low resolution and not enlarged yet.
      is_cut: whether the region's border cuts it.
    """

    candidate: Candidate
    low_res_logits: Float[np.ndarray, "lh lw"] | None
    is_cut: bool


def _generate(
    predictor: Predictor,
    images: Iterable[Any],
    options: AutomaticOptions,
    output_mode: OutputMode,
    embeddings: ImageEmbeddings | None,
    multimask_output: bool = True,
) -> Iterator[list[dict[str, Any]]]:
    batch_size = options.regions_per_batch * predictor.num_devices
    open_searches: list[_Search] = []
    work = _regions_of(images, predictor.in_channels, options, open_searches)
    error: ImageError | None = None
    while error is None:
        batch = []
        try:
            for search_and_region in work:
                batch.append(search_and_region)
                if len(batch) == batch_size:
                    break
        except ImageError as found:
            # Raised after the answers for the images before it.
            error = found
        if not batch:
            break
        if embeddings is not None:
            _check_embeddings(embeddings, batch[0][0])
        _search(predictor, batch, options, embeddings, multimask_output)
        while open_searches and not open_searches[0].num_left:
            yield _finished(open_searches.pop(0), options, output_mode)
    if error is not None:
        raise error


def _regions_of(
    images: Iterable[Any],
    in_channels: int | None,
    options: AutomaticOptions,
    open_searches: list[_Search],
) -> Iterator[tuple[_Search, Region]]:
    """Every region of every image; an image is opened when its first region is wanted."""
    for number, image in enumerate(images):
        pixels = as_pixels(image, in_channels, f"image {number}")
        size = (pixels.shape[0], pixels.shape[1])
        boxes, layers = crop_boxes(size, options.crop_n_layers, options.crop_overlap_ratio)
        regions = [
            Region(box, layer)
            for box, layer in zip(boxes, layers, strict=True)
            # Crops of an image of a few pixels may be empty.
            if box[0] < box[2] and box[1] < box[3]
        ]
        if 0 < options.tile_px < max(size):
            tiles = tile_boxes(size, options.tile_px, options.tile_halo_px)
            regions += [Region(box, layer=1, is_tile=True) for box in tiles]
        search = _Search(pixels, regions, len(regions))
        open_searches.append(search)
        for region in regions:
            yield search, region


def _check_embeddings(embeddings: ImageEmbeddings, search: _Search) -> None:
    fits = len(embeddings) == 1 and embeddings.original_hw[0].tolist() == [*search.size]
    if not fits or len(search.regions) > 1:
        raise ImageError(
            f"embeddings must be those of this image alone, {search.size}, and without crops or "
            f"tiles; got {len(embeddings)} of {embeddings.original_hw.tolist()} and "
            f"{len(search.regions)} regions"
        )


def _search(
    predictor: Predictor,
    batch: Sequence[tuple[_Search, Region]],
    options: AutomaticOptions,
    embeddings: ImageEmbeddings | None,
    multimask_output: bool,
) -> None:
    """Adds to each image what is found in its region."""
    if embeddings is None:
        embeddings = predictor.embed(
            [search.pixels[_window(region.box)] for search, region in batch]
        )
    grids, measures = [], []
    for row, (search, region) in enumerate(batch):
        x0, y0, x1, y1 = region.box
        side = options.points_per_side // options.crop_n_points_downscale_factor**region.layer
        grids.append(point_grid(side) * [x1 - x0, y1 - y0])
        measures.append(
            _Measure(
                region.box,
                search.size,
                embeddings.model_hw,
                _pair(embeddings.resized_hw[row]),
                options,
            )
        )
    threshold = options.pred_iou_thresh if options.pred_iou_thresh > 0 else -math.inf
    num_workers = _num_workers(measures, options)
    measuring: list[list[Future[_Measured | None]]] = [[] for _ in batch]
    pool = ThreadPoolExecutor(num_workers)
    try:
        in_line: deque[Future[Any]] = deque()
        for found in predictor.predict_points(
            embeddings,
            grids,
            points_per_batch=options.points_per_batch,
            iou_threshold=threshold,
            multimask_output=multimask_output,
        ):
            for row, image in enumerate(found.images):
                if len(in_line) >= _LINE_PER_WORKER * num_workers:
                    in_line.popleft().result()
                future = pool.submit(
                    measures[image].measured,
                    found.low_res_logits[row],
                    grids[image][found.points[row]],
                    float(found.iou_predictions[row]),
                )
                in_line.append(future)
                measuring[image].append(future)
        for (search, region), measure, futures in zip(batch, measures, measuring, strict=True):
            passed = [m for m in (future.result() for future in futures) if m is not None]
            # Tiles keep what they cut, which may be a part of what goes on in the next one.
            whole = [m for m in passed if not m.is_cut]
            search.found += pool.map(measure.enlarged, _suppressed(whole, options))
            if region.is_tile:
                cut = [m for m in passed if m.is_cut]
                search.fragments += pool.map(measure.enlarged, _suppressed(cut, options))
            search.num_left -= 1
    finally:
        # After an error or Ctrl-C, what is still in line is of no use.
        pool.shutdown(cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class _Measure:
    """Geometry and options for turning the masks of one region into candidates."""

    region: Box
    size: tuple[int, int]
    model_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    options: AutomaticOptions

    @property
    def region_hw(self) -> tuple[int, int]:
        x0, y0, x1, y1 = self.region
        return y1 - y0, x1 - x0

    def measured(
        self, low_res_logits: np.ndarray, point: np.ndarray, predicted_iou: float
    ) -> _Measured | None:
        """A mask as suppression and records need it, unless it is unstable."""
        options, offset = self.options, self.options.stability_score_offset
        logits, scale = self._logits(low_res_logits)
        # As the released code divides: a mask that is empty at both thresholds has no stability.
        union = np.count_nonzero(logits > -offset)
        stability = np.count_nonzero(logits > offset) / union if union else math.nan
        if options.stability_score_thresh > 0 and not stability >= options.stability_score_thresh:
            return None
        left, top = self.region[:2]
        unmeasured = Candidate(
            mask_rle={},
            box_xyxy=(0.0, 0.0, 0.0, 0.0),
            point=(float(point[0]) + left, float(point[1]) + top),
            predicted_iou=predicted_iou,
            stability_score=stability,
            region=self.region,
        )
        if options.filter_at == "original":
            candidate, kept = self._encoded(unmeasured, logits > 0), None
        else:
            x0, y0, x1, y1 = mask_box(logits > 0)
            rows, columns = scale
            candidate = dataclasses.replace(
                unmeasured,
                box_xyxy=(
                    x0 * columns + left,
                    y0 * rows + top,
                    (x1 + 1) * columns - 1 + left,
                    (y1 + 1) * rows - 1 + top,
                ),
            )
            # A copy, since a view would keep its whole batch in memory.
            kept = low_res_logits.copy()
        return _Measured(
            candidate, kept, bool(cut_sides(candidate.box_xyxy, self.region, self.size))
        )

    def enlarged(self, measured: _Measured) -> Candidate:
        """A mask that stays, as run lengths of the whole image."""
        if measured.low_res_logits is None:
            return measured.candidate
        return self._encoded(measured.candidate, self._restored(measured.low_res_logits) > 0)

    def _encoded(self, candidate: Candidate, mask: np.ndarray) -> Candidate:
        x0, y0, x1, y1 = (int(edge) for edge in mask_box(mask))
        left, top = self.region[:2]
        part = mask[y0 : y1 + 1, x0 : x1 + 1]
        return dataclasses.replace(
            candidate,
            mask_rle=rle.encode_part(part, self.size, (x0 + left, y0 + top)),
            box_xyxy=(float(x0 + left), float(y0 + top), float(x1 + left), float(y1 + top)),
        )

    def _logits(self, low_res_logits: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
        """Logits without padding, at the resolution of the filters, and pixels per cell of them."""
        if self.options.filter_at == "original":
            return self._restored(low_res_logits), (1.0, 1.0)
        cells = [
            resized * low_res / model
            for resized, low_res, model in zip(
                self.resized_hw, low_res_logits.shape, self.model_hw, strict=True
            )
        ]
        scale_h, scale_w = (side / count for side, count in zip(self.region_hw, cells, strict=True))
        rows, columns = (max(round(count), 1) for count in cells)
        return low_res_logits[:rows, :columns], (scale_h, scale_w)

    def _restored(self, low_res_logits: np.ndarray) -> np.ndarray:
        return restore_logits(low_res_logits, self.model_hw, self.resized_hw, self.region_hw)


def _num_workers(measures: Sequence[_Measure], options: AutomaticOptions) -> int:
    """Masks that may be enlarged at once."""
    # Logits at the size of the model's input and of the region, and three comparisons of these.
    most = max(4 * math.prod(m.model_hw) + 7 * math.prod(m.region_hw) for m in measures)
    return max(1, min(os.cpu_count() or 1, options.host_memory_mib * 2**20 // most))


def _suppressed(measured: Sequence[_Measured], options: AutomaticOptions) -> list[_Measured]:
    candidates = [m.candidate for m in measured]
    scores = [candidate.predicted_iou for candidate in candidates]
    return [measured[index] for index in nms(candidates, scores, options.box_nms_thresh)]


def _finished(
    search: _Search, options: AutomaticOptions, output_mode: OutputMode
) -> list[dict[str, Any]]:
    """The records of an image whose regions have all been searched."""
    found = search.found + join(search.fragments, search.size, options.tile_join_iou)
    if len(search.regions) > 1:
        found = nms_by_region(found, options.crop_nms_thresh)
    if options.min_mask_region_area > 0:
        threshold = max(options.box_nms_thresh, options.crop_nms_thresh)
        found = clean(found, options.min_mask_region_area, threshold)
    if options.filter_at == "low_resolution":
        # A mask may be smaller than a pixel of a small image.
        found = [candidate for candidate in found if coco_mask.area(candidate.mask_rle)]
    limit = options.max_area_rate * math.prod(search.size)
    return [
        record_of(candidate, output_mode)
        for candidate in found
        if options.max_area_rate == 1.0 or int(coco_mask.area(candidate.mask_rle)) < limit
    ]


def _window(box: Box) -> tuple[slice, slice]:
    x0, y0, x1, y1 = box
    return slice(y0, y1), slice(x0, x1)


def _pair(values: np.ndarray) -> tuple[int, int]:
    first, second = values.tolist()
    return first, second
