"""Every figure of the paper that is drawn again: what of it ours stands beside, and the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flashcp.experiments.paper import beyond, published, reality
from flashcp.experiments.paper.numbers import Cell, Numbers, verdict
from flashcp.experiments.sweep.results import Row

__all__ = ["FIGURES", "PaperFigure", "publish_figure"]


def nothing(numbers: Numbers) -> Any:
    """Of figures that the paper does not have, or that say no more than their numbers."""
    return []


class PaperFigure(NamedTuple):
    """title: what the paper shows there. draw: the picture of its numbers and ours. cells: the numbers. facts: what
    `page.md.j2` tells of them beside. theirs: whose the numbers are that ours stand beside."""

    title: str
    draw: Callable[[Numbers, Path], None]
    cells: Callable[[Numbers], list[Cell]] = nothing
    facts: Callable[[Numbers], Any] = nothing
    theirs: str = "paper"


FIGURES = {
    "paper_fig3": PaperFigure("attention kernels alone, relative to llama3", published.fig3_draw, published.fig3_cells),
    "paper_fig5": PaperFigure(
        "average speedups of FlashCP", published.fig5_draw, published.fig5_cells, published.fig5_facts
    ),
    "paper_fig6": PaperFigure(
        "where the time of one training pass goes", published.fig6_draw, published.fig6_cells, published.fig6_facts
    ),
    "paper_fig7": PaperFigure(
        "speedup over llama3 by window", published.fig7_draw, published.fig7_cells, published.fig7_facts
    ),
    "paper_table2": PaperFigure(
        "the heuristic beside an exact solver", published.table2_draw, published.table2_cells, published.table2_facts
    ),
    "demo_predicted": PaperFigure(
        "the simulator against reality: the demo's two CPU ranks",
        *(reality.draw, reality.cells, reality.facts),
        theirs="measured",
    ),
    "demo_hybrid": PaperFigure(
        "the same, with every rank's kernels run and the exchange modelled",
        *(reality.draw, reality.cells, reality.facts),
        theirs="measured",
    ),
    "speedup_parts": PaperFigure(
        "where a speedup comes from, one change at a time", beyond.parts_draw, facts=beyond.parts_facts
    ),
    "beyond_paper": PaperFigure("where each method wins", beyond.wins_draw, facts=beyond.wins_facts),
}


def publish_figure(name: str, rows: Sequence[Row], out: Path) -> str:
    """Draw the figure into the directory of its rows; every number beside the paper's, and how far they are apart.

    Raises ValueError where rows that it needs are missing.
    """
    figure, numbers = FIGURES[name], Numbers(rows)
    try:
        cells = figure.cells(numbers)
        figure.draw(numbers, out / f"{name}.png")
    except (ArithmeticError, LookupError, StopIteration) as error:  # of rows that are not all there
        raise ValueError(f"{name} cannot be made of these rows ({type(error).__name__}: {error})") from error
    return "\n".join([f"{name}: {figure.title}", *map(str, cells), verdict(cells)])
