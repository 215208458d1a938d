"""Past the paper: the fastest method by ranks, window, heads and network, each with our kernel and no copies."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from flashcp.experiments.paper.bars import COLOURS
from flashcp.experiments.paper.cells import Cell, Numbers
from flashcp.experiments.sweep.figure import INK

__all__ = ["Win", "cells", "draw", "wins"]

CLUSTERS = {"nvlink": "nodes of 8 (NVLink), 400 Gb/s a rank between them", "ib": "one rank a node, 400 Gb/s"}


class Win(NamedTuple):
    """A case's fastest method, how much slower the next one is, and the speedup over llama3 as published."""

    case: str
    fastest: str
    ahead: float
    speedup: float


def wins(numbers: Numbers) -> list[Win]:
    """The fastest method of every case."""
    found = []
    for case in numbers.cases:
        times = sorted((numbers(case, provider, "module_ms"), provider) for provider in numbers.providers(case))
        (best, name), (following, _) = times[:2]
        found.append(Win(case, name, following / best, numbers(case, name, "speedup")))
    return found


def cells(numbers: Numbers) -> list[Cell]:
    """Nothing of the paper's."""
    return []


def draw(numbers: Numbers, path: Path) -> None:
    """One panel for data, cluster and heads: ranks across, windows up; colour: the fastest; how far it is ahead."""
    every = {win.case: win for win in wins(numbers)}
    count = Counter(win.fastest for win in every.values())
    colour = {name: COLOURS[(place + 1) % len(COLOURS)] for place, (name, _) in enumerate(count.most_common())}
    data, heads = ("wlb_llm", "pile"), ("h32", "h32:8")
    figure = Figure(figsize=(16, 8.4), layout="constrained", facecolor="white")
    grid = figure.subplots(len(data), 2 * len(CLUSTERS))
    for row, name in zip(grid, data, strict=True):
        panels = [(cluster, head) for cluster in CLUSTERS for head in heads]
        for axes, (cluster, head) in zip(row, panels, strict=True):
            chosen = {case: win for case, win in every.items() if {name, cluster, head} <= set(case.split("-"))}
            _panel(axes, chosen, colour)
            axes.set_title(f"{name}, {head[1:]} heads\n{CLUSTERS[cluster]}", loc="left", fontsize=9, color=INK)
    handles = [Patch(color=shade, label=f"{name} ({count[name]})") for name, shade in colour.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle("fastest method, simulated; how far ahead of the next; below, of llama3 as published", fontsize=11)
    figure.savefig(path, dpi=160)


def _panel(axes: Any, chosen: dict[str, Win], colour: dict[str, str]) -> None:
    def part(case: str, letter: str) -> int:
        return next(int(p[1:].rstrip("k")) for p in case.split("-") if p[0] == letter and p[1:2].isdigit())

    ranks = sorted({part(case, "n") for case in chosen})
    contexts = sorted({part(case, "c") for case in chosen})
    for case, win in chosen.items():
        x, y = ranks.index(part(case, "n")), contexts.index(part(case, "c"))
        axes.add_patch(Rectangle((x, y), 0.97, 0.97, color=colour[win.fastest], alpha=0.85, linewidth=0))
        text = f"{win.ahead:.2f}x\n{win.speedup:.1f}x"
        axes.text(x + 0.48, y + 0.48, text, ha="center", va="center", fontsize=8, color="white")
    axes.set(xlim=(0, len(ranks)), ylim=(0, len(contexts)), xlabel="ranks", ylabel="window")
    axes.set_xticks([x + 0.48 for x in range(len(ranks))], ranks)
    axes.set_yticks([y + 0.48 for y in range(len(contexts))], [f"{c}K" for c in contexts])
    axes.tick_params(colors=INK, labelsize=8, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
