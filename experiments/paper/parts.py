"""Past the paper: where a speedup comes from, from a published method to `flashcp` one change at a time."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from flashcp.experiments.paper.bars import COLOURS, tidy
from flashcp.experiments.paper.cells import Cell, Numbers
from flashcp.experiments.sweep.figure import INK

__all__ = ["BASELINES", "CHANGES", "DATA", "Stage", "cells", "draw", "stages"]

DATA = {"wlb_llm": "WLB-LLM", "pile": "Pile"}
BASELINES = {"llama3": "per_sequence", "per_document": "per_document", "flashcp_paper": "flashcp_paper"}
CHANGES = ("as published", "no copies", "overlap", "only rows that are read", "our plan")


class Stage(NamedTuple):
    """A method on its way: what was changed last, the module's ms then, and the speedup of that change alone."""

    change: str
    ms: float
    speedup: float


def stages(numbers: Numbers, data: str, baseline: str) -> list[Stage]:
    """From a published method to ours."""
    none, staged = (numbers.case(data, overlap) for overlap in ("none", "staged"))
    times = [
        numbers(case, provider, "module_ms")
        for case, provider in (
            (none, baseline),
            (none, f"{baseline}_best_effort"),
            (staged, f"{baseline}_best_effort"),
            (staged, f"{BASELINES[baseline]}+exact"),
            (staged, "flashcp"),
        )
    ]
    before = [times[0], *times[:-1]]
    return [Stage(change, ms, was / ms) for change, ms, was in zip(CHANGES, times, before, strict=True)]


def cells(numbers: Numbers) -> list[Cell]:
    """Nothing of the paper's."""
    return []


def draw(numbers: Numbers, path: Path) -> None:
    """A panel for data and baseline: the module's time after each change, and what the change was worth."""
    figure = Figure(figsize=(15, 5.5), layout="constrained", facecolor="white")
    grid = figure.subplots(len(DATA), len(BASELINES), sharey=True, sharex="row")
    for row, (data, title) in zip(grid, DATA.items(), strict=True):
        for axes, baseline in zip(row, BASELINES, strict=True):
            found = stages(numbers, data, baseline)
            axes.barh([stage.change for stage in found], [stage.ms for stage in found], color=COLOURS[: len(found)])
            for place, stage in enumerate(found):
                text = f" {stage.ms:.1f} ms" + (f", {stage.speedup:.2f}x" if place else "")
                axes.text(stage.ms, place, text, va="center", fontsize=8.5, color=INK)
            axes.set_title(f"{title}, {baseline} to flashcp: {found[0].ms / found[-1].ms:.2f}x", loc="left")
            tidy(axes)
            axes.grid(visible=False, axis="y")
            axes.set_xlim(0, 1.25 * max(stages(numbers, data, each)[0].ms for each in BASELINES))
            axes.set_xlabel("ms")
    grid[0][0].invert_yaxis()  # all panels share it
    figure.suptitle("simulated: one training pass of the attention module, N = 8, 128K, H = 32", fontsize=11, color=INK)
    figure.savefig(path, dpi=160)
