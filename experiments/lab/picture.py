"""The lab's picture: measured speedups beside predicted ones, a pair of bars a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from flashcp.experiments.plots import spread_bars, styled
from flashcp.experiments.sweep.results import Row
from flashcp.simulator.summary import BASELINE

METRICS = {"speedup": "measured", "predicted_speedup": "predicted before"}


@styled
def draw_lab(rows: Sequence[Row], path: Path) -> None:
    """Write the picture of one case in the format of the path's suffix."""
    series = {label: [row for row in rows if row.metric == metric] for metric, label in METRICS.items()}
    figure = Figure(figsize=(8.5, 0.8 + 0.4 * len(series["measured"])))
    axes = figure.subplots()
    spread_bars(axes, series, 1.0)
    axes.axvline(1.0, color="#9aa5b1", linewidth=0.8)
    axes.set_title(rows[0].case)
    axes.set_xlabel(f"times faster than {BASELINE}: median, p20 and p80 over windows")
    figure.savefig(path)
