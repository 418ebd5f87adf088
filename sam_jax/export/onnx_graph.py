"""A small writer of ONNX graphs, and the layers that encoder and decoder share.

The graphs are written by hand, not traced: their operators are those of version 17, which runtimes
in browsers and on phones have, sizes that clients vary stay free, and every weight keeps its
published name.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sam_jax.weights.files import WeightsError

OPSET = 17
# The file format that came with those operators.
IR_VERSION = 8
# A message of protocol buffers ends at 2 GiB.
LARGEST_MESSAGE = 2**31 - 2**24
_PAGE = 4096
_SMALLEST_BESIDE = 1024


def import_onnx() -> Any:
    """The onnx package, or a word on how to get it.

    Raises:
      WeightsError: if it is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise WeightsError("writing ONNX needs: pip install 'sam-jax[onnx]'") from None
    return onnx


class Graph:
    """Collects operators and weights; a tensor is the name of what made it.

    Args:
      weights: tensors by their published names, float32.
    """

    def __init__(self, weights: Mapping[str, np.ndarray]):
        self._onnx = import_onnx()
        self._weights = weights
        self._nodes: list[Any] = []
        self._initializers: dict[str, np.ndarray] = {}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The one output of an operator."""
        output = f"{kind}_{len(self._nodes)}"
        self._nodes.append(
            self._onnx.helper.make_node(kind, inputs, [output], name=output, **attributes)
        )
        return output

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """A tensor that the graph carries."""
        return self._initializer(f"constant_{len(self._initializers)}", np.asarray(values, dtype))

    def integers(self, *values: int) -> str:
        """A vector of int64, as operators take shapes and axes."""
        return self.constant(values, np.int64)

    def weight(self, name: str) -> str:
        """A weight as published."""
        return self._initializer(name, self._weights[name])

    def array(self, name: str) -> np.ndarray:
        """A weight's values."""
        return self._weights[name]

    def transposed_weight(self, name: str) -> str:
        """A matrix as published, rows and columns exchanged."""
        return self._initializer(f"{name}.T", self._weights[name].T)

    def _initializer(self, name: str, array: np.ndarray) -> str:
        self._initializers.setdefault(name, array)
        return name

    def name_output(self, tensor: str, name: str) -> None:
        """Gives a tensor the name under which clients ask for it."""
        self._nodes.append(
            self._onnx.helper.make_node("Identity", [tensor], [name], name=f"output_{name}")
        )

    def declare(
        self,
        name: str,
        inputs: Mapping[str, Sequence[int | str]],
        outputs: Mapping[str, Sequence[int | str]],
    ) -> None:
        """Says what the graph is called, takes and gives.

        Args:
          name: of the graph.
          inputs: shapes by name, float32; a word is a size that may vary.
          outputs: the same.
        """
        self._name, self._inputs, self._outputs = name, inputs, outputs

    def write(self, path: Path, largest_message: int = LARGEST_MESSAGE) -> None:
        """Writes the graph, and checks what was written.

        Weights that are too large for one message lie in a file of their own, which has the graph's
        name and ``.data`` after it. They are written one after the other, never copied as a whole.
        """
        helper, float32 = self._onnx.helper, self._onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self._nodes,
            self._name,
            [helper.make_tensor_value_info(n, float32, list(s)) for n, s in self._inputs.items()],
            [helper.make_tensor_value_info(n, float32, list(s)) for n, s in self._outputs.items()],
        )
        model = helper.make_model(
            graph,
            producer_name="sam_jax",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        num_bytes = sum(array.nbytes for array in self._initializers.values())
        with contextlib.ExitStack() as stack:
            data = None
            if num_bytes >= largest_message:
                data = stack.enter_context(path.with_name(f"{path.name}.data").open("wb"))
            for name, array in self._initializers.items():
                # Runtimes read shapes and axes before they open other files.
                if data is not None and array.nbytes >= _SMALLEST_BESIDE:
                    tensor = self._beside(name, array, data)
                else:
                    tensor = self._onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
                model.graph.initializer.append(tensor)
        path.write_bytes(model.SerializeToString())
        del model
        self._onnx.checker.check_model(str(path))

    def _beside(self, name: str, array: np.ndarray, data: BinaryIO) -> Any:
        """A tensor whose values go into another file."""
        tensor = self._onnx.TensorProto(
            name=name,
            dims=array.shape,
            data_type=self._onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=self._onnx.TensorProto.EXTERNAL,
        )
        # Aligned as memory pages are, so that runtimes can map them.
        data.seek(-data.tell() % _PAGE, os.SEEK_CUR)
        where = {
            "location": Path(data.name).name,
            "offset": str(data.tell()),
            "length": str(array.nbytes),
        }
        for key, value in where.items():
            tensor.external_data.add(key=key, value=value)
        np.asarray(array, order="C").tofile(data)
        return tensor

    # --- Layers -------------------------------------------------------------------------------

    def dense(self, x: str, name: str) -> str:
        """A linear layer on the last axis."""
        product = self.op("MatMul", x, self.transposed_weight(f"{name}.weight"))
        return self.op("Add", product, self.weight(f"{name}.bias"))

    def layer_norm(self, x: str, name: str, epsilon: float) -> str:
        """Normalises the last axis."""
        return self.op(
            "LayerNormalization",
            x,
            self.weight(f"{name}.weight"),
            self.weight(f"{name}.bias"),
            axis=-1,
            epsilon=epsilon,
        )

    def channel_norm(self, x: str, name: str) -> str:
        """Normalises axis 1 of [b, c, h, w]."""
        last = self.op("Transpose", x, perm=[0, 2, 3, 1])
        return self.op("Transpose", self.layer_norm(last, name, 1e-6), perm=[0, 3, 1, 2])

    def gelu(self, x: str) -> str:
        """The exact form; an operator of its own came after version 17."""
        erf = self.op("Erf", self.op("Mul", x, self.constant(np.sqrt(0.5))))
        gate = self.op("Mul", self.op("Add", erf, self.constant(1.0)), self.constant(0.5))
        return self.op("Mul", x, gate)

    def convolution(self, x: str, name: str, *, bias: bool = True, **attributes: Any) -> str:
        """A convolution of [b, c, h, w]."""
        names = [f"{name}.weight", f"{name}.bias"][: 2 if bias else 1]
        return self.op("Conv", x, *map(self.weight, names), **attributes)

    def reshape(self, x: str, *sizes: int) -> str:
        """``0`` keeps an axis, ``-1`` is what is left."""
        return self.op("Reshape", x, self.integers(*sizes))

    def split_heads(self, x: str, num_heads: int, head_dim: int) -> str:
        """[b, n, (a c)] to [b, a, n, c]."""
        return self.op("Transpose", self.reshape(x, 0, -1, num_heads, head_dim), perm=[0, 2, 1, 3])

    def merge_heads(self, x: str, dim: int) -> str:
        """[b, a, n, c] to [b, n, (a c)]."""
        return self.reshape(self.op("Transpose", x, perm=[0, 2, 1, 3]), 0, -1, dim)
