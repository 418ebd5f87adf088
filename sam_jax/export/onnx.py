"""A folder of ONNX files: encoder, decoder, and both in 8 bits."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sam_jax.export.onnx_decoder import DecoderOptions, decoder_graph
from sam_jax.export.onnx_encoder import encoder_graph
from sam_jax.export.onnx_graph import LARGEST_MESSAGE, Graph, import_onnx
from sam_jax.export.onnx_tiny_vit import tiny_vit_graph
from sam_jax.models.sam import SamConfig
from sam_jax.models.tiny_vit import TinyViTConfig
from sam_jax.ops.images import RGB
from sam_jax.weights.files import WeightsError, written_whole
from sam_jax.weights.names import from_native

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
# Says, of images other than published models take, how they are normalised.
CHANNELS = "channels.json"


# Parts of the names of weights that are not quantised.
_EXACT_WEIGHTS = ("positional_encoding_gaussian_matrix", "q_proj", "k_proj")


def export_onnx(
    folder: str | Path,
    config: SamConfig,
    variables: Mapping[str, Any],
    *,
    options: DecoderOptions | None = None,
    int8: bool = False,
    on_progress: Callable[[str], None] = lambda message: None,
) -> None:
    """Writes ``encoder.onnx`` and ``decoder.onnx``, whole or not at all.

    Images other than published models take, and their mean and deviation, are in ``channels.json``.

    Args:
      folder: to write; must be new or empty.
      config: the model's shape.
      variables: ``{"params": ..., "constants": ...}``.
      options: what the decoder answers; None for all four masks and nothing else.
      int8: also ``encoder.int8.onnx`` and ``decoder.int8.onnx``, whose matrices are quantised and
        whose activations are at run time; a quarter of the size.
      on_progress: told what is being done.

    Raises:
      WeightsError: if onnx (or onnxruntime, which quantises) is missing, or writing fails.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder} is there already; give a new or an empty folder")
    import_onnx()
    quantize = _import_quantizer() if int8 else None
    as_float32 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), dict(variables))
    weights = from_native(as_float32, "official", channels=config.channels.count)
    graphs = {
        ENCODER: lambda: _encoder_graph(weights, config),
        DECODER: lambda: decoder_graph(weights, config, options or DecoderOptions()),
    }
    with written_whole(folder) as unfinished:
        unfinished.mkdir()
        if config.channels != RGB:
            text = json.dumps(dataclasses.asdict(config.channels), indent=2)
            (unfinished / CHANNELS).write_text(text + "\n")
        for name, build in graphs.items():
            on_progress(f"writing {name}")
            build().write(unfinished / name, LARGEST_MESSAGE)
            if quantize is not None:
                small = name.replace(".onnx", ".int8.onnx")
                on_progress(f"writing {small}")
                quantize(unfinished / name, unfinished / small)


def _encoder_graph(weights: Mapping[str, np.ndarray], config: SamConfig) -> Graph:
    encoder = config.image_encoder
    if isinstance(encoder, TinyViTConfig):
        return tiny_vit_graph(weights, encoder)
    return encoder_graph(weights, encoder)


def _import_quantizer() -> Callable[[Path, Path], None]:
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        raise WeightsError("writing int8 needs: pip install 'sam-jax[onnx]'") from None

    def quantize(source: Path, target: Path) -> None:
        with _quiet_root_logger():
            quantize_dynamic(
                source,
                target,
                # Products only: kernels of convolutions gain nothing, and runtimes differ in them.
                op_types_to_quantize=["MatMul"],
                weight_type=QuantType.QUInt8,
                per_channel=True,
                nodes_to_exclude=_exact_products(source),
                # Where the library does not follow the shapes; there is nothing else to quantise.
                extra_options={"DefaultTensorType": import_onnx().TensorProto.FLOAT},
                use_external_data_format=source.with_name(f"{source.name}.data").exists(),
            )

    return quantize


def _exact_products(path: Path) -> list[str]:
    """Nodes of a graph that stay in float32 where the others are quantised.

    Those are the product that makes positions of coordinates, whose sine and cosine follow, and the
    decoder's queries and keys, whose products decide where a prompt looks: on trained weights they
    are most of what 8 bits cost the decoder (docs/weights.md). So do tables of relative positions,
    which are no matrices with channels of their own.
    """
    graph = import_onnx().load(path, load_external_data=False).graph
    exact = {
        weight.name
        for weight in graph.initializer
        if len(weight.dims) != 2 or any(part in weight.name for part in _EXACT_WEIGHTS)
    }
    return [node.name for node in graph.node if exact.intersection(node.input)]


@contextlib.contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Without the quantiser's advice to pre-process graphs, which these do not need."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
