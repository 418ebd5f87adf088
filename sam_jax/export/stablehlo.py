"""The compiled-anywhere form: StableHLO of encoder and decoder, and the weights beside it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sam_jax.arrays import Array, Bool, Float, Int
from sam_jax.models.mask_decoder import MaskPrediction
from sam_jax.models.prompt_encoder import Prompts
from sam_jax.models.sam import Sam
from sam_jax.ops.dispatch import Target, tracing_for
from sam_jax.ops.images import RGB
from sam_jax.weights.files import (
    SAFETENSORS,
    WeightsError,
    put_safetensors,
    read_tensors,
    written_whole,
)

PLATFORMS = ("cpu", "cuda", "tpu")
ENCODER, DECODER, SIGNATURE = "encoder.stablehlo", "decoder.stablehlo", "signature.json"
_DECODER_INPUTS = (
    "image_embeddings",
    "point_coords",
    "point_labels",
    "point_valid",
    "boxes_xyxy",
    "box_valid",
    "mask_logits",
    "mask_valid",
)


def export_stablehlo(
    folder: str | Path,
    model: Sam,
    variables: Mapping[str, Any],
    *,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes a folder that runs wherever XLA does, without this package; whole or not at all.

    ``encoder.stablehlo`` is a serialised ``jax.export.Exported`` of ``(weights, images)``,
    ``decoder.stablehlo`` of ``(weights, *inputs)``; ``signature.json`` names inputs, shapes and
    types, and what images are normalised by where they are not as published; ``model.safetensors``
    holds the weights, once for both. Images ``b``, objects ``p`` and points ``n`` may be any
    number.

    Args:
      folder: to write; must be new or empty.
      model: the model.
      variables: ``{"params": ..., "constants": ...}``.
      platforms: what the files shall run on.

    Raises:
      WeightsError: if flatbuffers is missing, or writing fails.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder} is there already; give a new or an empty folder")
    encoder, decoder = _exported(model, variables, platforms)
    with written_whole(folder) as unfinished:
        unfinished.mkdir()
        (unfinished / ENCODER).write_bytes(_serialized(encoder))
        (unfinished / DECODER).write_bytes(_serialized(decoder))
        put_safetensors(
            unfinished / SAFETENSORS,
            {
                path: np.asarray(leaf, np.float32)
                for path, leaf in flatten_dict(variables, sep="/").items()
            },
        )
        signature: dict[str, Any] = {
            "platforms": list(platforms),
            "weights": f"a tree of {SAFETENSORS}, whose names are paths",
            "encoder": {
                "inputs": _described(("images",), encoder),
                "outputs": _described(("image_embeddings",), encoder, of_outputs=True),
            },
            "decoder": {
                "inputs": _described(_DECODER_INPUTS, decoder),
                "outputs": _described(
                    ("low_res_logits", "iou_predictions"), decoder, of_outputs=True
                ),
            },
        }
        if model.config.channels != RGB:
            signature["channels"] = dataclasses.asdict(model.config.channels)
        (unfinished / SIGNATURE).write_text(json.dumps(signature, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class ExportedSam:
    """Encoder and decoder as they were exported, with their weights.

    ``decode`` gives all three candidates and the single one, in the order of ``Sam.decode`` with
    ``multimask_output`` and without.
    """

    weights: dict[str, Any]
    encoder: jax.export.Exported
    decoder: jax.export.Exported

    def encode(self, images: Float[Array, "b h w c"]) -> Float[Array, "b gh gw d"]:
        """Image embeddings of normalised, padded images."""
        return self.encoder.call(self.weights, images)

    def decode(
        self, image_embeddings: Float[Array, "b gh gw d"], prompts: Prompts
    ) -> MaskPrediction:
        """Four candidates for each object; every kind of prompt must be given, valid or not."""
        inputs = (getattr(prompts, name) for name in _DECODER_INPUTS[1:])
        logits, ious = self.decoder.call(self.weights, image_embeddings, *inputs)
        return MaskPrediction(low_res_logits=logits, iou_predictions=ious)


def load_stablehlo(folder: str | Path) -> ExportedSam:
    """Reads what ``export_stablehlo`` wrote.

    Raises:
      WeightsError: if files are missing or damaged.
    """
    folder = Path(folder)
    flat = read_tensors(folder / SAFETENSORS)
    try:
        encoder, decoder = (
            jax.export.deserialize(bytearray((folder / name).read_bytes()))
            for name in (ENCODER, DECODER)
        )
    except ImportError:
        raise WeightsError("reading StableHLO needs: pip install 'sam-jax[stablehlo]'") from None
    # Damaged bytes end in errors of every kind, struct.error among them.
    except Exception as error:
        raise WeightsError(f"{folder} holds no whole StableHLO export: {error!r}") from error
    return ExportedSam(unflatten_dict(flat, sep="/"), encoder, decoder)


def _exported(
    model: Sam, variables: Mapping[str, Any], platforms: Sequence[str]
) -> tuple[jax.export.Exported, jax.export.Exported]:
    (height, width), (lh, lw) = model.image_size, model.low_res_size
    gh, gw = model.config.image_encoder.grid
    dim = model.config.image_encoder.output_dim
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), variables)

    def encode(weights: Any, images: Float[Array, "b h w c"]) -> Any:
        return model.apply(weights, images, method=Sam.encode)

    def decode(
        weights,
        image_embeddings: Float[Array, "b gh gw d"],
        point_coords: Float[Array, "b p n 2"],
        point_labels: Int[Array, "b p n"],
        point_valid: Bool[Array, "b p n"],
        boxes_xyxy: Float[Array, "b p 4"],
        box_valid: Bool[Array, "b p"],
        mask_logits: Float[Array, "b p lh lw"],
        mask_valid: Bool[Array, "b p"],
    ):
        prompts = Prompts(
            point_coords=point_coords,
            point_labels=point_labels,
            point_valid=point_valid,
            boxes_xyxy=boxes_xyxy,
            box_valid=box_valid,
            mask_logits=mask_logits,
            mask_valid=mask_valid,
        )
        candidates: list[Any] = [
            model.apply(
                weights, image_embeddings, prompts, multimask_output=multimask, method=Sam.decode
            )
            for multimask in (True, False)
        ]
        return (
            jnp.concatenate([c.low_res_logits for c in candidates], axis=2),
            jnp.concatenate([c.iou_predictions for c in candidates], axis=2),
        )

    b, p, n = jax.export.symbolic_shape("b, p, n")

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    f32, i32, boolean = jnp.float32, jnp.int32, jnp.bool_
    # Kernels are one platform's, and know their shapes.
    with tracing_for(Target(platform="cpu", kernels="none")):
        encoder = jax.export.export(jax.jit(encode), platforms=tuple(platforms))(
            weights, array((b, height, width, model.config.channels.count), f32)
        )
        decoder = jax.export.export(jax.jit(decode), platforms=tuple(platforms))(
            weights,
            array((b, gh, gw, dim), f32),
            array((b, p, n, 2), f32),
            array((b, p, n), i32),
            array((b, p, n), boolean),
            array((b, p, 4), f32),
            array((b, p), boolean),
            array((b, p, lh, lw), f32),
            array((b, p), boolean),
        )
    return encoder, decoder


def _serialized(exported: jax.export.Exported) -> bytes:
    try:
        return bytes(exported.serialize())
    except ImportError:
        raise WeightsError("writing StableHLO needs: pip install 'sam-jax[stablehlo]'") from None


def _described(
    names: Sequence[str], exported: jax.export.Exported, *, of_outputs: bool = False
) -> list[dict[str, Any]]:
    """Name, shape and type of each array, the weights left out."""
    avals = exported.out_avals if of_outputs else exported.in_avals[-len(names) :]
    return [
        {"name": name, "shape": [str(size) for size in aval.shape], "dtype": str(aval.dtype)}
        for name, aval in zip(names, avals, strict=True)
    ]
