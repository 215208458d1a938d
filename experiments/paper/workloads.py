"""Workloads that the paper has not: whole batches, and models whose layers differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from flashcp.experiments.paper.numbers import DATA as TITLES
from flashcp.experiments.paper.numbers import Numbers, PaperFigure
from flashcp.experiments.plots import PALETTE, legend_below, styled
from flashcp.simulator.variants import VARIANTS

# --- whole batches: one plan for the windows of all replicas, beside a window a replica and others who plan the batch

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


def _race_facts(numbers: Numbers) -> dict[str, Any]:
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
def _draw_races(numbers: Numbers, path: Path) -> None:
    """A panel for lengths and heads: ranks (or who waits) across, the module's ms by kind of method."""
    found, colours = races(numbers), dict(zip(KINDS, PALETTE, strict=False))
    data, heads = (list(dict.fromkeys(getattr(race.case, name) for race in found)) for name in ("data", "heads"))
    figure = Figure(figsize=(4.6 * len(data), 3.3 * len(heads)))
    grid = figure.subplots(len(heads), len(data), squeeze=False)
    for row, kv in zip(grid, heads, strict=True):
        for axes, lengths in zip(row, data, strict=True):
            chosen = [race for race in found if (race.case.data, race.case.heads) == (lengths, kv)]
            labels = [f"{race.case.ranks} ranks" + _waits(race.case) for race in chosen]
            _bars(axes, [race.times for race in chosen], labels, colours, written=True)
            axes.set(title=f"{TITLES[lengths]}, {kv} heads", ylabel="ms")
    legend_below(figure, colours)
    figure.suptitle("simulated: one attention layer, forward and backward, until the slowest rank is through")
    figure.savefig(path)


def _waits(case: Any) -> str:
    return f",\n{case.micro} micro-batches,\nwaits every {case.waits.replace('_', '-')}" if case.micro > 1 else ""


# --- models whose layers differ: plans for the sum of their work beside methods that know nothing of it

MODELS = {
    ("32:16", "w1024.0x52.62"): "Gemma 3 27B",
    ("64:8", "w128.0x18.36"): "gpt-oss 120B",
    ("16", "full"): "BERT large",
}
"""By heads and mask of a case."""
MIXED_KINDS = ("per_document as published", "best effort of the others", "flashcp")


class Mixed(NamedTuple):
    """A case: speedups over llama3 as published, in the order of MIXED_KINDS. rival: the fastest of the best efforts.

    imbalance: of flashcp's plan and of per_document's. rows: critical ones of a mean layer, of both.
    """

    model: str
    case: Any
    speedups: tuple[float, float, float]
    rival: str
    step: float
    imbalance: tuple[float, float]
    rows: tuple[float, float]
    head_ranks: int


def mixed(numbers: Numbers) -> list[Mixed]:
    """Every case of the rows, in order."""
    found = []
    for case in numbers.cases:
        speedups = numbers.of(case.name, "speedup")
        rival = max((s, n) for n, s in speedups.items() if VARIANTS[n].implementation == "best effort")
        imbalance, rows = (
            (numbers(case.name, "flashcp", metric), numbers(case.name, "per_document", metric))
            for metric in ("imbalance", "critical_rows")
        )
        found.append(
            Mixed(
                MODELS[case.heads, case.mask], case, (speedups["per_document"], rival[0], speedups["flashcp"]),
                rival[1].removesuffix("_best_effort"), numbers(case.name, "flashcp", "step_speedup"),
                imbalance, rows, int(numbers(case.name, "flashcp", "head_ranks")),
            )
        )  # fmt: skip
    return found


def _mixed_facts(numbers: Numbers) -> dict[str, Any]:
    return {"mixed": mixed(numbers)}


@styled
def _draw_mixed(numbers: Numbers, path: Path) -> None:
    """A panel for each model: windows and ranks across, speedups over llama3."""
    found, colours = mixed(numbers), dict(zip(MIXED_KINDS, PALETTE, strict=False))
    models = list(dict.fromkeys(one.model for one in found))
    figure = Figure(figsize=(4.8 * len(models), 4.2))
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        chosen = [one for one in found if one.model == model]
        labels = [f"{one.case.context // 1024}K,\n{one.case.ranks}" for one in chosen]
        _bars(axes, [one.speedups for one in chosen], labels, colours)
        axes.set(title=model, ylabel="speedup over llama3", xlabel="window, ranks")
    legend_below(figure, colours)
    figure.suptitle("simulated: attention of a mean layer, forward and backward")
    figure.savefig(path)


def _bars(
    axes: Any,
    groups: Sequence[Sequence[float]],
    labels: Sequence[str],
    colours: Mapping[str, str],
    written: bool = False,
) -> None:
    """A group of bars above each label, one of every colour. written: with its height on it, where there is one."""
    places, width = np.arange(len(groups)), 0.8 / len(colours)
    for number, colour in enumerate(colours.values()):
        heights = [group[number] for group in groups]
        at = places + (number - (len(colours) - 1) / 2) * width
        axes.bar(at, heights, width, color=colour)
        for x, height in zip(at, heights, strict=True) if written else ():
            text = f"{height:.0f}".replace("nan", "")
            axes.text(x, np.nan_to_num(height), text, ha="center", va="bottom", fontsize=7)
    axes.set_xticks(places, labels)


FIGURES = {
    "whole_batch": PaperFigure("one plan for the batch of all replicas", _draw_races, facts=_race_facts),
    "whole_batch_1024": PaperFigure("the same on 1,024 ranks", _draw_races, facts=_race_facts),
    "whole_batch_steps": PaperFigure("the same with micro-batches: who waits for whom", _draw_races, facts=_race_facts),
    "mixes": PaperFigure("models whose layers differ", _draw_mixed, facts=_mixed_facts),
}
