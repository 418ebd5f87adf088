"""A mesh, and rules from the paths of a tree to its shardings. Knows no model."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sam_jax.errors import ConfigError

# What a dimension is spread over: a mesh axis, several (the first one's devices hold the larger
# pieces), or none.
Axes: TypeAlias = str | Sequence[str] | None
# A regular expression searched in a leaf's path, and the axes of each of its dimensions, aligned at
# the last one, so that a leading axis of layers needs no second rule.
Rule: TypeAlias = tuple[str, Sequence[Axes]]

BATCH_AXES = ("data", "fsdp")
WEIGHTS_AXIS = "fsdp"
TENSOR_AXIS = "tensor"
MESH_AXES = (*BATCH_AXES, TENSOR_AXIS)


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """Layout of arrays over devices.

    Attributes:
      data: devices that hold copies of the state and see different images; -1 takes all that
        ``fsdp`` leaves.
      fsdp: devices that share one copy of the state, and see different images too.
      tensor: devices that share the work on each image: attention's heads, the channels of MLPs,
        the prompted objects. For more devices than images.
      rules: what is split over ``fsdp`` and ``tensor``; the first rule that matches a path counts.
      cpu_devices: devices that a CPU without accelerators poses as; much of a small model's step
        runs on one core, so one for each core is faster than one for all. None for one.
      reduce_dtype: type in which gradients of weights that are split over ``fsdp`` are summed over
        those devices; "bfloat16" halves what travels, at 8 bits for each sum. Between their groups
        sums are float32.
      max_replicated_size: elements that an array may have and still be copied to every device
        without a rule that says so.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: Sequence[Rule] = ()
    cpu_devices: int | None = None
    reduce_dtype: str = "float32"
    max_replicated_size: int = 2**18

    def __post_init__(self) -> None:
        if self.reduce_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"reduce_dtype must be 'float32' or 'bfloat16', got {self.reduce_dtype!r}"
            )


def make_mesh(config: ShardingConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with axes ``data``, ``fsdp`` and ``tensor`` over all devices.

    Devices that share weights or images are close to each other. Slices of TPUs that only a network
    joins each have a part of ``data``.

    Raises:
      ConfigError: if the devices do not divide as the config says.
    """
    devices = jax.devices() if devices is None else devices
    shared = config.fsdp * config.tensor
    data = len(devices) // shared if config.data == -1 else config.data
    if data * shared != len(devices) or data < 1:
        raise ConfigError(
            f"sharding.data = {config.data}, sharding.fsdp = {config.fsdp} and sharding.tensor = "
            f"{config.tensor} do not multiply to the {len(devices)} devices there are"
        )
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % num_slices:
        raise ConfigError(
            f"a mesh with data = {data} does not divide by {num_slices} slices: those that share "
            "weights or images must be on one"
        )
    shape = (data // num_slices, config.fsdp, config.tensor)
    if num_slices == 1:
        # Groups need not be whole sides of a slice: 8 devices are half of two sides of 4 x 4 x 4.
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_hybrid_device_mesh(
            shape, (num_slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of images over all devices but those that share an image."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sharding of arrays that are the same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(tree: Any, mesh: Mesh | AbstractMesh, config: ShardingConfig) -> Any:
    """The sharding of every leaf of a tree of arrays or shapes.

    The mesh may be abstract, to see what a config means for devices that are not here.

    Raises:
      ConfigError: if a rule matches no leaf, a large leaf matches no rule, a rule names more
        dimensions than a leaf has, or a dimension does not divide by its axis.
    """
    unused = {pattern for pattern, _ in config.rules}

    def sharding(path, leaf):
        name = path_name(path)
        for pattern, axes in config.rules:
            if re.search(pattern, name):
                unused.discard(pattern)
                return NamedSharding(mesh, _spec(name, leaf.shape, axes, mesh))
        if leaf.size > config.max_replicated_size and config.rules:
            raise ConfigError(
                f"{name} {leaf.shape} matches no sharding rule and would be copied to every "
                f"device; add a rule for it (with axes () if the copies are meant)"
            )
        return replicated(mesh)

    shardings = jax.tree_util.tree_map_with_path(sharding, tree)
    if unused:
        raise ConfigError(f"sharding rules that match nothing: {sorted(unused)}")
    return shardings


def path_name(path: tuple) -> str:
    """A leaf's path as ``a/b/c``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(name: str, shape: tuple[int, ...], axes: Sequence[Axes], mesh: Mesh | AbstractMesh):
    if len(axes) > len(shape):
        raise ConfigError(f"the sharding rule for {name} {shape} has {len(axes)} dimensions")
    aligned = (None,) * (len(shape) - len(axes)) + tuple(axes)
    for size, of_dimension in zip(shape, aligned, strict=True):
        names = axis_names(of_dimension)
        if unknown := set(names) - set(mesh.shape):
            raise ConfigError(
                f"the sharding rule for {name} names the mesh axes {sorted(unknown)}; there are "
                f"{', '.join(mesh.shape)}"
            )
        count = math.prod(mesh.shape[axis] for axis in names)
        if size % count:
            raise ConfigError(
                f"{name} {shape}: {size} does not divide by the {count} devices of "
                f"{' x '.join(names)}"
            )
    return PartitionSpec(
        *(axes if isinstance(axes, str) else axis_names(axes) or None for axes in aligned)
    )


def axis_names(axes: Axes) -> tuple[str, ...]:
    """Mesh axes over which a dimension is split."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def describe(tree: Any, shardings: Any) -> list[str]:
    """A line for each leaf: path, shape, axes of its dimensions, elements per device."""

    def line(path, leaf, sharding):
        axes = (
            ", ".join("+".join(axis_names(axis)) or "-" for axis in sharding.spec) or "replicated"
        )
        per_device = math.prod(sharding.shard_shape(leaf.shape))
        return f"{path_name(path)}  {tuple(leaf.shape)}  [{axes}]  {per_device}"

    return jax.tree.leaves(jax.tree_util.tree_map_with_path(line, tree, shardings))
