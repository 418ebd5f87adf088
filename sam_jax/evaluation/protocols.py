"""The zero-shot protocols on a batch of masks: clicks, one after another, and boxes.

A batch has a fixed number of rows, each with one image and a fixed number of prompts, so the model
compiles once per kind of prompt, whatever the images hold; places that no mask fills are computed
and ignored. Embeddings are made once per image; clicks, masks and scores live on the host at each
image's own resolution.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from typing import Literal

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from sam_jax.arrays import Array, Bool, Float, Int, UInt8
from sam_jax.evaluation.clicks import Click, center_click, correction_click, random_click
from sam_jax.evaluation.metrics import mask_iou
from sam_jax.inference.restore import restore_mask
from sam_jax.models.prompt_encoder import Prompts
from sam_jax.models.sam import Sam
from sam_jax.ops.dispatch import Kernels
from sam_jax.ops.images import normalize_images
from sam_jax.parallel import Parallel


@dataclasses.dataclass(frozen=True, eq=False)
class EvalImage:
    """An image with the masks that are to be found in it.

    Attributes:
      dataset: which dataset it belongs to.
      name: its name there.
      pixels: RGB at the original size.
      masks: ground truth at the original size; none is empty.
      mask_indices: which of the sample's masks those are.
      model_input: RGB, resized and padded at the bottom and right.
      resized_hw: size of the image within ``model_input``.
    """

    dataset: str
    name: str
    pixels: UInt8[np.ndarray, "oh ow 3"]
    masks: Bool[np.ndarray, "k oh ow"]
    mask_indices: tuple[int, ...]
    model_input: UInt8[np.ndarray, "h w 3"]
    resized_hw: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """One mask of an image, by its position in ``image.masks``."""

    image: EvalImage
    position: int

    @property
    def ground_truth(self) -> Bool[np.ndarray, "oh ow"]:
        """The mask itself."""
        return self.image.masks[self.position]

    @property
    def key(self) -> str:
        """Names the mask, also for draws: the same wherever the dataset is kept."""
        image = self.image
        file = image.name.rpartition("/")[2]
        return f"{image.dataset}/{file}/{image.mask_indices[self.position]}"

    @property
    def box_xyxy(self) -> tuple[int, int, int, int]:
        """Tight box in indices of original pixels, both corners inside the mask."""
        x, y, width, height = cv2.boundingRect(self.ground_truth.view(np.uint8))
        return x, y, x + width - 1, y + height - 1

    @property
    def model_box_xyxy(self) -> Float[np.ndarray, "4"]:
        """The tight box in pixels of the model's input, as training takes it from a resized mask.

        A corner names a pixel, so the last one names that in which the enlarged mask ends, and not
        that in which its last pixel begins: at twice the size, pixels 3 to 5 become 6 to 11. A mask
        that is thinner than a pixel of the model's input has its corners where it is.
        """
        (h, w), (oh, ow) = self.image.resized_hw, self.ground_truth.shape
        scale = np.array([w / ow, h / oh])
        x0, y0, x1, y1 = self.box_xyxy
        first, last = scale * (x0, y0), scale * (x1 + 1, y1 + 1) - 1
        middle = (first + last) / 2
        return np.concatenate([np.minimum(first, middle), np.maximum(last, middle)])

    def to_model(self, coords: Float[np.ndarray, "*batch 2"]) -> Float[np.ndarray, "*batch 2"]:
        """Coordinates ``(x, y)`` of original pixels as those of the model's input."""
        (h, w), (oh, ow) = self.image.resized_hw, self.ground_truth.shape
        return coords * np.array([w / ow, h / oh])


@dataclasses.dataclass(frozen=True)
class ClickProtocol:
    """How clicks are given.

    Attributes:
      first_click: deepest inside the mask, or anywhere in it.
      feeds_logits: whether from the second click on the model also gets the logits of its last
        answer, as it does in training; the paper's text on its evaluation does not say.
    """

    first_click: Literal["center", "random"]
    feeds_logits: bool = True


# By the name that begins the names of a protocol's measures, ``center_3`` for its third click.
CLICK_PROTOCOLS = {
    "center": ClickProtocol("center"),
    "random": ClickProtocol("random"),
    "center_points_only": ClickProtocol("center", feeds_logits=False),
    "random_points_only": ClickProtocol("random", feeds_logits=False),
}
BOX_PROTOCOL = "box"
PROTOCOLS = (*CLICK_PROTOCOLS, BOX_PROTOCOL)
ORACLE = "oracle"


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What came out of prompting for one mask.

    Attributes:
      target: the mask.
      ious: IoU by measure.
      prediction: the last answer at the original size.
      clicks: those that led to it; none if a box did.
    """

    target: Target
    ious: dict[str, float]
    prediction: Bool[np.ndarray, "oh ow"]
    clicks: tuple[Click, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class TargetBatch:
    """Masks that are prompted for in the same calls.

    Attributes:
      embeddings: of up to one image per row, on the devices.
      image_of_row: which of the embeddings each row is about.
      targets: mask at each place ``(row, column)``; fewer than there are places.
    """

    embeddings: Float[Array, "b gh gw d"]
    image_of_row: Int[np.ndarray, "b"]
    targets: dict[tuple[int, int], Target]


class CompiledModel:
    """A model compiled for batches of one shape, its rows spread over this host's devices.

    Every host works on images of its own, with its own copy of the variables on each device.

    Args:
      model: the model; variables are given per call.
      images_per_call: rows of a batch; rounded up to a multiple of this host's devices.
      prompts_per_call: places for prompts in each row.
      max_clicks: most clicks that a prompt will have.
      devices: those to use; by default all of this host's.
      kernels: see ``ops.dispatch.Target``.
    """

    def __init__(
        self,
        model: Sam,
        *,
        images_per_call: int,
        prompts_per_call: int,
        max_clicks: int,
        devices: Sequence[jax.Device] | None = None,
        kernels: Kernels = "auto",
    ):
        devices = devices or jax.local_devices()
        mesh = jax.sharding.Mesh(np.array(devices), ("rows",))
        parallel = Parallel(mesh, ("rows",), kernels=kernels)
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._by_row = NamedSharding(mesh, PartitionSpec("rows"))
        self.image_size = model.image_size
        self.num_rows = -(-images_per_call // len(devices)) * len(devices)
        self.num_columns = prompts_per_call
        self.max_clicks = max_clicks

        encode_rows, decode_rows = parallel.encode(model), parallel.decode(model)

        def encode(variables, images, image_hw):
            return encode_rows(variables["params"], normalize_images(images, image_hw), None)

        def decode(variables, embeddings, image_of_row, prompts, multimask_output):
            return decode_rows(variables, embeddings[image_of_row], prompts, multimask_output)

        def propose(variables, embeddings, image_of_row, prompts):
            output = decode(variables, embeddings, image_of_row, prompts, True)
            choice = jnp.argmax(output.iou_predictions, axis=-1)
            chosen = jnp.take_along_axis(
                output.low_res_logits, choice[..., None, None, None], axis=2
            )
            return output.low_res_logits, choice, chosen[:, :, 0]

        def refine(variables, embeddings, image_of_row, prompts):
            output = decode(variables, embeddings, image_of_row, prompts, False)
            return output.low_res_logits[:, :, 0]

        rows = self._by_row
        self._encode = jax.jit(encode, out_shardings=rows)
        self._propose = jax.jit(propose, out_shardings=rows)
        self._refine = jax.jit(refine, out_shardings=rows)

    def place(self, variables: dict) -> dict:
        """The variables whole on each of this host's devices; every host must call this."""

        def whole(leaf):
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                leaf = multihost_utils.process_allgather(leaf, tiled=True)
            return jax.device_put(leaf, self._replicated)

        return jax.tree.map(whole, variables)

    def encode(self, variables: dict, images: Sequence[EvalImage]) -> Float[Array, "b gh gw d"]:
        """Embeddings of at most ``num_rows`` images, in as many rows."""
        pixels = np.zeros((self.num_rows, *self.image_size, 3), np.uint8)
        image_hw = np.zeros((self.num_rows, 2), np.int32)
        for row, image in enumerate(images):
            pixels[row] = image.model_input
            image_hw[row] = image.resized_hw
        return self._encode(variables, *jax.device_put((pixels, image_hw), self._by_row))

    def prompts(self, **arrays: np.ndarray | Array) -> Prompts:
        """Prompts of these fields, on the devices."""
        return Prompts(**jax.device_put(arrays, self._by_row))

    def propose(
        self, variables: dict, batch: TargetBatch, prompts: Prompts
    ) -> tuple[Float[Array, "b p 3 lh lw"], Int[Array, "b p"], Float[Array, "b p lh lw"]]:
        """Three candidates, the one that the model believes in, and the latter's logits."""
        image_of_row = jax.device_put(batch.image_of_row, self._by_row)
        return self._propose(variables, batch.embeddings, image_of_row, prompts)

    def refine(
        self, variables: dict, batch: TargetBatch, prompts: Prompts
    ) -> Float[Array, "b p lh lw"]:
        """Logits of the single mask for prompts that leave no doubt."""
        image_of_row = jax.device_put(batch.image_of_row, self._by_row)
        return self._refine(variables, batch.embeddings, image_of_row, prompts)


def make_batches(
    model: CompiledModel, variables: dict, images: Sequence[EvalImage]
) -> Iterable[TargetBatch]:
    """All masks of at most ``model.num_rows`` images, which are encoded once, in full batches.

    An image with more masks than a row has places takes several rows.
    """
    embeddings = model.encode(variables, images)
    rows = [
        (slot, [Target(image, p) for p in range(first, len(image.masks))[: model.num_columns]])
        for slot, image in enumerate(images)
        for first in range(0, len(image.masks), model.num_columns)
    ]
    for first in range(0, len(rows), model.num_rows):
        chosen = rows[first : first + model.num_rows]
        image_of_row = np.zeros(model.num_rows, np.int32)
        image_of_row[: len(chosen)] = [slot for slot, _ in chosen]
        targets = {
            (row, column): target
            for row, (_, in_row) in enumerate(chosen)
            for column, target in enumerate(in_row)
        }
        yield TargetBatch(embeddings, image_of_row, targets)


def run_clicks(
    model: CompiledModel,
    variables: dict,
    batch: TargetBatch,
    name: str,
    *,
    seed: int,
    pool: Executor,
) -> list[Outcome]:
    """Outcome of ``model.max_clicks`` clicks for each mask, scored after every one.

    The first click is answered with three masks of which the model's favourite counts, and the
    best as ``{name}_1_oracle``; every later one with the single mask for all clicks so far. A user
    who has nothing left to correct keeps the last score.

    Args:
      model: the compiled model.
      variables: its variables, from ``model.place``.
      batch: the masks.
      name: a key of ``CLICK_PROTOCOLS``.
      seed: of the random first clicks.
      pool: runs the host's work on the masks.

    Source: Kirillov et al. 2023, section 7.1 and appendix D.1.
    """
    protocol = CLICK_PROTOCOLS[name]
    shape = (model.num_rows, model.num_columns, model.max_clicks)
    coords, labels = np.zeros((*shape, 2), np.float32), np.zeros(shape, np.int32)
    everywhere = np.ones(shape[:2], bool)

    def new_user(item):
        place, target = item
        if protocol.first_click == "center":
            return place, _User(target, center_click(target.ground_truth))
        return place, _User(target, random_click(target.ground_truth, f"{seed}/{target.key}"))

    users = dict(pool.map(new_user, batch.targets.items()))
    active = users
    for step in range(model.max_clicks):
        for place, user in active.items():
            coords[place][step] = user.target.to_model(np.array(user.clicks[step][:2], float))
            labels[place][step] = user.clicks[step].is_foreground
        points: dict[str, np.ndarray | Array] = {
            "point_coords": coords,
            "point_labels": labels,
            "point_valid": np.broadcast_to(np.arange(model.max_clicks) <= step, shape),
        }
        if step == 0:
            first = {field: values[:, :, :1] for field, values in points.items()}
            candidates, choice, logits = model.propose(variables, batch, model.prompts(**first))
        else:
            if protocol.feeds_logits:
                points |= {"mask_logits": logits, "mask_valid": everywhere}
            logits = model.refine(variables, batch, model.prompts(**points))
            candidates, choice = logits[:, :, None], np.zeros(shape[:2], int)
        candidates, choice = np.asarray(candidates), np.asarray(choice)
        is_last = step + 1 == model.max_clicks

        def look(item, candidates=candidates, choice=choice, is_last=is_last):
            place, user = item
            predictions = _restore(model, user.target, candidates[place])
            user.look(predictions, int(choice[place]), is_last)

        list(pool.map(look, active.items()))
        active = {place: user for place, user in active.items() if len(user.clicks) > step + 1}
        if not active:
            break
    return [user.outcome(name, model.max_clicks) for user in users.values()]


def run_boxes(
    model: CompiledModel, variables: dict, batch: TargetBatch, *, pool: Executor
) -> list[Outcome]:
    """Outcome of prompting with each mask's own tight box.

    Of the three answers, the model's favourite counts as ``box`` and the best as ``box_oracle``.
    """
    shape = (model.num_rows, model.num_columns)
    boxes = np.zeros((*shape, 4), np.float32)
    for place, target in batch.targets.items():
        boxes[place] = target.model_box_xyxy
    prompts = model.prompts(boxes_xyxy=boxes, box_valid=np.ones(shape, bool))
    candidates, choice, _ = model.propose(variables, batch, prompts)
    candidates, choice = np.asarray(candidates), np.asarray(choice)

    def score(item):
        place, target = item
        predictions = _restore(model, target, candidates[place])
        ious = [mask_iou(prediction, target.ground_truth) for prediction in predictions]
        chosen = choice[place]
        return Outcome(
            target,
            {BOX_PROTOCOL: ious[chosen], f"{BOX_PROTOCOL}_{ORACLE}": max(ious)},
            predictions[chosen],
        )

    return list(pool.map(score, batch.targets.items()))


class _User:
    """Someone who has one mask in mind and clicks until the model has it."""

    def __init__(self, target: Target, first_click: Click):
        self.target = target
        self.clicks = [first_click]
        self._ious: list[float] = []

    def look(self, predictions: list[np.ndarray], choice: int, is_last: bool) -> None:
        """Scores an answer and, unless it is the last, finds where to click next."""
        ground_truth = self.target.ground_truth
        ious = [mask_iou(prediction, ground_truth) for prediction in predictions]
        if not self._ious:
            self._oracle = max(ious)
        self._ious.append(ious[choice])
        self._prediction = predictions[choice]
        if not is_last:
            click = correction_click(ground_truth, self._prediction, self.clicks)
            if click is not None:
                self.clicks.append(click)

    def outcome(self, name: str, num_clicks: int) -> Outcome:
        ious = {f"{name}_1_{ORACLE}": self._oracle}
        for step in range(num_clicks):
            ious[f"{name}_{step + 1}"] = self._ious[min(step, len(self._ious) - 1)]
        return Outcome(self.target, ious, self._prediction, tuple(self.clicks))


def _restore(model, target, candidates):
    original_hw = target.ground_truth.shape
    return [
        restore_mask(logits, model.image_size, target.image.resized_hw, original_hw)
        for logits in candidates
    ]
