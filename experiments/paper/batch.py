"""Whole batches: one plan for the windows of all replicas, beside a window a replica and others who plan the batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from flashcp.experiments.paper.numbers import DATA as TITLES
from flashcp.experiments.paper.numbers import Numbers, PaperFigure
from flashcp.experiments.plots import PALETTE, legend_below, styled
from flashcp.simulator.variants import VARIANTS

PLANNERS = ("dynamic_cp_best_effort", "flexible_cp_best_effort", "block_placement_best_effort")
"""Rivals that plan the batch; all other best efforts give a window to each replica."""
REPLICAS = ("llama3", "per_document", "per_document_best_effort", "ulysses_best_effort", "flashcp:d0")
STUDY = (*REPLICAS, "flashcp:h1", "flashcp:h2", "flashcp:h4", "flashcp:h8")
ISLANDS = ("flashcp:h8", "flashcp:h8:d2", "flashcp:h8:d4", "flashcp:h8:d8")
KINDS = ("llama3 as published", "best effort, a window a replica", "best effort, the batch planned", "flashcp")


class Race(NamedTuple):
    """A case: `flashcp` beside the fastest rival of each kind. step: whole steps' speedup over the first of them."""

    case: Any
    ours: float
    llama3: float
    replicas: tuple[float, str]
    planners: tuple[float, str]
    step: float

    @property
    def times(self) -> list[float]:
        """In the order of KINDS."""
        return [self.llama3, self.replicas[0], self.planners[0], self.ours]


def races(numbers: Numbers) -> list[Race]:
    """Every case of the rows, in order."""
    found = []
    for case in numbers.cases:
        ms = numbers.of(case.name, "module_ms")
        best = [name for name in ms if name in VARIANTS and VARIANTS[name].implementation == "best effort"]
        replicas = min((ms[name], name) for name in best if name not in PLANNERS)
        planners = min(((ms[name], name) for name in best if name in PLANNERS), default=(float("nan"), ""))
        steps = numbers.of(case.name, "step_speedup")
        found.append(Race(case, ms["flashcp"], ms["llama3"], replicas, planners, steps["flashcp"] / steps[replicas[1]]))
    return found


def _facts(numbers: Numbers) -> dict[str, Any]:
    """races. columns of the study and of islands, with module ms of each case that has them. chosen: head ranks of
    `flashcp` by case."""
    found = races(numbers)

    def columns(names: Sequence[str]) -> dict[str, list[float]]:
        cases = [race.case.name for race in found if set(names) <= set(numbers.providers(race.case.name))]
        return {case: [numbers(case, name, "module_ms") for name in names] for case in cases}

    return {
        "titles": TITLES,
        "races": found,
        "columns": {"study": STUDY, "islands": ISLANDS},
        "ms": {"study": columns(STUDY), "islands": columns(ISLANDS)},
        "chosen": {race.case.name: int(numbers(race.case.name, "flashcp", "head_ranks")) for race in found},
    }


@styled
def _draw(numbers: Numbers, path: Path) -> None:
    """A panel for lengths and heads: ranks (or who waits) across, the module's ms by kind of method."""
    found, colours = races(numbers), dict(zip(KINDS, PALETTE, strict=False))
    data, heads = (list(dict.fromkeys(getattr(race.case, name) for race in found)) for name in ("data", "heads"))
    figure = Figure(figsize=(4.6 * len(data), 3.3 * len(heads)))
    grid = figure.subplots(len(heads), len(data), squeeze=False)
    for row, kv in zip(grid, heads, strict=True):
        for axes, lengths in zip(row, data, strict=True):
            _bars(axes, [race for race in found if (race.case.data, race.case.heads) == (lengths, kv)], colours)
            axes.set_title(f"{TITLES[lengths]}, {kv} heads")
    legend_below(figure, colours)
    figure.suptitle("simulated: one attention layer, forward and backward, until the slowest rank is through")
    figure.savefig(path)


def _bars(axes: Any, chosen: Sequence[Race], colours: dict[str, str]) -> None:
    places, width = np.arange(len(chosen)), 0.8 / len(KINDS)
    for number, kind in enumerate(KINDS):
        heights = [race.times[number] for race in chosen]
        at = places + (number - (len(KINDS) - 1) / 2) * width
        axes.bar(at, heights, width, color=colours[kind])
        for x, height in zip(at, heights, strict=True):
            axes.text(
                x, np.nan_to_num(height), f"{height:.0f}".replace("nan", ""), ha="center", va="bottom", fontsize=7
            )
    axes.set_xticks(places, [f"{race.case.ranks} ranks" + _waits(race.case) for race in chosen])
    axes.set_ylabel("ms")


def _waits(case: Any) -> str:
    return f",\n{case.micro} micro-batches,\nwaits every {case.waits.replace('_', '-')}" if case.micro > 1 else ""


FIGURES = {
    "whole_batch": PaperFigure("one plan for the batch of all replicas", _draw, facts=_facts),
    "whole_batch_1024": PaperFigure("the same on 1,024 ranks", _draw, facts=_facts),
    "whole_batch_steps": PaperFigure("the same with micro-batches: who waits for whom", _draw, facts=_facts),
}
