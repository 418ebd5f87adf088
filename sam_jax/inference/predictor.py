"""The predictor: any images, any prompts, a bounded number of compiled programs."""

import copy
import dataclasses
import functools
import itertools
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sam_jax.arrays import Array, Bool, Float, Int, UInt8
from sam_jax.image_channels import as_pixels
from sam_jax.inference.arguments import checked_embeddings, images_in, prompts_per_image
from sam_jax.inference.images import ImageEmbeddings, model_input
from sam_jax.inference.prompts import Prompt, PromptError, check_prompt, pad_rows, rows_of
from sam_jax.inference.restore import restore_mask
from sam_jax.models.mask_decoder import NUM_MULTIMASK, MaskPrediction
from sam_jax.models.prompt_encoder import FOREGROUND, Prompts
from sam_jax.models.sam import Sam
from sam_jax.ops.dispatch import Kernels
from sam_jax.ops.images import RGB, ImageChannels, normalize_images
from sam_jax.parallel import BATCH, Parallel, gather_to_all_devices
from sam_jax.weights.load import load


def use_compilation_cache(folder: str | Path) -> None:
    """Keeps all programs that are compiled from now on in a folder, and takes them from there.

    Programs are kept by what they compute, for what device, and by JAX's version: a folder may be
    shared, and nothing in it is ever wrong, only unused.
    """
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# Numbers in the image tokens of the points that a CPU decodes at once: one point at published size.
_CACHED_CELL_NUMBERS = 2**20
# Candidates that are fetched from the device at once, at least.
_LEAST_FETCH = 8


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that calls are padded to; each combination that occurs is compiled once.

    At most ``len(images) + 4 * len(rows) * len(prompts) * len(points)`` programs exist (with masks
    among the prompts or not, one candidate or three), and one more per power of two for prompts
    with more points than the last of ``points``. Automatic masks add ``len(images)`` for each
    number of points per batch.

    Attributes:
      images: images per call of the encoder, rising; more are split.
      rows: rows per call of the decoder, rising; a row is prompts of one image.
      prompts: prompts per row, rising; more make several rows.
      points: points per prompt, rising.
    """

    images: Sequence[int] = (1, 4)
    rows: Sequence[int] = (1, 4)
    prompts: Sequence[int] = (1, 8, 64)
    points: Sequence[int] = (1, 4, 16)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            sizes = tuple(getattr(self, field.name))
            if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
                raise ValueError(f"buckets.{field.name} must rise from 1 or more, got {sizes}")


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """The answers for the prompts of one image, kept at low resolution until they are asked for.

    Attributes:
      low_res_logits: of each candidate; above 0 is the object. Usable as a later mask prompt.
      iou_predictions: the model's estimate of each candidate's IoU.
      original_hw: size of the image.
      resized_hw: its size within the model's input.
      model_hw: size of the model's input.
    """

    low_res_logits: Float[np.ndarray, "p m lh lw"]
    iou_predictions: Float[np.ndarray, "p m"]
    original_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    model_hw: tuple[int, int]

    def __len__(self) -> int:
        return len(self.low_res_logits)

    def mask(self, prompt: int, candidate: int | None = None) -> Bool[np.ndarray, "oh ow"]:
        """One mask in the original image's pixels; by default the candidate of highest IoU."""
        if candidate is None:
            candidate = int(self.iou_predictions[prompt].argmax())
        logits = self.low_res_logits[prompt, candidate]
        return restore_mask(logits, self.model_hw, self.resized_hw, self.original_hw)

    def best_masks(self) -> Bool[np.ndarray, "p oh ow"]:
        """Each prompt's mask of highest predicted IoU, in the original image's pixels."""
        return self._stacked([self.mask(prompt) for prompt in range(len(self))])

    def masks(self) -> Bool[np.ndarray, "p m oh ow"]:
        """All candidates' masks in the original image's pixels; large for many prompts."""
        prompts, candidates = self.iou_predictions.shape
        flat = [self.mask(p, m) for p in range(prompts) for m in range(candidates)]
        return self._stacked(flat).reshape(prompts, candidates, *self.original_hw)

    def _stacked(self, masks: list[np.ndarray]) -> np.ndarray:
        return np.stack(masks) if masks else np.zeros((0, *self.original_hw), bool)


@dataclasses.dataclass(frozen=True, eq=False)
class PointBatch:
    """Candidates of a batch of points that passed the threshold of predicted IoU.

    Attributes:
      images: number of each candidate's image.
      points: number of its point among those of its image.
      iou_predictions: the model's estimates of the masks' IoU.
      low_res_logits: as ``Prediction``'s.
    """

    images: Int[np.ndarray, "k"]
    points: Int[np.ndarray, "k"]
    iou_predictions: Float[np.ndarray, "k"]
    low_res_logits: Float[np.ndarray, "k lh lw"]


def fingerprint_of(variables: Any, channels: ImageChannels) -> str:
    """A short name of variables, the same wherever they are kept.

    Args:
      variables: of a model.
      channels: of its images: with others than published models', the same variables answer
        otherwise.
    """
    checksum = 0 if channels == RGB else zlib.crc32(repr(channels).encode())
    for leaf in jax.tree.leaves(variables):
        checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
    return f"{checksum:08x}"


class Predictor:
    """A model ready to be prompted. It remembers no image: embeddings are values.

    ::

        predictor = Predictor.load("sam_vit_b_01ec64.pth")
        embeddings = predictor.embed([image, other])
        first, second = predictor.predict(
            embeddings,
            [[Prompt(points=[(320, 200)]), Prompt(box=(10, 20, 300, 400))], [Prompt(...)]],
        )
        first.mask(0), first.iou_predictions[0]

    Args:
      model: the model.
      variables: its variables; every device gets a copy, once. Of several hosts, each has a
        predictor on its own devices, and all must make it together.
      buckets: sizes that calls are padded to, on each device.
      devices: on which images and rows of prompts are spread; by default one.
      kernels: see ``ops.dispatch.Target``.
    """

    def __init__(
        self,
        model: Sam,
        variables: Mapping[str, Any],
        buckets: Buckets | None = None,
        *,
        devices: Sequence[jax.Device] | None = None,
        kernels: Kernels = "auto",
    ):
        mesh = Mesh(np.array(devices or jax.local_devices()[:1]), ("image",))
        self._by_image = NamedSharding(mesh, PartitionSpec("image"))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        parallel = Parallel(mesh, ("image",), kernels=kernels)
        self._model = model
        self._encode_images = parallel.encode(model)
        self._variables = gather_to_all_devices(dict(variables), self._everywhere)
        self._buckets = buckets or Buckets()
        self._encode = jax.jit(self._encode_on_device)
        everywhere, by_image = PartitionSpec(), parallel.spec(BATCH)
        self._decode = jax.jit(parallel.decode(model), static_argnames="multimask_output")
        # By whether there are three masks of each point; compiled when they are called.
        self._decode_points = {
            multimask_output: jax.jit(
                parallel.on_each_device(
                    self._points_decoder(multimask_output),
                    [everywhere, by_image, by_image, by_image, everywhere],
                    by_image,
                )
            )
            for multimask_output in (True, False)
        }
        # Not a slice, which would be compiled anew for each position.
        self._take = jax.jit(lambda rows, indices: rows[indices], out_shardings=self._everywhere)

    @classmethod
    def load(
        cls,
        path_or_name: str | Path,
        *,
        buckets: Buckets | None = None,
        devices: Sequence[jax.Device] | None = None,
        **options: Any,
    ) -> "Predictor":
        """A predictor of any checkpoint; ``options`` and errors as ``weights.load.load``."""
        model, variables = load(path_or_name, **options)
        return cls(model, variables, buckets, devices=devices)

    def with_variables(self, variables: Mapping[str, Any]) -> "Predictor":
        """The predictor with other variables of the same model; both share what was compiled.

        Args:
          variables: see ``Predictor``.
        """
        other = copy.copy(self)
        other._variables = gather_to_all_devices(dict(variables), self._everywhere)
        return other

    @property
    def num_devices(self) -> int:
        """Devices that share the work."""
        return self._by_image.num_devices

    @property
    def model_hw(self) -> tuple[int, int]:
        """Height and width of the model's input, pixels."""
        return self._model.image_size

    @property
    def in_channels(self) -> int | None:
        """Channels of the model's images, with values as they are stored; None for 8-bit RGB."""
        return self._model.config.channels.in_chans

    def embed(self, images: Any) -> ImageEmbeddings:
        """Embeds images, which may differ in size.

        Args:
          images: a list of images, see ``sam_jax.image_channels.as_pixels``, or anything else that
            gives them one by one. A lone image, which is an array ``[h, w, c]`` or a picture of
            Pillow's, is a list of one; see ``arguments.images_in``.

        Raises:
          ImageError: if an image cannot be used; it is named by its number.
        """
        size, channels = self._model.image_size, self._model.config.channels
        found = enumerate(images_in(images, channels.in_chans))
        checked = [as_pixels(image, channels.in_chans, f"image {index}") for index, image in found]
        inputs, resized_hw = [], []
        for image in checked:
            padded, hw = model_input(image, size)
            inputs.append(padded)
            resized_hw.append(hw)
        features = []
        for start, stop, length in self._parts(len(checked), self._buckets.images):
            batch = np.zeros((length, *size, channels.count), channels.dtype)
            batch_hw = np.zeros((length, 2), np.int32)
            for row, index in enumerate(range(start, stop)):
                batch[row], batch_hw[row] = inputs[index], resized_hw[index]
            batch, batch_hw = jax.device_put((batch, batch_hw), self._by_image)
            features.append(self._encode(self._variables, batch, batch_hw)[: stop - start])
        grid = self._model.config.image_encoder.grid
        empty = np.zeros((0, *grid, self._model.config.image_encoder.output_dim), np.float32)
        return ImageEmbeddings(
            features=jnp.concatenate([empty, *features]),
            original_hw=np.array([i.shape[:2] for i in checked], np.int64).reshape(-1, 2),
            resized_hw=np.array(resized_hw, np.int64).reshape(-1, 2),
            model_hw=size,
        )

    def predict(
        self,
        embeddings: Any,
        prompts: Any,
        *,
        multimask_output: Any = True,
    ) -> list[Prediction]:
        """Masks for any number of objects in each image.

        Args:
          embeddings: ``ImageEmbeddings`` of the images, from ``embed`` or a file.
          prompts: for each image a list of its objects' ``Prompt``s.
          multimask_output: three candidates for each object, which suits prompts that leave room
            for doubt, or the single one.

        Raises:
          PromptError: if a prompt makes no sense, or embeddings are another model's.
        """
        per_image = self._checked(embeddings, prompts)
        if not isinstance(multimask_output, bool | np.bool_):
            raise PromptError(f"multimask_output is {multimask_output!r}; expected True or False")
        multimask_output = bool(multimask_output)
        lengths = self._buckets.prompts
        largest = max((len(objects) for objects in per_image), default=0)
        row_length = _bucket(largest, lengths) or lengths[-1]
        rows = list(rows_of(per_image, row_length))
        objects = list(itertools.chain.from_iterable(per_image))
        most_points = max((len(prompt.points) for prompt in objects), default=0)
        has_masks = any(prompt.mask_logits is not None for prompt in objects)
        num_points = _bucket(most_points, self._buckets.points)
        if num_points is None:
            num_points = 1 << (most_points - 1).bit_length()
        logits: list[list[np.ndarray]] = [[] for _ in per_image]
        ious: list[list[np.ndarray]] = [[] for _ in per_image]
        for start, stop, num_rows in self._parts(len(rows), self._buckets.rows):
            part = rows[start:stop]
            padded = pad_rows(
                part,
                num_rows=num_rows,
                row_length=row_length,
                num_points=num_points,
                low_res_hw=self._model.low_res_size if has_masks else None,
            )
            image_of_row = np.array([row.image for row in part], np.int32)
            image_of_row = np.pad(image_of_row, (0, num_rows - len(part)))
            # Gathered here, so that programs do not depend on the number of images.
            features, padded = jax.device_put(
                (_gathered(embeddings.features, image_of_row), padded), self._by_image
            )
            answer = jax.device_get(
                self._decode(self._variables, features, padded, multimask_output=multimask_output)
            )
            for r, row in enumerate(part):
                logits[row.image].append(answer.low_res_logits[r, : len(row.prompts)])
                ious[row.image].append(answer.iou_predictions[r, : len(row.prompts)])
        m, size = 3 if multimask_output else 1, self._model.low_res_size
        return [
            Prediction(
                np.concatenate([np.zeros((0, m, *size), np.float32), *logits[image]]),
                np.concatenate([np.zeros((0, m), np.float32), *ious[image]]),
                _pair(embeddings.original_hw[image]),
                _pair(embeddings.resized_hw[image]),
                embeddings.model_hw,
            )
            for image in range(len(per_image))
        ]

    def predict_points(
        self,
        embeddings: ImageEmbeddings,
        points: Sequence[Float[np.ndarray, "n 2"]],
        *,
        points_per_batch: int,
        iou_threshold: float,
        multimask_output: bool = True,
    ) -> Iterator[PointBatch]:
        """Candidates of many lone points, some points of all images at a time.

        Masks are drawn only where a candidate is good enough. While the caller looks at one batch,
        the next two are on their way; no more are in memory.

        Args:
          embeddings: of the images.
          points: of each image, ``(x, y)`` in its pixels, a pixel's index meaning its centre.
          points_per_batch: of each image.
          iou_threshold: candidates need a higher predicted IoU.
          multimask_output: three candidates of each point, or the single one.

        Raises:
          PromptError: if embeddings are another model's.
        """
        self._check_features(checked_embeddings(embeddings))
        if len(points) != len(embeddings):
            raise PromptError(f"there are {len(embeddings)} images and points for {len(points)}")
        scale = embeddings.resized_hw[:, ::-1] / embeddings.original_hw[:, ::-1]
        sizes = [size * self.num_devices for size in self._buckets.images]
        num_images = _bucket(len(embeddings), sizes) or _round_up(len(embeddings), sizes[-1])
        num_points = _round_up(max(map(len, points), default=0), points_per_batch)
        coords = np.zeros((num_images, num_points, 2), np.float32)
        valid = np.zeros((num_images, num_points), bool)
        for image, of_image in enumerate(points):
            coords[image, : len(of_image)] = of_image * scale[image]
            valid[image, : len(of_image)] = True
        rows = np.minimum(np.arange(num_images), max(len(embeddings) - 1, 0))
        features = jax.device_put(embeddings.features[rows], self._by_image)

        def dispatched() -> Iterator[tuple[int, Any]]:
            for start in range(0, num_points, points_per_batch):
                part = slice(start, start + points_per_batch)
                arrays = jax.device_put((coords[:, part], valid[:, part]), self._by_image)
                yield (
                    start,
                    self._decode_points[multimask_output](
                        self._variables, features, *arrays, np.float32(iou_threshold)
                    ),
                )

        batches = dispatched()
        waiting = deque(itertools.islice(batches, 2))
        while waiting:
            start, answer = waiting.popleft()
            passing = self._passing(start, answer, valid, iou_threshold)
            # The next batch is queued after this one's fetch has begun and before waiting for it.
            waiting.extend(itertools.islice(batches, 1))
            yield passing()

    def _passing(
        self, start: int, answer: MaskPrediction, valid: np.ndarray, iou_threshold: float
    ) -> Callable[[], PointBatch]:
        """Starts fetching masks above ``iou_threshold``; calling the result waits for them."""
        ious = np.asarray(answer.iou_predictions)
        part = valid[:, start : start + ious.shape[1], None]
        images, places, candidates = np.nonzero(part & (ious > iou_threshold))
        flat = np.ravel_multi_index((images, places, candidates), ious.shape)
        # A power of two, so that there are few programs.
        length = max(_LEAST_FETCH, 1 << max(len(flat) - 1, 0).bit_length())
        rows = answer.low_res_logits.reshape(-1, *self._model.low_res_size)
        fetched = self._take(rows, np.pad(flat, (0, length - len(flat))))
        fetched.copy_to_host_async()

        def wait() -> PointBatch:
            return PointBatch(
                images=images,
                points=start + places,
                iou_predictions=ious[images, places, candidates],
                low_res_logits=np.asarray(fetched)[: len(flat)],
            )

        return wait

    def warm_up(
        self,
        *,
        multimask_output: bool = True,
        num_points: int = 1,
        points_per_batch: int | None = None,
    ) -> None:
        """Compiles what one image with one prompt needs, before the first user waits for it.

        Args:
          multimask_output: as ``predict``.
          num_points: of the prompt.
          points_per_batch: of automatic masks, to compile what they need as well.
        """
        channels = self._model.config.channels
        shape = (*self._model.image_size, channels.count)
        embeddings = self.embed([np.zeros(shape, channels.dtype)])
        if points_per_batch is not None:
            for _ in self.predict_points(
                embeddings,
                [np.zeros((1, 2))],
                points_per_batch=points_per_batch,
                iou_threshold=np.inf,
            ):
                pass
        prompt = Prompt(points=[(0, 0)] * num_points)
        self.predict(embeddings, [[prompt]], multimask_output=multimask_output)

    def _checked(self, embeddings: Any, prompts: Any) -> list:
        self._check_features(checked_embeddings(embeddings))
        return [
            [
                check_prompt(
                    prompt,
                    f"image {image}, prompt {number}",
                    original_hw=_pair(embeddings.original_hw[image]),
                    resized_hw=_pair(embeddings.resized_hw[image]),
                    model_hw=embeddings.model_hw,
                    low_res_hw=self._model.low_res_size,
                )
                for number, prompt in enumerate(objects)
            ]
            for image, objects in enumerate(prompts_per_image(prompts, len(embeddings)))
        ]

    def _check_features(self, embeddings: ImageEmbeddings) -> None:
        encoder = self._model.config.image_encoder
        expected = (*encoder.grid, encoder.output_dim)
        found = embeddings.features.shape[1:]
        if found != expected or embeddings.model_hw != self._model.image_size:
            raise PromptError(
                f"embeddings of shape {found} for inputs of {embeddings.model_hw} are another "
                f"model's; this one's are {expected} for {self._model.image_size}"
            )

    def fingerprint(self) -> str:
        """A short name of weights and channels, the same wherever they are kept."""
        return fingerprint_of(self._variables, self._model.config.channels)

    def _encode_on_device(
        self,
        variables: Any,
        images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
        image_hw: Int[Array, "b 2"],
    ) -> Any:
        normalized = normalize_images(images, image_hw, self._model.config.channels)
        return self._encode_images(variables["params"], normalized, None)

    def _points_decoder(self, multimask_output: bool) -> Callable[..., MaskPrediction]:
        """``_decode_points_on_device`` for one number of masks, under its name in profiles."""
        decode = functools.partial(self._decode_points_on_device, multimask_output)
        return functools.update_wrapper(decode, self._decode_points_on_device)

    def _decode_points_on_device(
        self,
        multimask_output: bool,
        variables: Any,
        features: Float[Array, "b gh gw d"],
        coords: Float[Array, "b p 2"],
        valid: Bool[Array, "b p"],
        iou_threshold: Float[Array, ""],
    ) -> MaskPrediction:
        """Decodes points in chunks; masks of a chunk without a good candidate are not computed."""
        chunk = coords.shape[1]
        if jax.default_backend() == "cpu":
            chunk = math.gcd(chunk, _points_in_cache(math.prod(features.shape[1:])))
        m, lh, lw = NUM_MULTIMASK if multimask_output else 1, *self._model.low_res_size

        def one_chunk(coords_and_valid: Any) -> MaskPrediction:
            coords, valid = coords_and_valid
            shape = (*valid.shape, m)

            def no_masks() -> Array:
                return jnp.zeros((*shape, lh, lw), jnp.float32)

            def nothing() -> MaskPrediction:
                return MaskPrediction(no_masks(), jnp.full(shape, -jnp.inf, jnp.float32))

            def something() -> MaskPrediction:
                prompts = Prompts(
                    point_coords=coords[:, :, None],
                    point_labels=jnp.full((*valid.shape, 1), FOREGROUND, jnp.int32),
                    point_valid=valid[..., None],
                )
                output: Any = self._model.apply(
                    variables,
                    features,
                    prompts,
                    multimask_output=multimask_output,
                    method=Sam.run_transformer,
                )
                ious = output.iou_predictions
                logits = jax.lax.cond(
                    jnp.any((ious > iou_threshold) & valid[..., None]),
                    lambda: self._model.apply(
                        variables,
                        output,
                        multimask_output=multimask_output,
                        method=Sam.predict_masks,
                    ),
                    no_masks,
                )
                return MaskPrediction(logits, ious)

            return jax.lax.cond(jnp.any(valid), something, nothing)

        chunks = [rearrange(x, "b (n c) ... -> n b c ...", c=chunk) for x in (coords, valid)]
        return jax.tree.map(
            lambda x: rearrange(x, "n b c ... -> b (n c) ..."), jax.lax.map(one_chunk, chunks)
        )

    def _parts(self, count: int, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
        """A count in parts ``(start, stop, size to pad to)``, where every device gets a bucket."""
        return _parts(count, [size * self.num_devices for size in sizes])


@jax.jit
def _gathered(
    features: Float[Array, "b gh gw d"], images: Int[Any, "r"]
) -> Float[Array, "r gh gw d"]:
    """Embeddings by the number of their image; compiled, since indexing takes a millisecond."""
    return features[images]


def _points_in_cache(numbers_per_point: int) -> int:
    """A power of two of points whose image tokens stay in a CPU's cache while they are decoded."""
    return 1 << max(_CACHED_CELL_NUMBERS // numbers_per_point, 1).bit_length() - 1


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _bucket(count: int, sizes: Sequence[int]) -> int | None:
    """The smallest size that holds a count, None if none does."""
    return next((size for size in sizes if size >= count), None)


def _parts(count: int, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """A count in parts ``(start, stop, size to pad to)`` of at most the largest size."""
    starts = range(0, count, sizes[-1])
    stops = [min(start + sizes[-1], count) for start in starts]
    return [
        (start, stop, _bucket(stop - start, sizes) or sizes[-1])
        for start, stop in zip(starts, stops, strict=True)
    ]


def _pair(values: np.ndarray) -> tuple[int, int]:
    first, second = values.tolist()
    return first, second
