"""Evaluations: examples, the record that each becomes, and the report that records add up to.

A record is all that is kept of an example: plain values, from which every table, plot and interval
follows. So an evaluation that was stopped goes on where it was, hosts share the examples, and two
checkpoints are compared, without any of them knowing what is evaluated.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from rich.console import Console

from sam_jax.arrays import Float, UInt8
from sam_jax.inference.predictor import Buckets
from sam_jax.models.sam import Sam

# What an example gave: values of JSON under names of the evaluation's own.
Record: TypeAlias = dict[str, Any]
# Measures by name, for records that count as often as the given numbers say.
Measures: TypeAlias = Callable[[Float[np.ndarray, "n"]], dict[str, float]]
# What a record has besides answers.
_ABOUT = frozenset({"dataset", "image", "image_id", "file_name", "remarked"})


def is_skipped(record: Record) -> bool:
    """True if a record is of an example that could not be used, and so has no answers.

    Some kinds say why under ``skipped``, that of edges under ``unusable``; others have a list of
    annotations there, of an image that was used.
    """
    return (
        "skipped" in record or isinstance(record.get("unusable"), str) or not record.keys() - _ABOUT
    )


@runtime_checkable
class Report(Protocol):
    """Numbers for programs; a table and pictures for people."""

    @property
    def pictures(self) -> Mapping[str, UInt8[np.ndarray, "_ _ 3"]]:
        """RGB pictures by name."""
        ...

    def as_flat_dict(self) -> dict[str, float]:
        """The numbers that a training run records, by name."""
        ...

    def as_json(self) -> dict[str, Any]:
        """Everything but the pictures, as values of JSON."""
        ...

    def print_table(self, console: Console | None = None) -> None:
        """Prints what people want to know, within 100 columns."""
        ...


@runtime_checkable
class Evaluation(Protocol):
    """Examples that a model is tried on; opened once, for any number of variables."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that records depend on besides the weights, as values of JSON."""
        ...

    def __len__(self) -> int:
        """The number of examples, usually images."""
        ...

    def buckets(self, num_devices: int) -> Buckets:
        """The sizes of calls that the predictor compiles."""
        ...

    def records(self, predictor: Any, indices: Iterable[int]) -> Iterator[Record]:
        """Records of these examples: one for each, in their order, whatever becomes of it.

        An example that cannot be used gives a record that says so.

        Args:
          predictor: of the model's kind: a ``Predictor``, or a ``Reconstructor``.
          indices: of the examples.
        """
        ...

    def report(self, records: Sequence[Record], seconds: float) -> Report:
        """The report of the records of all examples, in order.

        Raises:
          NoObjectsError: there is nothing to report on.
        """
        ...


@dataclasses.dataclass(frozen=True)
class EvaluationKind:
    """A kind of evaluation that configs can ask for.

    Attributes:
      config: dataclass of its options.
      open: opens its data, of 8-bit RGB or of so many channels of the model's images.
      measures: what records add up to. Takes the records and the evaluation's settings.
      model: class of the models that it is for.
    """

    config: type[Any]
    open: Callable[[Any, int | None], Evaluation]
    measures: Callable[[Sequence[Record], Mapping[str, Any]], Measures] | None = None
    model: type[Any] = Sam
