"""The lab's picture: measured speedups beside predicted ones, a pair of bars a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from flashcp.experiments.plots import PALETTE, styled
from flashcp.experiments.sweep.results import Row
from flashcp.simulator.summary import BASELINE


@styled
def draw_lab(rows: Sequence[Row], path: Path) -> None:
    """Write the picture in the format of the path's suffix: a panel a case."""
    cases = list(dict.fromkeys(row.case for row in rows))
    figure = Figure(figsize=(8.5, 0.6 + 2.9 * len(cases)))
    for axes, case in zip(figure.subplots(len(cases), 1, squeeze=False)[:, 0], cases, strict=True):
        mine = [row for row in rows if row.case == case]
        names = list(dict.fromkeys(row.provider for row in mine if row.metric == "speedup"))
        for place, (metric, label) in enumerate((("speedup", "measured"), ("predicted_speedup", "predicted before"))):
            found = {row.provider: row for row in mine if row.metric == metric}
            medians = [found[name].median for name in names]
            ends = [[found[name].p20 or 0.0 for name in names], [found[name].p80 or 0.0 for name in names]]
            error = [
                [middle - low for middle, low in zip(medians, ends[0], strict=True)],
                [high - middle for middle, high in zip(medians, ends[1], strict=True)],
            ]
            places = [index + 0.4 * (place - 0.5) for index in range(len(names))]
            colour = (PALETTE[1], "#c8d0d8")[place]
            axes.barh(places, medians, 0.4, xerr=error, color=colour, ecolor="#9aa5b1", label=label)
        axes.axvline(1.0, color="#9aa5b1", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_title(case)
        axes.set_xlabel(f"times faster than {BASELINE}: median, p20 and p80 over windows")
    figure.axes[0].legend(loc="upper right")
    figure.savefig(path)
