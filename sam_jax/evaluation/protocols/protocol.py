"""A protocol: a way of prompting for target masks, the scores of it, and their names in reports."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from typing import Protocol, runtime_checkable

import numpy as np

from sam_jax.arrays import Bool
from sam_jax.evaluation.clicks import Click, FirstClick
from sam_jax.evaluation.targets import TargetBatch, TargetMask
from sam_jax.inference.predictor import Predictor
from sam_jax.visualize import Curve

# Ends the name of a measure for which the ground truth chooses among the candidates.
ORACLE = "oracle"


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """The result of prompting for one mask.

    Attributes:
      target: the mask.
      ious: IoU by measure.
      prediction: the last answer at the original size.
      clicks: those that led to it; none if a box did.
    """

    target: TargetMask
    ious: dict[str, float]
    prediction: Bool[np.ndarray, "oh ow"]
    clicks: tuple[Click, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class ProtocolContext:
    """The surroundings that protocols run in.

    Attributes:
      predictor: of the model, with the variables that are evaluated.
      num_clicks: numbers of clicks after which there is a score, rising.
      seed: of random draws.
      pool: runs the host's work on the masks.
    """

    predictor: Predictor
    num_clicks: Sequence[int]
    seed: int
    pool: Executor


@dataclasses.dataclass(frozen=True)
class ReportTable:
    """A table of a report, which protocols may share.

    Attributes:
      title: above it.
      row_heading: above the names of the protocols; None for a table of only one.
    """

    title: str
    row_heading: str | None = None


@runtime_checkable
class EvalProtocol(Protocol):
    """A way of prompting for masks, as the evaluator and its report see it; it keeps no state."""

    @property
    def name(self) -> str:
        """The name in configs, which begins the names of its measures."""
        ...

    @property
    def first_click(self) -> FirstClick | None:
        """The first click, around which the baseline draws disks; None for other prompts."""
        ...

    @property
    def table(self) -> ReportTable:
        """The table that shows its measures."""
        ...

    @property
    def row(self) -> str:
        """The name of its rows there."""
        ...

    def run(self, batch: TargetBatch, context: ProtocolContext) -> list[Outcome]:
        """Outcomes for all masks of a batch.

        Raises:
          NotFiniteError: if the model's answers are no numbers.
        """
        ...

    def headline(self, num_clicks: Sequence[int]) -> str:
        """The measure by which the best and the worst masks are chosen for pictures."""
        ...

    def columns(self, measured: Collection[str], num_clicks: Sequence[int]) -> dict[str, str]:
        """Measures by column of the table, baselines for the same prompts among them.

        Args:
          measured: names of all measures of a report.
          num_clicks: see ``ProtocolContext``.

        Returns:
          those that were measured; nothing if the protocol was not run.
        """
        ...

    def curves(self, miou: Mapping[str, float], num_clicks: Sequence[int]) -> list[Curve]:
        """Lines of the diagram of IoU in percent against clicks; none if it was not run."""
        ...
