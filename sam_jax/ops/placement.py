"""Where a model runs, for what the compiler cannot split over devices by itself."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sam_jax.arrays import Array

# What an axis of an array is spread over: images over the batch's mesh axes; heads, hidden channels
# or objects over the tensor axis; the state's pieces over the weights' axis; or nothing.
BATCH = "batch"
TENSOR = "tensor"
WEIGHTS = "weights"
# Whether a TPU's kernels are used, or run without one, slowly.
Kernels: TypeAlias = Literal["none", "compiled", "interpreted"]
Spread: TypeAlias = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices of a model, or none in particular: JAX's default one.

    Attributes:
      mesh: of all devices; None for one device, or for the view from inside ``shard_map``.
      batch_axes: the mesh's axes over which images are spread.
      tensor_axis: the axis over which heads, hidden channels and prompted objects of an image are
        spread; None if there is none.
      weights_axis: the axis over which stored weights are split; None if there is none.
      reduce_dtype: type in which gradients of split weights are summed; None for their own.
      inside_of: the mesh that a device is inside of.
      named_platform: what ``platform`` says without a mesh; None for JAX's default.
    """

    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ()
    tensor_axis: str | None = None
    weights_axis: str | None = None
    reduce_dtype: str | None = None
    inside_of: Mesh | None = None
    named_platform: str | None = None

    @property
    def _any_mesh(self) -> Mesh | None:
        return self.mesh if self.inside_of is None else self.inside_of

    @property
    def platform(self) -> str:
        """What the program will be compiled for: "cpu", "gpu" or "tpu"."""
        if self._any_mesh is None:
            return self.named_platform or jax.default_backend()
        return self._any_mesh.devices.flat[0].platform

    @property
    def kernels(self) -> Kernels:
        """In which form a TPU's kernels can be used: not where the compiler divides the work."""
        is_divided = self.mesh is not None and self.mesh.size > 1
        return "compiled" if self.platform == "tpu" and not is_divided else "none"

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """Of an NVIDIA GPU, as in (9, 0); None for other devices."""
        if self.platform != "gpu":
            return None
        device = jax.devices()[0] if self._any_mesh is None else self._any_mesh.devices.flat[0]
        # AMD's GPUs are of the same platform, and say "gfx942".
        numbers = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
        return None if numbers is None else (int(numbers[1]), int(numbers[2]))

    def size(self, axis: str | None) -> int:
        """Devices along one of the mesh's axes."""
        return 1 if self._any_mesh is None or axis is None else self._any_mesh.shape[axis]

    @property
    def num_tensor(self) -> int:
        """Devices that share the work of an image."""
        return self.size(self.tensor_axis)

    @property
    def inside(self) -> "Placement":
        """The same, as each device sees it from inside ``shard_map``."""
        if self.mesh is None or self.mesh.size == 1:
            return self
        return dataclasses.replace(self, mesh=None, inside_of=self.mesh)

    def spec(self, *spread: Spread) -> PartitionSpec:
        """An array's leading axes spread as named, the others whole."""
        of_mesh = {
            BATCH: self.batch_axes,
            TENSOR: (self.tensor_axis,),
            WEIGHTS: (self.weights_axis,),
        }

        def axes_of(names: Spread) -> tuple[str, ...] | None:
            if names is None:
                return None
            names = (names,) if isinstance(names, str) else names
            return tuple(axis for name in names for axis in of_mesh[name] if axis) or None

        return PartitionSpec(*(axes_of(names) for names in spread))

    def constrain(self, x: Array, *spread: Spread) -> Array:
        """``x`` with its leading axes spread over the devices as named, the others whole."""
        if self.mesh is None or self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(*spread)))

    def on_each_device(
        self, function: Callable[..., Any], in_specs: Sequence[Any], out_specs: Any
    ) -> Callable[..., Any]:
        """``function``, run by each device on its own share of the arguments.

        Kernels are opaque to the compiler, and so are loops over images: it would bring everything
        together on every device.
        """
        if self.mesh is None or self.mesh.size == 1:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=False
        )

    def whole(self, piece: Array) -> Array:
        """A weight from the pieces of its first axis that devices store; ``inside`` only.

        Its gradient is summed over those devices in ``reduce_dtype``, and each keeps its own piece.
        """
        axis = self.weights_axis
        if self.inside_of is None or self.size(axis) == 1:
            return piece

        @jax.custom_vjp
        def gathered(piece):
            return jax.lax.all_gather(piece, axis, axis=0, tiled=True)

        def scattered(_, gradient):
            gradient = gradient.astype(self.reduce_dtype or gradient.dtype)
            summed = jax.lax.psum_scatter(gradient, axis, scatter_dimension=0, tiled=True)
            return (summed.astype(piece.dtype),)

        gathered.defvjp(lambda piece: (gathered(piece), None), scattered)
        return gathered(piece)

    def my_part(self, x: Array, axis: int) -> Array:
        """This device's share of an axis that is split over the tensor axis; ``inside`` only."""
        if self.inside_of is None or self.num_tensor == 1:
            return x
        size = x.shape[axis] // self.num_tensor
        first = jax.lax.axis_index(self.tensor_axis) * size
        return jax.lax.dynamic_slice_in_dim(x, first, size, axis)

    def summed(self, x: Array) -> Array:
        """The sum over the devices that share an image; ``inside`` only."""
        if self.inside_of is None or self.num_tensor == 1:
            return x
        return jax.lax.psum(x, self.tensor_axis)
