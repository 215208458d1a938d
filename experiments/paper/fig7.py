"""Figure 7: speedup over llama3 by window, WLB-LLM's lengths, N = 8."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from flashcp.experiments.paper.bars import COLOURS, draw_bars
from flashcp.experiments.paper.cells import Cell, Numbers
from flashcp.experiments.paper.values import SPEEDUPS_BY_CONTEXT

__all__ = ["cells", "draw"]

FITTED = ("training", 131_072)  # the column of Figure 6
PASSES = {"inference": "forward_ms", "training": "module_ms"}


def _speedup(numbers: Numbers, context: int, method: str, metric: str) -> float:
    case = numbers.case(f"c{context // 1024}k")
    return numbers(case, "llama3", metric) / numbers(case, method, metric)


def cells(numbers: Numbers) -> list[Cell]:
    """Every speedup that the paper prints."""
    return [
        Cell(
            f"{name} {context // 1024}K {method} over llama3",
            paper,
            _speedup(numbers, context, method, PASSES[name]),
            fitted=(name, context) == FITTED,
        )
        for name, methods in SPEEDUPS_BY_CONTEXT.items()
        for method, contexts in methods.items()
        for context, paper in contexts.items()
    ]


def draw(numbers: Numbers, path: Path) -> None:
    """Two panels: inference and training."""
    figure = Figure(figsize=(12, 4.5), layout="constrained", facecolor="white")
    for axes, (name, methods) in zip(figure.subplots(1, 2), SPEEDUPS_BY_CONTEXT.items(), strict=True):
        contexts = list(methods["per_document"])
        ours, paper = {}, {}
        for context in contexts:
            label = f"{context // 1024}K"
            providers = [p for p in numbers.providers(numbers.case(f"c{context // 1024}k")) if p != "llama3"]
            ours[label] = {p: _speedup(numbers, context, p, PASSES[name]) for p in providers}
            paper[label] = {method: values[context] for method, values in methods.items()}
        draw_bars(axes, ours, paper, COLOURS[1:])
        axes.set_title(f"{name}: simulated; black lines: the paper", loc="left")
        axes.set_xlabel("window")
        axes.set_ylabel("speedup over llama3")
        axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
        axes.set_ylim(0, 1.35 * max(value for group in ours.values() for value in group.values()))
    figure.savefig(path, dpi=160)
