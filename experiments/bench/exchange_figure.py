"""The figure of the exchange benchmark: bytes, latency, bandwidth, and what attention hides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from flashcp.experiments.sweep.figure import PALETTE, tidy
from flashcp.experiments.sweep.rows import Row

__all__ = ["FIGURE", "draw_exchanges"]

FIGURE = "exchange.png"
EXPOSED = {"exposed_none_ms": "none", "exposed_staged_ms": "staged", "exposed_fused_ms": "fused"}
PANELS = {
    "sent_bytes": ("MB sent, busiest rank", 1e-6),
    "latency_us": ("latency us, one row a rank", 1.0),
    "bandwidth_gbps": ("GB/s, exchange alone", 1.0),
}


def draw_exchanges(rows: Sequence[Row], path: Path) -> None:
    """Write the figure in the format of the path's suffix: a panel a metric, a bar a transport and exchange."""
    figure = Figure(figsize=(13.5, 1.8 + 0.34 * len({row.provider for row in rows})), layout="constrained")
    grid = figure.subplots(1, len(PANELS) + 1, squeeze=False)[0]
    for axes, (metric, (title, factor)) in zip(grid, PANELS.items(), strict=False):
        _bars(axes, {"": [row for row in rows if row.metric == metric]}, factor)
        axes.set_title(title, loc="left", fontsize=10)
    _bars(grid[-1], {name: [row for row in rows if row.metric == metric] for metric, name in EXPOSED.items()}, 1.0)
    grid[-1].set_title(_about_hiding(rows), loc="left", fontsize=10)
    for axes in grid:
        tidy(axes)
    for axes in grid[1:-1]:
        axes.tick_params(labelleft=False)
    figure.suptitle(f"{rows[0].case}: medians with p20 and p80, the slowest rank", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=160)


def _about_hiding(rows: Sequence[Row]) -> str:
    throttled = {row.provider.split("/")[0]: row.median for row in rows if row.metric == "throttle_gbps"}
    slowed = "".join(f"; {transport} slowed to {gbps:.2g} GB/s" for transport, gbps in throttled.items())
    return f"ms exposed{slowed}"


def _bars(axes: Any, series: dict[str, list[Row]], factor: float) -> None:
    """Horizontal bars, those of several series side by side; providers from the top."""
    names = list(dict.fromkeys(row.provider for rows in series.values() for row in rows))
    for i, (label, rows) in enumerate(series.items()):
        if not rows:
            continue
        places = [names.index(row.provider) + 0.8 * ((i + 0.5) / len(series) - 0.5) for row in rows]
        widths = [factor * row.median for row in rows]
        spread = [
            [factor * abs(row.median - (row.median if end is None else end)) for row, end in ends]
            for ends in ([(row, row.p20) for row in rows], [(row, row.p80) for row in rows])
        ]
        colour = PALETTE[(i + 1) % len(PALETTE)]
        axes.barh(places, widths, 0.8 / len(series), xerr=spread, color=colour, label=label, ecolor="#9aa5b1")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    if len(series) > 1 and names:
        axes.legend(frameon=False, fontsize=9)
