"""Numbers of a simulated sweep by case, method and metric; a number of the paper beside ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from flashcp.experiments.sweep.results import Row

__all__ = ["Case", "Cell", "Numbers", "farthest", "verdict"]

NAME = re.compile(
    r"(?P<data>[^-]+)(-w(?P<weight>[\d.]+))?-c(?P<context>\d+k?)-n(?P<ranks>\d+)-h(?P<heads>[\d:]+)"
    r"-(?P<cluster>.+?)(-(?P<overlap>none|staged|fused))?"
)


class Case(NamedTuple):
    """The columns of a case, out of its name. heads: of queries, and of keys where they are fewer (`32:8`)."""

    name: str
    data: str
    weight: float
    context: int
    ranks: int
    heads: str
    cluster: str
    overlap: str

    @classmethod
    def read(cls, name: str) -> Case | None:
        """Of a name that `sweep.simulations.case_name` made; None for others."""
        if not (found := NAME.fullmatch(name)):
            return None
        size = found["context"]
        context = 1024 * int(size[:-1]) if size.endswith("k") else int(size)
        weight, ranks, overlap = float(found["weight"] or 1), int(found["ranks"]), found["overlap"] or ""
        return cls(name, found["data"], weight, context, ranks, found["heads"], found["cluster"], overlap)


class Numbers:
    """Rows by case, provider and metric."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self._values = {(row.case, row.provider, row.metric): row.median for row in rows}
        self.names = list(dict.fromkeys(row.case for row in rows))
        self.cases = [case for name in self.names if (case := Case.read(name))]

    def __call__(self, case: str, provider: str, metric: str) -> float:
        """One number. Raises ValueError where there is none."""
        try:
            return self._values[case, provider, metric]
        except KeyError:
            raise ValueError(f"no row for {case}, {provider}, {metric}") from None

    def providers(self, case: str) -> list[str]:
        """The methods of a case, in order."""
        return list(dict.fromkeys(row.provider for row in self.rows if row.case == case))

    def case(self, **columns: Any) -> str:
        """The name of the case with these values. Raises ValueError unless there is one."""
        found = [case.name for case in self.cases if all(getattr(case, key) == columns[key] for key in columns)]
        if len(found) != 1:
            wanted = ", ".join(f"{key}={value}" for key, value in columns.items())
            raise ValueError(f"{len(found)} cases of {wanted}: expected one")
        return found[0]


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
