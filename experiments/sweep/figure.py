"""The figure of a sweep: where a step's time goes, how the loss falls, how far it is from the single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flashcp.experiments.sweep.comparison import LOSS_TOLERANCE, Comparison, Line, relative_difference
from flashcp.experiments.sweep.rows import REFERENCE

__all__ = ["PALETTE", "PARTS", "comparison_figure", "draw_comparison", "method_colours", "step_parts", "tidy"]

PARTS = {"attention": "#2f6690", "exchange": "#e07a5f", "rest": "#c8d0d8"}
"""Parts of a step and their colours."""
PALETTE = ("#7a8691", "#2f6690", "#e07a5f", "#3a9d7c", "#b5838d", "#d9a441", "#6d597a", "#1d3557", "#9c6644", "#5fa8d3")
INK = "#22303c"
SMALLEST_DIFFERENCE = 1e-9  # where the logarithmic axis begins: losses that are equal lie on it


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Write the figure in the format of the path's suffix."""
    comparison_figure(comparison).savefig(path, dpi=160)


def comparison_figure(comparison: Comparison) -> Figure:
    """Three panels a case."""
    cases = comparison.cases
    figure = Figure(figsize=(13.5, 0.4 + 3.9 * len(cases)), layout="constrained", facecolor="white")
    grid = figure.subplots(len(cases), 3, squeeze=False, width_ratios=(1.25, 1, 1))
    colours = method_colours(comparison)
    for row, case in zip(grid, cases, strict=True):
        lines = [line for line in comparison.lines if line.case == case and not line.is_single]
        reference = next((line for line in comparison.lines if line.case == case and line.is_single), None)
        _draw_steps(row[0], lines, case, comparison.over)
        _draw_losses(row[1], lines, reference, colours)
        _draw_differences(row[2], lines, reference, colours)
        for axes in row:
            tidy(axes)
    return figure


def method_colours(comparison: Comparison) -> dict[str, str]:
    """One colour a method, the same in every panel."""
    providers = dict.fromkeys(line.provider for line in comparison.lines if not line.is_single)
    return {provider: PALETTE[number % len(PALETTE)] for number, provider in enumerate(providers)}


def step_parts(line: Line) -> dict[str, float]:
    """A step's median split in attention and exchange (the slowest rank's) and the rest, ms.

    Two ranks may be slowest in turn: what the two say together beyond the step is taken from the exchange. Between
    levels of overlap attention is that of `none`, the exchange what is exposed beside it.
    """
    step, attention, exchange = (x or 0.0 for x in (line.step_ms, line.attention_ms, line.exposed_exchange_ms))
    if line.exposed_ms is not None:
        attention, exchange = attention + exchange - line.exposed_ms, max(0.0, line.exposed_ms)
    attention = min(attention, step)
    exchange = min(exchange, step - attention)
    return {"attention": attention, "exchange": exchange, "rest": step - attention - exchange}


def _draw_steps(axes: Any, lines: list[Line], case: str, baseline: str) -> None:
    names = [line.provider for line in lines]
    left = [0.0] * len(lines)
    for part, colour in PARTS.items():
        widths = [step_parts(line)[part] for line in lines]
        axes.barh(names, widths, left=left, color=colour, label=part, height=0.66)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for place, (line, end) in enumerate(zip(lines, left, strict=True)):
        speedup = "" if line.speedup is None else f"  {line.speedup:.2f}x" if line.is_told_apart else "  not told apart"
        axes.text(end, place, speedup, va="center", fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.14 * max(left))
    axes.set_xlabel("ms a step (median)")
    axes.set_title(f"{case}\nstep time, speedup over {baseline}", loc="left")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=9)


def _draw_losses(axes: Any, lines: list[Line], reference: Line | None, colours: dict[str, str]) -> None:
    if reference:
        axes.plot(_steps(reference), reference.losses, color="#d7dde3", lw=6, label=REFERENCE, solid_capstyle="round")
    for number, line in enumerate(lines):  # curves that agree lie on each other: dashes in turn show them all
        style = (4 * number, (4, 4 * max(0, len(lines) - 1)))
        axes.plot(_steps(line), line.losses, color=colours[line.provider], lw=1.6, ls=style)
    axes.set_xlabel("step")
    axes.set_title("loss, nats a token (wide: one process)" if reference else "loss, nats a token", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_differences(axes: Any, lines: list[Line], reference: Line | None, colours: dict[str, str]) -> None:
    expected = reference.losses if reference else ()
    for line in lines:
        differences = [
            max(relative_difference(a, b), SMALLEST_DIFFERENCE) for a, b in zip(line.losses, expected, strict=False)
        ]
        axes.plot(
            range(1, len(differences) + 1), differences, color=colours[line.provider], lw=1.4, label=line.provider
        )
    axes.axhline(LOSS_TOLERANCE, color=INK, lw=1, ls=(0, (4, 3)))
    axes.set_yscale("log")
    axes.set_ylim(SMALLEST_DIFFERENCE / 2, 10 * LOSS_TOLERANCE)
    axes.set_xlabel("step")
    axes.set_title("loss, relative difference from one process", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)


def _steps(line: Line) -> range:
    return range(1, len(line.losses) + 1)


def tidy(axes: Any) -> None:
    """The look of every panel."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9aa5b1")
    axes.tick_params(colors=INK, labelsize=9)
    axes.title.set_fontsize(10.5)
    axes.title.set_color(INK)
    axes.grid(axis="x" if axes.patches else "y", color="#e6eaee", lw=0.8)
    axes.set_axisbelow(True)
