"""Figure 3: kernel latency of whole and of cut documents, relative to llama3's (H = 32, N = 8)."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from flashcp.experiments.paper.bars import COLOURS, draw_bars
from flashcp.experiments.paper.cells import Cell, Numbers
from flashcp.experiments.paper.values import KERNEL_LATENCY

__all__ = ["cells", "draw"]

CASES = {"one 128K document": "1x131072", "sixteen 8K documents": "16x8192"}


def _ours(numbers: Numbers) -> dict[str, dict[str, float]]:
    found = {}
    for name, part in CASES.items():
        case = numbers.case(part)
        base = numbers(case, "llama3", "attention_forward_ms")
        found[name] = {method: numbers(case, method, "attention_forward_ms") / base for method in KERNEL_LATENCY[name]}
    return found


def cells(numbers: Numbers) -> list[Cell]:
    """The four latencies that are not 1 by definition."""
    ours = _ours(numbers)
    return [
        Cell(f"{name}, {method} over llama3", paper, ours[name][method])
        for name, methods in KERNEL_LATENCY.items()
        for method, paper in methods.items()
        if method != "llama3"
    ]


def draw(numbers: Numbers, path: Path) -> None:
    """Two groups of three bars."""
    figure = Figure(figsize=(7, 4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    draw_bars(axes, _ours(numbers), KERNEL_LATENCY, COLOURS)
    axes.set_ylabel("kernel latency over llama3's")
    axes.set_title("attention kernels, forward: simulated, black lines: the paper", loc="left")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    axes.set_ylim(0, 1.75)
    figure.savefig(path, dpi=160)
