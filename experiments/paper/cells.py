"""A number of the paper beside ours, and how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flashcp.experiments.sweep.rows import Row

__all__ = ["Cell", "Numbers", "farthest", "verdict"]


class Cell(NamedTuple):
    """One number, the paper's (or a measured one) and ours.

    judged: whether it is one that should come out (times are context, ratios between methods judged). fitted: whether
    parameters were fitted to it, or to what it is made of. allowed: the distance that counts as near; a share of the
    number, or with `absolute` in its own unit.
    """

    what: str
    paper: float
    ours: float
    judged: bool = True
    fitted: bool = False
    allowed: float = 0.15
    absolute: bool = False

    @property
    def distance(self) -> float:
        """Ours over the paper's, less 1; with `absolute` the difference."""
        return self.ours - self.paper if self.absolute else self.ours / self.paper - 1

    @property
    def within(self) -> bool:
        """Whether ours is as near as it should be."""
        return abs(self.distance) <= self.allowed

    @property
    def apart(self) -> str:
        """The distance as text."""
        return f"{self.distance:+.2f}" if self.absolute else f"{self.distance:+.1%}"

    def __str__(self) -> str:
        return f"{self.what}: {self.paper:.3g}, ours {self.ours:.3g} ({self.apart})"


class Numbers:
    """Rows by case, provider and metric."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self._values = {(row.case, row.provider, row.metric): row.median for row in rows}
        self.cases = list(dict.fromkeys(row.case for row in rows))

    def __call__(self, case: str, provider: str, metric: str) -> float:
        """One number. Raises ValueError where there is none."""
        try:
            return self._values[case, provider, metric]
        except KeyError:
            raise ValueError(f"no row for {case}, {provider}, {metric}") from None

    def providers(self, case: str) -> list[str]:
        """The methods of a case, in order."""
        return list(dict.fromkeys(row.provider for row in self.rows if row.case == case))

    def case(self, *parts: str) -> str:
        """The case whose name has all these parts between its dashes. Raises ValueError unless there is one."""
        found = [case for case in self.cases if set(parts) <= set(case.split("-"))]
        if len(found) != 1:
            raise ValueError(f"{len(found)} cases of {', '.join(parts)}: expected one")
        return found[0]


def farthest(cells: Sequence[Cell]) -> Cell:
    """The one whose distance is the largest share of its number."""
    return max(cells, key=lambda cell: abs(cell.ours / cell.paper - 1))


def verdict(cells: Sequence[Cell]) -> str:
    """The line that says how far apart the paper and ours are."""
    judged = [cell for cell in cells if cell.judged]
    if not judged:
        return "the paper has no such numbers"
    outside = [cell for cell in judged if not cell.within]
    text = (
        f"{len(judged) - len(outside)} of {len(judged)} numbers that should come out do; farthest: {farthest(judged)}"
    )
    return f"{text}; outside: {', '.join(cell.what for cell in outside)}" if outside else text
