"""A model of tiny width with every feature of the published ones, and prompts of every kind.

Its grid is not square and no multiple of its windows, and no two of its widths are equal.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_jax.models import masked_autoencoder
from sam_jax.models.image_encoder import ImageEncoderConfig
from sam_jax.models.mask_decoder import MaskDecoderConfig
from sam_jax.models.masked_autoencoder import MaskedAutoencoder
from sam_jax.models.prompt_encoder import Prompts
from sam_jax.models.sam import SamConfig, variable_shapes

TINY = SamConfig(
    ImageEncoderConfig(
        image_size=(40, 48),
        patch_size=4,
        embed_dim=24,
        depth=3,
        num_heads=3,
        global_attention_blocks=(1,),
        window_size=7,
        mlp_rate=2.0,
        output_dim=32,
    ),
    MaskDecoderConfig(num_heads=4, mlp_dim=40, iou_head_dim=20),
    mask_channels=12,
)

# A block of each kind and a layer, for tests of what is around the model: it compiles sooner.
SHALLOW = dataclasses.replace(
    TINY,
    image_encoder=dataclasses.replace(TINY.image_encoder, depth=2),
    mask_decoder=dataclasses.replace(TINY.mask_decoder, depth=1),
)

# What the published code answers for them; tests/parity/test_frozen.py writes the file.
FROZEN = Path(__file__).with_name("parity_tiny.npz")
# Dense maps are kept at every fifth row and column: these meet every place within a grid cell.
FROZEN_STRIDE = 5


def load_frozen() -> dict[str, np.ndarray]:
    """Weights, inputs and the published code's outputs."""
    with np.load(FROZEN) as file:
        return dict(file)


def random_variables(config: SamConfig, seed: int = 0) -> dict[str, Any]:
    """Variables without a compiled initialiser, none of them zero, activations of order one."""
    return _random(variable_shapes(config), seed)


def random_autoencoder(model: MaskedAutoencoder, seed: int = 0) -> dict[str, Any]:
    """As ``random_variables``, of a masked autoencoder."""
    template = jax.eval_shape(lambda: masked_autoencoder.init_variables(model, jax.random.key(0)))
    return _random(template, seed)


def _random(template: Any, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def value(path: Any, leaf: Any) -> jax.Array:
        name = path[-1].key
        # All kernels but those of convolutions have one axis of inputs, the first.
        fan_in = int(np.prod(leaf.shape[:-1])) if len(leaf.shape) == 4 else leaf.shape[0]
        scale = {"kernel": fan_in**-0.5, "bias": 0.2, "scale": 0.2}.get(name, 0.5)
        draw = (name == "scale") + scale * rng.standard_normal(leaf.shape)
        return jnp.asarray(draw.astype(np.float32))

    found: dict[str, Any] = jax.tree_util.tree_map_with_path(value, template)
    return found


@dataclasses.dataclass(frozen=True)
class PromptKinds:
    """Kinds of prompts that an object has."""

    num_points: int = 0
    box: bool = False
    mask: bool = False


EVERY_COMBINATION = {
    "one_point": PromptKinds(num_points=1),
    "n_points": PromptKinds(num_points=4),
    "box": PromptKinds(box=True),
    "box_and_point": PromptKinds(num_points=1, box=True),
    "box_and_points": PromptKinds(num_points=3, box=True),
    "mask": PromptKinds(mask=True),
    "mask_and_point": PromptKinds(num_points=1, mask=True),
    "mask_and_points": PromptKinds(num_points=3, mask=True),
    "mask_and_box": PromptKinds(box=True, mask=True),
    "all": PromptKinds(num_points=2, box=True, mask=True),
    "none": PromptKinds(),
}


def random_prompts(
    kinds: PromptKinds, num_objects: int, image_size: tuple[int, int], low_res_size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Prompts of one image, under the published code's names."""
    rng = np.random.default_rng([kinds.num_points, kinds.box, kinds.mask, num_objects])
    height, width = image_size
    corner = np.array([width, height], np.float32)
    prompts: dict[str, np.ndarray] = {}
    if kinds.num_points:
        shape = (num_objects, kinds.num_points)
        prompts["point_coords"] = rng.uniform(0, corner, (*shape, 2)).astype(np.float32)
        # Every fourth point is one that says "not a point".
        labels = rng.integers(0, 2, shape)
        labels[:, 3::4] = -1
        prompts["point_labels"] = labels
    if kinds.box:
        ends = np.sort(rng.uniform(0, corner, (num_objects, 2, 2)), axis=1)
        prompts["boxes"] = ends.reshape(num_objects, 4).astype(np.float32)
    if kinds.mask:
        quarters = rng.integers(-40, 41, (num_objects, 1, *low_res_size))
        prompts["mask_inputs"] = (quarters / 4).astype(np.float32)
    return prompts


def native_prompts(prompts: Mapping[str, np.ndarray]) -> Prompts:
    """The same prompts for a batch of one image."""
    given = {key: jnp.asarray(value)[None] for key, value in prompts.items()}
    fields = {}
    if "point_coords" in given:
        fields["point_coords"] = given["point_coords"]
        fields["point_labels"] = given["point_labels"].astype(jnp.int32)
        fields["point_valid"] = jnp.ones(given["point_labels"].shape, bool)
    if "boxes" in given:
        fields["boxes_xyxy"] = given["boxes"]
        fields["box_valid"] = jnp.ones(given["boxes"].shape[:2], bool)
    if "mask_inputs" in given:
        fields["mask_logits"] = given["mask_inputs"][:, :, 0]
        fields["mask_valid"] = jnp.ones(given["mask_inputs"].shape[:2], bool)
    return Prompts(**fields)


def ragged_batch(
    objects: Sequence[Sequence[Mapping[str, np.ndarray]]], low_res_size: tuple[int, int]
) -> Prompts:
    """The first prompt of each record, image by image; what an object lacks is garbage."""
    b, p, n = len(objects), max(map(len, objects)), 4
    fields: dict[str, Any] = {
        "point_coords": np.full((b, p, n, 2), np.nan, np.float32),
        "point_labels": np.full((b, p, n), 7, np.int32),
        "point_valid": np.zeros((b, p, n), bool),
        "boxes_xyxy": np.full((b, p, 4), np.inf, np.float32),
        "box_valid": np.zeros((b, p), bool),
        "mask_logits": np.full((b, p, *low_res_size), np.nan, np.float32),
        "mask_valid": np.zeros((b, p), bool),
    }
    for image, prompts_of_image in enumerate(objects):
        for index, prompts in enumerate(prompts_of_image):
            at = image, index
            if "point_coords" in prompts:
                # The valid points need not come first.
                places = slice(n - prompts["point_coords"].shape[1], None)
                fields["point_coords"][*at, places] = prompts["point_coords"][0]
                fields["point_labels"][*at, places] = prompts["point_labels"][0]
                fields["point_valid"][*at, places] = True
            if "boxes" in prompts:
                fields["boxes_xyxy"][at] = prompts["boxes"][0]
                fields["box_valid"][at] = True
            if "mask_inputs" in prompts:
                fields["mask_logits"][at] = prompts["mask_inputs"][0, 0]
                fields["mask_valid"][at] = True
    return Prompts(**jax.tree.map(jnp.asarray, fields))
