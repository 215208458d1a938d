"""Numbers of a simulated sweep by case, method and metric; those of the paper; one beside the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from flashcp.experiments.sweep.results import Row

NAME = re.compile(
    r"(?P<data>[^-]+)(-w(?P<weight>[\d.]+))?-c(?P<context>\d+k?)-n(?P<ranks>\d+)-h(?P<heads>[\d:]+)"
    r"(-(?P<mask>full|w[\d.]+x[\d.]+))?"
    r"(-b(?P<batch>\d+)(x(?P<micro>\d+)\.(?P<waits>micro_batch|step))?)?"
    r"-(?P<cluster>.+?)(-(?P<overlap>none|staged|fused))?"
)
DATA = {"wlb_llm": "WLB-LLM", "pile": "Pile", "redpajama": "RedPajama"}
"""Data sets as the paper writes them."""


class Breakdown(NamedTuple):
    """Parts of one training pass of the attention module, ms."""

    copies: float
    attention_forward: float
    attention_backward: float
    all_gather: float
    reduce_scatter: float

    @property
    def total(self) -> float:
        """All of it: the paper's parts follow one another."""
        return sum(self)


PAPER: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("published.yaml")))
BREAKDOWN: dict[str, dict[str, Breakdown]] = {
    data: {method: Breakdown(**parts) for method, parts in methods.items()}
    for data, methods in PAPER["breakdown"].items()
}


def read_case(name: str) -> SimpleNamespace | None:
    """The columns of a case by the name that `sweep.simulations.case_name` made; None for other names.

    name, data, weight, context, ranks, heads (of queries, and of keys where they are fewer: `32:8`), mask (of models
    whose layers are not all causal), batch (its windows), micro (micro-batches), waits, cluster, overlap.
    """
    if not (found := NAME.fullmatch(name)):
        return None
    columns: dict[str, Any] = found.groupdict("")
    size = columns["context"]
    columns |= {"weight": float(columns["weight"] or 1), "ranks": int(columns["ranks"])}
    columns |= {name: int(columns[name] or 1) for name in ("batch", "micro")}
    columns["context"] = 1024 * int(size[:-1]) if size.endswith("k") else int(size)
    return SimpleNamespace(name=name, **columns)


class Numbers:
    """Rows by case, provider and metric."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self._values = {(row.case, row.provider, row.metric): row.median for row in rows}
        self.cases = [case for name in dict.fromkeys(row.case for row in rows) if (case := read_case(name))]

    def __call__(self, case: str, provider: str, metric: str) -> float:
        """One number. Raises ValueError where there is none."""
        try:
            return self._values[case, provider, metric]
        except KeyError:
            raise ValueError(f"no row for {case}, {provider}, {metric}") from None

    def of(self, case: str, metric: str) -> dict[str, float]:
        """Every method's, in order. Raises ValueError where one has none."""
        return {provider: self(case, provider, metric) for provider in self.providers(case)}

    def speedups(self, case: str, metric: str) -> dict[str, float]:
        """Of every method over llama3. Raises ValueError where one has no such time."""
        base = self(case, "llama3", metric)
        return {provider: base / ms for provider, ms in self.of(case, metric).items()}

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


class PaperFigure(NamedTuple):
    """title: what the paper shows there. draw: the picture of its numbers and ours. cells: the numbers, none where the
    paper has none. facts: what `page.md.j2` tells beside."""

    title: str
    draw: Callable[[Numbers, Path], None]
    cells: Callable[[Numbers], list[Cell]] = lambda numbers: []
    facts: Callable[[Numbers], Any] = lambda numbers: {}


def farthest(cells: Sequence[Cell]) -> Cell:
    """The one whose distance is the largest share of its number."""
    return max(cells, key=lambda cell: abs(cell.ours / cell.paper - 1))


def verdict(cells: Sequence[Cell]) -> str:
    """The line that says how far apart the paper and ours are."""
    judged = [cell for cell in cells if cell.judged]
    if not judged:
        return "the paper has no such numbers"
    outside = [cell.what for cell in judged if not cell.within]
    near = f"{len(judged) - len(outside)} of {len(judged)} numbers that should come out do"
    return f"{near}; farthest: {farthest(judged)}" + (f"; outside: {', '.join(outside)}" if outside else "")
