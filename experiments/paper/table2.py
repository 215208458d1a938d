"""Table 2: communication saving and imbalance of the heuristic and of an exact solver, Pile, N = 4."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from flashcp.experiments.paper.bars import COLOURS, draw_bars
from flashcp.experiments.paper.cells import Cell, Numbers
from flashcp.experiments.paper.values import SOLVER

__all__ = ["cells", "draw", "plain_case"]

LABELS = {"exact": "solver"}
"""What the picture calls providers: `exact` is an exchange too."""


def cells(numbers: Numbers) -> list[Cell]:
    """The paper's two rows on windows as sampled; what the heuristic reaches of the solver's saving."""
    case = plain_case(numbers)
    found = []
    for method, theirs in SOLVER.items():
        for metric, paper in theirs.items():
            found.append(Cell(f"{method} {metric}", paper, numbers(case, method, metric)))
    share = SOLVER["flashcp_paper"]["saving"] / SOLVER["exact"]["saving"]
    ours = numbers(case, "flashcp_paper", "saving") / numbers(case, "exact", "saving")
    return [*found, Cell("heuristic's saving over the solver's", share, ours)]


def plain_case(numbers: Numbers) -> str:
    """The case with the data set's own share of long documents. Raises ValueError where there is none."""
    plain = [case for case in numbers.cases if not any(part.startswith("w") for part in case.split("-"))]
    if not plain:
        raise ValueError("no rows of data.long_document_weight=1")
    return plain[0]


def draw(numbers: Numbers, path: Path) -> None:
    """Savings by case, the paper's as black lines, and what the solver's bound leaves open."""
    figure = Figure(figsize=(9, 4.5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    ours = {}
    for case in numbers.cases:
        weight = next((part[1:] for part in case.split("-") if part.startswith("w")), "1")
        ours[f"Pile, long_document_weight {weight}"] = {
            **{LABELS.get(name, name): numbers(case, name, "saving") for name in numbers.providers(case)},
            "solver's bound": numbers(case, "exact", "bound"),
            "flashcp, exact exchange": numbers(case, "flashcp", "exact_saving"),
        }
    paper = {group: {LABELS.get(name, name): values["saving"] for name, values in SOLVER.items()} for group in ours}
    draw_bars(axes, ours, paper, COLOURS)
    axes.set_ylabel("saving against the all-gather")
    axes.set_title("compacted exchange, N = 4; black lines: the paper's heuristic and solver", loc="left")
    axes.set_ylim(0, 1.25)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center")
    figure.savefig(path, dpi=160)
