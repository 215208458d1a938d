"""Every figure of the paper that is drawn again: what of it ours stands beside, and the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from flashcp.experiments.paper import beyond, fig3, fig5, fig6, fig7, parts, reality, table2
from flashcp.experiments.paper.cells import Cell, Numbers, verdict
from flashcp.experiments.sweep.rows import Row

__all__ = ["FIGURES", "PaperFigure", "publish_figure"]


class PaperFigure(NamedTuple):
    """title: what the paper shows there. cells: its numbers and ours. draw: the picture of both. theirs: whose the
    numbers are that ours stand beside."""

    title: str
    cells: Callable[[Numbers], list[Cell]]
    draw: Callable[[Numbers, Path], None]
    theirs: str = "paper"


FIGURES = {
    "paper_fig3": PaperFigure("attention kernels alone, relative to llama3", fig3.cells, fig3.draw),
    "paper_fig5": PaperFigure("average speedups of FlashCP", fig5.cells, fig5.draw),
    "paper_fig6": PaperFigure("where the time of one training pass goes", fig6.cells, fig6.draw),
    "paper_fig7": PaperFigure("speedup over llama3 by window", fig7.cells, fig7.draw),
    "paper_table2": PaperFigure("the heuristic beside an exact solver", table2.cells, table2.draw),
    "demo_predicted": PaperFigure(
        "the simulator against reality: the demo's two CPU ranks", reality.cells, reality.draw, "measured"
    ),
    "demo_hybrid": PaperFigure(
        "the same, with every rank's kernels run and the exchange modelled", reality.cells, reality.draw, "measured"
    ),
    "speedup_parts": PaperFigure("where a speedup comes from, one change at a time", parts.cells, parts.draw),
    "beyond_paper": PaperFigure("where each method wins", beyond.cells, beyond.draw),
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
