"""A mesh, and rules from the paths of a tree to its shardings. Knows no model."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sam_jax.errors import ConfigError

# A regular expression searched in a leaf's path, and the mesh axis of each of its dimensions (or
# None), aligned at the last one, so that a leading axis of layers needs no second rule.
Rule: TypeAlias = tuple[str, Sequence[str | None]]

BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """How arrays are spread over devices.

    Attributes:
      data: devices that hold copies of the state and see different images; -1 takes all that
        ``fsdp`` leaves.
      fsdp: devices that share one copy of the state, and see different images too.
      rules: what is split over ``fsdp``; the first rule that matches a path counts.
      cpu_devices: devices that a CPU without accelerators poses as; much of a small model's step
        runs on one core, so one for each core is faster than one for all. None for one.
      max_replicated_size: elements that an array may have and still be copied to every device
        without a rule that says so.
    """

    data: int = -1
    fsdp: int = 1
    rules: Sequence[Rule] = ()
    cpu_devices: int | None = None
    max_replicated_size: int = 2**18


def make_mesh(config: ShardingConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with axes ``data`` and ``fsdp`` over all devices.

    Raises:
      ConfigError: if the devices do not divide as the config says.
    """
    devices = jax.devices() if devices is None else devices
    data = len(devices) // config.fsdp if config.data == -1 else config.data
    if data * config.fsdp != len(devices) or data < 1:
        raise ConfigError(
            f"sharding.data = {config.data} and sharding.fsdp = {config.fsdp} do not multiply to "
            f"the {len(devices)} devices there are"
        )
    return jax.make_mesh(
        (data, config.fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def start_devices(config: ShardingConfig, *, is_distributed: bool = False) -> None:
    """Splits the CPU as the config says and joins the other hosts of a cluster.

    Must come before JAX's first use of a device.
    """
    if config.cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    if is_distributed:
        jax.distributed.initialize()


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Images spread over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same on every device."""
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


def _spec(name: str, shape: tuple[int, ...], axes: Sequence[str | None], mesh: Mesh | AbstractMesh):
    if len(axes) > len(shape):
        raise ConfigError(f"the sharding rule for {name} {shape} has {len(axes)} dimensions")
    aligned = (None,) * (len(shape) - len(axes)) + tuple(axes)
    for size, axis in zip(shape, aligned, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(
                f"{name} {shape}: {size} does not divide by the {mesh.shape[axis]} devices of "
                f"axis {axis!r}"
            )
    return PartitionSpec(*aligned)


def describe(tree: Any, shardings: Any) -> list[str]:
    """A line for each leaf: path, shape, axes of its dimensions, elements per device."""

    def line(path, leaf, sharding):
        axes = ", ".join(str(axis) for axis in sharding.spec) or "replicated"
        per_device = math.prod(sharding.shard_shape(leaf.shape))
        return f"{path_name(path)}  {tuple(leaf.shape)}  [{axes}]  {per_device}"

    return jax.tree.leaves(jax.tree_util.tree_map_with_path(line, tree, shardings))
