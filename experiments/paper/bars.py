"""Groups of bars, the paper's values as marks on ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashcp.experiments.sweep.figure import INK, PALETTE

__all__ = ["draw_bars", "tidy"]

WIDTH = 0.8


def draw_bars(
    axes: Any, ours: Mapping[str, Mapping[str, float]], paper: Mapping[str, Mapping[str, float]], colours: list[str]
) -> None:
    """One group a key, one bar a series; a black line where the paper has a value. Values are written on the bars."""
    series = list(next(iter(ours.values())))
    each = WIDTH / len(series)
    for place, (group, values) in enumerate(ours.items()):
        for number, (name, value) in enumerate(values.items()):
            left = place - WIDTH / 2 + number * each
            label = name if place == 0 else None
            axes.bar(left, value, width=0.94 * each, align="edge", color=colours[number % len(colours)], label=label)
            turn = 90 if len(series) > 4 else 0
            theirs = paper.get(group, {}).get(name)
            top = max(value, theirs or 0.0)  # what is written stands above the paper's line too
            axes.text(
                left + each / 2, top, f" {value:.2f}", ha="center", va="bottom", fontsize=7, color=INK, rotation=turn
            )
            if theirs is not None:
                axes.hlines(theirs, left, left + each, color="black", lw=2)
    if any(paper.values()):
        axes.hlines([], 0, 0, color="black", lw=2, label="the paper's")
    axes.set_xticks(range(len(ours)), list(ours))
    tidy(axes)


def tidy(axes: Any) -> None:
    """As the figures of sweeps look."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.title.set_fontsize(10.5)
    axes.title.set_color(INK)
    axes.grid(axis="y", color="#e6eaee", lw=0.8)
    axes.set_axisbelow(True)


COLOURS = list(PALETTE)
