"""A model on a mesh of devices: who works on which images, and what travels between devices.

Devices work on their own images inside ``jax.shard_map``. A module knows nothing of it: what a
device stores of a dense layer's weights is gathered where the layer is called, by an interceptor of
linen's, in the way that the one table of shardings says (``sharding.tree_shardings``).
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sam_jax.arrays import Array
from sam_jax.errors import ConfigError
from sam_jax.models.image_encoder import EncoderBlock
from sam_jax.models.layers import Dense
from sam_jax.models.mask_decoder import MaskPrediction
from sam_jax.models.sam import Sam
from sam_jax.ops.dispatch import Check, Kernels, Target, check_kernels, tracing_for
from sam_jax.ops.full_precision import add_bias
from sam_jax.sharding import axis_names, path_name

# How an axis of an array is sharded: images over the batch's mesh axes, objects or heads over the
# tensor axis; None for not at all.
BATCH = "batch"
TENSOR = "tensor"
Spread: TypeAlias = str | None
_Tree = TypeVar("_Tree")


def gather_to_all_devices(tree: _Tree, everywhere: NamedSharding) -> _Tree:
    """Arrays, whole on each of this host's devices.

    Where several hosts share an array it is gathered, so all of them must call this.

    Args:
      tree: of arrays.
      everywhere: the devices, with nothing split.
    """

    def whole(leaf: Any) -> Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_put(leaf, everywhere)

    return jax.tree.map(whole, tree)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A mesh, and what its axes are for.

    Attributes:
      mesh: of all devices; None for JAX's default device.
      batch_axes: over which images are spread.
      tensor_axis: over which heads, hidden channels and prompted objects of an image are spread;
        None if there is none.
      weights_axis: over which stored weights are split; None if there is none.
      reduce_dtype: type in which gradients of split weights are summed; None for their own.
      kernels: see ``ops.dispatch.Target``.
    """

    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ()
    tensor_axis: str | None = None
    weights_axis: str | None = None
    reduce_dtype: str | None = None
    kernels: Kernels = "auto"

    @property
    def is_single(self) -> bool:
        """True if there is one device only, and so nothing to shard."""
        return self.mesh is None or self.mesh.size == 1

    @property
    def platform(self) -> str:
        """Platform that programs are compiled for: "cpu", "gpu" or "tpu"."""
        return self._target.platform or jax.default_backend()

    @property
    def _target(self) -> Target:
        """Dispatch target for tracing the program of a single device."""
        if self.mesh is None:
            return Target(kernels=self.kernels)
        return Target.of(self.mesh.devices.flat[0], kernels=self.kernels)

    def check_kernels(self) -> list[Check]:
        """Checks the kernels that programs on these devices may use; none where there are none."""
        return check_kernels(self._target)

    @property
    def num_tensor(self) -> int:
        """Devices that share the work on an image."""
        return self._size(self.tensor_axis)

    @property
    def num_batch(self) -> int:
        """Devices, or groups of them, that see different images."""
        return math.prod(self._size(axis) for axis in self.batch_axes)

    @property
    def num_shards(self) -> int:
        """Devices over which stored weights are split."""
        return self._size(self.weights_axis)

    def _size(self, axis: str | None) -> int:
        return 1 if self.mesh is None or axis is None else self.mesh.shape[axis]

    def spec(self, *spread: Spread) -> PartitionSpec:
        """An array's leading axes spread as named, the others whole."""
        tensor = (self.tensor_axis,) if self.tensor_axis else ()
        of_mesh = {BATCH: self.batch_axes, TENSOR: tensor}
        return PartitionSpec(
            *((of_mesh[name] or None) if name is not None else None for name in spread)
        )

    def on_each_device(
        self, function: Callable[..., Any], in_specs: Sequence[Any], out_specs: Any
    ) -> Callable[..., Any]:
        """``function``, run by each device on its own shards of the arguments.

        Kernels are opaque to the compiler, and so are loops over images: it would bring everything
        together on every device.
        """

        # Under its own name, by which profiles and the compilation cache list it.
        @functools.wraps(function)
        def traced(*arguments: Any) -> Any:
            with tracing_for(self._target):
                return function(*arguments)

        if self.is_single:
            return traced
        return jax.shard_map(
            traced,
            mesh=self.mesh,
            in_specs=tuple(in_specs),
            out_specs=out_specs,
            check_vma=False,
        )

    def with_weights(
        self,
        function: Callable[..., Any],
        param_specs: Any | None,
        in_specs: Sequence[Any],
        out_specs: Any,
    ) -> Callable[..., Any]:
        """``function`` of parameters and arrays, by each device on its own shards of the arrays.

        Stored shards of weights are gathered where a dense layer is called.

        Args:
          function: applies a model to its parameters.
          param_specs: how they are stored, as a tree like theirs; None for whole ones.
          in_specs: of the other arguments.
          out_specs: of what it returns.
        """
        shards = None if self.is_single or param_specs is None else WeightShards(self, param_specs)

        @functools.wraps(function)
        def of_device(params: Any, *arrays: Any) -> Any:
            if shards is None:
                return function(params, *arrays)
            with shards.gathering_in_layers():
                return function(shards.gather_non_dense(params), *arrays)

        specs = PartitionSpec() if param_specs is None else param_specs
        return self.on_each_device(of_device, [specs, *in_specs], out_specs)

    def encode(self, model: Sam, param_specs: Any | None = None) -> Callable[..., Array]:
        """``Sam.encode``, by each device on its own images.

        Args:
          model: the model.
          param_specs: see ``with_weights``.

        Returns:
          a function of parameters, normalised images, and factors of dropped paths or None.
        """

        def encode(params: Any, images: Array, path_scales: Array | None) -> Any:
            return model.apply({"params": params}, images, path_scales, method="encode")

        in_specs = [self.spec(BATCH), self.spec(None, None, BATCH)]
        return self.with_weights(encode, param_specs, in_specs, self.spec(BATCH))

    def decode(self, model: Sam) -> Callable[..., MaskPrediction]:
        """``Sam.decode``, by each device on its own images.

        Returns:
          a function of variables, embeddings, prompts and ``multimask_output``.
        """

        def decode(variables: Any, embeddings: Array, prompts: Any, multimask_output: bool) -> Any:
            of_device = self.on_each_device(
                lambda *arguments: model.apply(
                    *arguments, multimask_output=multimask_output, method="decode"
                ),
                [PartitionSpec(), self.spec(BATCH), self.spec(BATCH)],
                self.spec(BATCH),
            )
            return of_device(variables, embeddings, prompts)

        return decode


class WeightShards:
    """Shards of all weights on one device, inside ``shard_map``, and their all-gather.

    Args:
      parallel: the mesh.
      specs: how parameters are stored, as a tree like theirs.
    """

    def __init__(self, parallel: Parallel, specs: Any):
        self._parallel = parallel
        leaves = jax.tree.leaves_with_path(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
        self._specs: dict[str, PartitionSpec] = {path_name(path): spec for path, spec in leaves}
        self._is_tensor_parallel = False

    def gather_non_dense(self, params: Any) -> Any:
        """Gathers all parameters but the kernels of dense layers, which gather their own."""

        def whole(path: Any, leaf: Array) -> Array:
            name = path_name(path)
            is_dense = name.endswith("/kernel") and leaf.ndim == 2
            return leaf if is_dense else self._gathered(leaf, self._specs[name])

        return jax.tree_util.tree_map_with_path(whole, params)

    def gathering_in_layers(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which dense layers gather their weights, and blocks are tensor parallel."""
        return nn.intercept_methods(self._intercept)

    def _intercept(self, next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name == "__call__":
            if isinstance(module, Dense):
                return self._dense(module, *args)
            is_whole = self._parallel.num_tensor > 1 and not self._is_tensor_parallel
            if isinstance(module, EncoderBlock) and is_whole:
                return self._block(module, *args)
        return next_method(*args, **kwargs)

    def _block(self, block: EncoderBlock, *args: Any) -> Any:
        """A block with this device's part of the heads and of the MLP's hidden channels."""
        num_parts = self._parallel.num_tensor
        part = block.clone(
            parent=None,
            num_heads=block.num_heads // num_parts,
            mlp_dim=block.mlp_dim // num_parts,
        )
        self._is_tensor_parallel = True
        try:
            return part.apply({"params": block.variables["params"]}, *args)
        finally:
            self._is_tensor_parallel = False

    def _dense(self, layer: Dense, x: Array) -> Array:
        """Output of a dense layer, computed from this device's shards of its weights."""
        params = layer.variables["params"]
        spec = self._spec_of("/".join((*layer.path, "kernel")))
        # Cast to the computation's type before it is sent between devices.
        kernel, bias = self._gathered(params["kernel"].astype(layer.dtype), spec), params["bias"]
        # The kernel's rows are this device's, if the tensor axis stores a part of them.
        of_inputs = axis_names(next(iter(spec), None))
        is_stored_in_parts = self._parallel.tensor_axis in of_inputs
        num_inputs = kernel.shape[0] * (self._parallel.num_tensor if is_stored_in_parts else 1)
        if layer.name == "qkv":
            kernel, bias = (self._local_heads(w, layer.features // 3) for w in (kernel, bias))
        kernel, bias = (self._local_shard(w, layer.features, -1) for w in (kernel, bias))
        kernel = self._local_shard(kernel, x.shape[-1], 0)
        y = jnp.matmul(x.astype(layer.dtype), kernel, precision=layer.precision)
        if x.shape[-1] < num_inputs:
            # Each device has the products of its own input channels.
            y = jax.lax.psum(y, self._parallel.tensor_axis)
        return add_bias(y, bias)

    def _spec_of(self, name: str) -> PartitionSpec:
        """The spec of a parameter, by its path in the model or inside of a block."""
        found = {spec for path, spec in self._specs.items() if f"/{path}".endswith(f"/{name}")}
        if len(found) != 1:
            raise ConfigError(f"sharding.rules split {name} of the encoder's blocks differently")
        return found.pop()

    def _local_heads(self, weight: Array, width: int) -> Array:
        """This device's heads of a weight with queries, keys and values side by side."""
        packed = rearrange(weight, "... (three e) -> ... three e", three=3)
        return rearrange(self._local_shard(packed, width, -1), "... three e -> ... (three e)")

    def _local_shard(self, weight: Array, size: int, axis: int) -> Array:
        """This device's part of an axis, or all of it if that has the size already."""
        if weight.shape[axis] == size:
            return weight
        first = jax.lax.axis_index(self._parallel.tensor_axis) * size
        return jax.lax.dynamic_slice_in_dim(weight, first, size, axis % weight.ndim)

    def _gathered(self, shard: Array, spec: PartitionSpec) -> Array:
        """A weight from the shards in which the weights' axis stores it."""
        parallel = self._parallel
        for axis, names in enumerate(spec):
            if parallel.weights_axis in axis_names(names) and parallel.num_shards > 1:
                return all_gathered(shard, parallel.weights_axis, axis, parallel.reduce_dtype)
        return shard


def all_gathered(shard: Array, mesh_axis: Any, axis: int, reduce_dtype: str | None) -> Array:
    """All-gathers a weight that is sharded along an axis; inside ``shard_map`` only.

    The backward pass reduce-scatters its gradient, in ``reduce_dtype``.
    """

    @jax.custom_vjp
    def gather(shard):
        return jax.lax.all_gather(shard, mesh_axis, axis=axis, tiled=True)

    def scatter(_, gradient):
        gradient = gradient.astype(reduce_dtype or gradient.dtype)
        summed = jax.lax.psum_scatter(gradient, mesh_axis, scatter_dimension=axis, tiled=True)
        return (summed.astype(shard.dtype),)

    gather.defvjp(lambda shard: (gather(shard), None), scatter)
    return gather(shard)
