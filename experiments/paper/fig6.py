"""Figure 6: the parts of one training pass, N = 8, H = 32, on two data sets; the first one was fitted, see `fit`."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from matplotlib.figure import Figure

from flashcp.experiments.paper.bars import tidy
from flashcp.experiments.paper.cells import Cell, Numbers
from flashcp.experiments.paper.values import BREAKDOWN, Breakdown
from flashcp.experiments.sweep.figure import PARTS

__all__ = ["breakdown", "cells", "draw"]

FITTED = "wlb_llm"
NAMES = {"wlb_llm": "WLB-LLM (fitted)", "pile": "Pile (the check)"}
COLOURS = ("#d9a441", PARTS["attention"], "#7fa8c4", PARTS["exchange"], "#f0b8a8")


def breakdown(numbers: Numbers, data: str, method: str) -> Breakdown:
    """The same parts of ours; what nothing hides of an exchange is halved between its two collectives."""
    case = numbers.case(data, "n8", "h32")
    forward, both = (numbers(case, method, f"attention{part}_ms") for part in ("_forward", ""))
    exposed = numbers(case, method, "exposed_exchange_ms") / 2
    return Breakdown(numbers(case, method, "copies_ms"), forward, both - forward, exposed, exposed)


def cells(numbers: Numbers) -> list[Cell]:
    """Ratios between methods of attention and totals, and the collectives' times; single times as context."""
    found = []
    for data, methods in BREAKDOWN.items():
        column = data == FITTED
        ours = {method: breakdown(numbers, data, method) for method in methods}
        for method, theirs in methods.items():
            for part in ("copies", "attention_forward", "attention_backward"):
                times = getattr(theirs, part), getattr(ours[method], part)
                found.append(Cell(f"{data} {method} {part} ms", *times, judged=False))
            for part in ("all_gather", "reduce_scatter"):  # the link's rate was read off those of whole windows
                times = getattr(theirs, part), getattr(ours[method], part)
                fitted = column or method != "flashcp_paper"
                found.append(Cell(f"{data} {method} {part} ms", *times, fitted=fitted))
            found.append(Cell(f"{data} {method} total ms", theirs.total, ours[method].total, judged=False))
        for part in ("attention_forward", "attention_backward", "total"):
            for one, other in combinations(methods, 2):
                paper, mine = (getattr(side[one], part) / getattr(side[other], part) for side in (methods, ours))
                found.append(Cell(f"{data} {part} {one}/{other}", paper, mine, fitted=column))
    return found


def draw(numbers: Numbers, path: Path) -> None:
    """The paper's stacked bars with ours beside them, and what ours reach beyond them."""
    figure = Figure(figsize=(14, 6), layout="constrained", facecolor="white")
    for axes, (data, methods) in zip(figure.subplots(1, 2), BREAKDOWN.items(), strict=True):
        bars = {}
        for method, theirs in methods.items():
            bars[f"{method}\npaper"] = theirs
            bars[f"{method}\nours"] = breakdown(numbers, data, method)
        for provider in numbers.providers(numbers.case(data, "n8", "h32")):
            if provider not in methods and not provider.startswith(("ring", "wlb")):
                bars[provider.replace("_best_effort", "\nbest effort")] = breakdown(numbers, data, provider)
        base = [0.0] * len(bars)
        for number, part in enumerate(Breakdown._fields):
            heights = [getattr(bar, part) for bar in bars.values()]
            axes.bar(list(bars), heights, bottom=base, color=COLOURS[number], label=part.replace("_", " "), width=0.7)
            base = [low + height for low, height in zip(base, heights, strict=True)]
        for place, total in enumerate(base):
            axes.text(place, total, f"{total:.1f}", ha="center", va="bottom", fontsize=8)
        axes.set_title(f"{NAMES[data]}: ms of one training pass, N = 8, 128K, H = 32", loc="left")
        tidy(axes)
        axes.set_ylabel("ms")
        axes.tick_params(axis="x", labelrotation=60, labelsize=8)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)
