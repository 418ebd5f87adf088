"""Interface of training tasks, as the loop, the step, reports and plans see them."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike

from sam_jax.arrays import Array, Float
from sam_jax.parallel import Parallel
from sam_jax.tracing import shapes_once

Fields = Mapping[str, Array]
Sums = dict[str, Float[Array, ""]]
# (parameters, constants, batch, key) -> (loss, reported figures), all of them sums over the items
# that ``Task.count`` counts.
LossSums = Callable[[Any, Any, Fields, Array], tuple[Float[Array, ""], Sums]]
# (parameters, constants, batch, key) -> losses by part, each [rounds, images, items of an image].
LossParts = Callable[[Any, Any, Fields, Array], dict[str, Float[Array, "..."]]]


@runtime_checkable
class Task(Protocol):
    """A training task: a model, the form of its batches, and their loss.

    A task is closed over by the jitted step, so it is a value: it keeps no state.
    """

    @property
    def unit(self) -> str:
        """Name of the items that losses are means over, in the plural, as in "masks"."""
        ...

    @property
    def dtype(self) -> DTypeLike:
        """Type of the computation."""
        ...

    @property
    def remat(self) -> str:
        """Description, for reports, of what the backward pass computes again."""
        ...

    def init(self, key: Array) -> dict[str, Any]:
        """Fresh variables, ``{"params": ..., "constants": ...}``; also under ``jax.eval_shape``."""
        ...

    def load(self, path: str, key: Array) -> dict[str, Any]:
        """Variables to start from, of weights in a file or folder.

        Raises:
          UserError: if they cannot be read or do not fit.
        """
        ...

    def differences(self, run: Path) -> list[str]:
        """Differences of the model of a run's folder from this one, a line each.

        Raises:
          WeightsError: if the folder's config is not a run's.
        """
        ...

    def evaluated(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Variables as whoever has only the model takes them, of those that are trained."""
        ...

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of each field of a batch; the first axis is images."""
        ...

    def count(self, batch: Fields) -> Float[Array, ""]:
        """Number of items that the losses of a batch are sums over."""
        ...

    def loss_sums(self, parallel: Parallel, param_specs: Any | None) -> LossSums:
        """The loss on these devices, which store parameters as the specs say (None: whole)."""
        ...

    def headline(self, means: Mapping[str, float]) -> str:
        """The figures of an interval that a person wants to see first."""
        ...

    def flops(self, batch_size: int, trained: Any) -> float:
        """Useful operations of a step that trains a tree of parameters, see ``flop_counts``."""
        ...


@runtime_checkable
class ItemizedTask(Protocol):
    """A task that can tell what the loss of a batch is made of, so that a bad part can be named."""

    def loss_parts(self, parallel: Parallel, param_specs: Any | None) -> LossParts:
        """The parts of the loss of each item, zero for items that do not exist; see ``loss_sums``.

        Parts have the names that they are reported under.
        """
        ...


def task_shapes(task: Task) -> dict[str, Any]:
    """Shapes and types of a task's variables; a dataclass is traced once in a process."""

    def variables() -> Any:
        return task.init(jax.random.key(0))

    # The text of a dataclass says all of it.
    says_all = dataclasses.is_dataclass(type(task))
    found: dict[str, Any] = (
        shapes_once(variables, repr(task)) if says_all else jax.eval_shape(variables)
    )
    return found
