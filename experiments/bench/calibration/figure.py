"""Predicted attention times beside measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from flashcp.experiments.bench.calibration.times import DIRECTIONS, TimeRow, errors
from flashcp.experiments.sweep.figure import INK, PALETTE

__all__ = ["draw_calibration"]


def draw_calibration(times: Sequence[TimeRow], path: Path) -> None:
    """One scatter of the schedules that fitted nothing: measured across, predicted up, logarithmic."""
    points = {}
    for direction in DIRECTIONS:
        found = errors(times, direction, "check")
        chosen = [row for row in times if (row.direction, row.split) == (direction, "check")]
        label = f"{direction}: error median {found.median:.1%}, p95 {found.p95:.1%}"
        points[label] = [(row.measured_us, row.predicted_us) for row in chosen]
    figure = Figure(figsize=(6.4, 5.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    every = [value / 1e3 for pairs in points.values() for pair in pairs for value in pair]
    ends = [0.8 * min(every), 1.25 * max(every)]
    axes.plot(ends, ends, color=INK, lw=1)
    axes.fill_between(ends, [0.75 * end for end in ends], [1.25 * end for end in ends], color="#e6eaee", label="25%")
    for (label, pairs), colour in zip(points.items(), PALETTE[1:], strict=False):
        measured, predicted = ([value / 1e3 for value in column] for column in zip(*pairs, strict=True))
        axes.scatter(measured, predicted, s=12, color=colour, label=label, alpha=0.8, linewidths=0)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="ms measured", ylabel="ms predicted")
    axes.set_title("attention of random ranks, schedules that fitted nothing", loc="left", fontsize=10.5, color=INK)
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=160)
