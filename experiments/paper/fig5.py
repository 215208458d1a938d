"""Figure 5: speedups over llama3 on three data sets, N = 4 and 8, H = 16 and 32, inference and training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from flashcp.experiments.paper.bars import COLOURS, draw_bars
from flashcp.experiments.paper.cells import Cell, Numbers
from flashcp.experiments.paper.values import MEAN_SPEEDUPS

__all__ = ["UnhiddenRing", "cells", "draw", "unhidden_ring"]

DATA = {"WLB-LLM": "wlb_llm", "Pile": "pile", "RedPajama": "redpajama"}
PASSES = {"inference": "forward_ms", "training": "module_ms"}
GROUPS = [(heads, ranks) for heads in (16, 32) for ranks in (4, 8)]
FLASHCP = "flashcp_paper"
ALLOWED = 0.15  # of an average speedup, in its own unit


def _case(numbers: Numbers, data: str, heads: int, ranks: int) -> str:
    return numbers.case(data, f"n{ranks}", f"h{heads}")


def cells(numbers: Numbers) -> list[Cell]:
    """The paper's heuristic over each baseline: means over all settings, inference and training; each alone."""
    found = []
    for method, paper in MEAN_SPEEDUPS.items():
        means = {name: _mean(numbers, method, [metric]) for name, metric in PASSES.items()}
        both = Cell(f"{FLASHCP} over {method}, mean", paper, _mean(numbers, method, PASSES.values()))
        found.append(both._replace(allowed=ALLOWED, absolute=True))
        found += [Cell(f"{both.what}, {name} alone", paper, mean, judged=False) for name, mean in means.items()]
    return found


def _mean(numbers: Numbers, method: str, metrics: Iterable[str]) -> float:
    ratios = [numbers(case, method, m) / numbers(case, FLASHCP, m) for case in numbers.cases for m in metrics]
    return float(np.mean(ratios))


class UnhiddenRing(NamedTuple):
    """A ring that hides nothing of what it sends, in training. hidden, shown: the heuristic's mean speedup over it as
    simulated, and then. slower: how many times slower than the collectives' its links would have to be for the paper's
    mean, if that of training is the same."""

    hidden: float
    shown: float
    slower: float


def unhidden_ring(numbers: Numbers, method: str) -> UnhiddenRing:
    """What a ring's rows say of it."""
    shares = []
    for case in numbers.cases:
        ours = numbers(case, FLASHCP, "module_ms")
        busy = numbers(case, method, "attention_ms") + numbers(case, method, "copies_ms")
        shares.append((busy / ours, numbers(case, method, "exchange_ms") / ours))
    busy_share, exchange_share = np.mean(shares, axis=0).tolist()
    slower = (MEAN_SPEEDUPS[method] - busy_share) / exchange_share
    return UnhiddenRing(_mean(numbers, method, ["module_ms"]), busy_share + exchange_share, slower)


def draw(numbers: Numbers, path: Path) -> None:
    """Six panels as in the paper, whose bars it does not print; ours beyond the paper as the last bars."""
    figure = Figure(figsize=(15, 7.5), layout="constrained", facecolor="white")
    grid = figure.subplots(2, 3, sharey="row")
    for row, (name, metric) in zip(grid, PASSES.items(), strict=True):
        for axes, (title, data) in zip(row, DATA.items(), strict=True):
            ours = {}
            for heads, ranks in GROUPS:
                case = _case(numbers, data, heads, ranks)
                base = numbers(case, "llama3", metric)
                providers = numbers.providers(case)
                ours[f"H={heads} N={ranks}"] = {p: base / numbers(case, p, metric) for p in providers}
            draw_bars(axes, ours, {}, COLOURS)
            axes.set_title(f"{title}, {name}", loc="left")
        row[0].set_ylabel("speedup over llama3")
        row[0].set_ylim(0, 1.15 * row[0].get_ylim()[1])  # room for what is written on the bars
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    judged = [cell for cell in cells(numbers) if cell.judged]
    means = ", ".join(
        f"{cell.what.removesuffix(', mean').split()[-1]} {cell.ours:.2f} ({cell.paper:g})" for cell in judged
    )
    figure.suptitle(f"simulated; mean speedups of {FLASHCP} over each, the paper's in brackets: {means}", fontsize=11)
    figure.savefig(path, dpi=160)
