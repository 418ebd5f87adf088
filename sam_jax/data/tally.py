"""Counts by reason, with an example of each."""

import collections
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counts of cases by reason, and one case of each to look at.

    Attributes:
      counts: the number of cases by reason.
      examples: the first case of each reason that said something.
    """

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str = "", number: int = 1) -> None:
        """Counts cases of a reason; the first example stays."""
        self.counts[reason] += number
        if example:
            self.examples.setdefault(reason, example)

    def update(self, other: "Tally") -> None:
        """Adds all that another one holds."""
        self.counts.update(other.counts)
        self.examples = other.examples | self.examples

    def total(self) -> int:
        """The number of cases, of whatever reason."""
        return self.counts.total()

    def __bool__(self) -> bool:
        return bool(self.counts)

    def lines(self) -> Iterator[str]:
        """A line for each reason, the most frequent first: count, reason and the example."""
        for reason, count in self.counts.most_common():
            example = self.examples.get(reason)
            yield f"{count:,} {reason}" + (f", e.g. {example}" if example else "")

    def __str__(self) -> str:
        return "; ".join(self.lines())
