"""The look of every picture (`flashcp.mplstyle`), its colours, and the plots that several pictures share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from flashcp.experiments.bench.calibration import DIRECTIONS, TimeRow, errors
from flashcp.experiments.folders import check_file
from flashcp.experiments.sweep import compare
from flashcp.experiments.sweep.compare import Comparison, Line
from flashcp.experiments.sweep.results import Row

if TYPE_CHECKING:
    from flashcp.simulator.planned import Module

LOOK = matplotlib.rc_params_from_file(Path(__file__).with_name("flashcp.mplstyle"), use_default_template=False)
PALETTE: list[str] = LOOK["axes.prop_cycle"].by_key()["color"]
INK: str = LOOK["text.color"]
TIME_COLOURS = {"attention": PALETTE[1], "exchange": PALETTE[2], "rest": "#c8d0d8"}
"""Parts of a step and their colours."""
WIDTH = 0.8  # of a group of bars
styled = matplotlib.rc_context(LOOK)
"""Decorates a function that draws: under the style sheet."""


def save(figure: Figure, path: Path) -> Path:
    """Write a picture that a user named, in the format of the path's suffix. Raises ValueError when that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"figure={str(path)!r}: cannot be written ({error})") from error
    return path


def legend_below(figure: Figure, colours: Mapping[str, str]) -> None:
    """One legend for all panels."""
    handles = [Patch(color=colour, label=label) for label, colour in colours.items()]
    columns = min(len(handles), int(figure.get_figwidth() / 1.8))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def ends(row: Row) -> tuple[float, float]:
    """p20 and p80; the median where there is none."""
    return (row.median if row.p20 is None else row.p20, row.median if row.p80 is None else row.p80)


def spread(rows: Sequence[Row]) -> np.ndarray:
    """How far p20 lies below each row's median and p80 above it: what error bars take [2, R]."""
    return np.abs(np.transpose([ends(row) for row in rows]) - [row.median for row in rows])


def _sideways(axes: Any) -> None:
    """Bars lie: the first on top, the grid across them."""
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")


class Panel(NamedTuple):
    """ours: bars, by group and series. paper: values that stand over some of them as black lines."""

    title: str
    ours: Mapping[str, Mapping[str, float]]
    paper: Mapping[str, Mapping[str, float]] = {}


@styled
def bars(
    rows: Sequence[Sequence[Panel]], path: Path, *, ylabel: str, size: tuple[float, float], title: str = ""
) -> None:
    """A grid of panels, each with a group of bars per key. Values are written on the bars; a row shares its scale."""
    figure = Figure(figsize=size)
    grid = figure.subplots(len(rows), len(rows[0]), sharey="row", squeeze=False)
    names = dict.fromkeys(name for row in rows for panel in row for values in panel.ours.values() for name in values)
    colours = {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(names)}
    for row, panels in zip(grid, rows, strict=True):
        row[0].set_ylabel(ylabel)
        for axes, panel in zip(row, panels, strict=True):
            _groups(axes, panel, colours)
        row[0].set_ylim(0, 1.15 * row[0].get_ylim()[1])  # room for what is written on the bars
    if any(panel.paper for row in rows for panel in row):
        colours["the paper's (line)"] = "black"
    legend_below(figure, colours)
    figure.suptitle(title)
    figure.savefig(path)


def _groups(axes: Any, panel: Panel, colours: Mapping[str, str]) -> None:
    for place, (group, values) in enumerate(panel.ours.items()):
        each = WIDTH / len(values)
        for number, (name, value) in enumerate(values.items()):
            left = place - WIDTH / 2 + number * each
            axes.bar(left, value, width=0.94 * each, align="edge", color=colours[name])
            theirs = panel.paper.get(group, {}).get(name)
            if theirs is not None:
                axes.hlines(theirs, left, left + each, color="black", lw=2)
            top, turn = max(value, theirs or 0.0), 90 if len(values) > 5 else 0
            axes.text(left + each / 2, top, f" {value:.2f}", ha="center", va="bottom", fontsize=7, rotation=turn)
    axes.set_xticks(range(len(panel.ours)), list(panel.ours))
    axes.set_title(panel.title)


@styled
def stacks(panels: Sequence[Panel], path: Path, *, ylabel: str, colours: Mapping[str, str]) -> None:
    """A panel beside the other, each with a column per group whose parts stand on each other. Totals on top."""
    figure = Figure(figsize=(7 * len(panels), 6))
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        base = np.zeros(len(panel.ours))
        for part, colour in colours.items():
            heights = [values[part] for values in panel.ours.values()]
            axes.bar(list(panel.ours), heights, bottom=base, color=colour, width=0.7)
            base = base + heights
        for place, total in enumerate(base):
            axes.text(place, total, f"{total:.1f}", ha="center", va="bottom", fontsize=8)
        axes.set(title=panel.title, ylabel=ylabel)
        axes.tick_params(axis="x", labelrotation=60, labelsize=8)
    legend_below(figure, {part.replace("_", " "): colour for part, colour in colours.items()})
    figure.savefig(path)


# --- a sweep: where a step's time goes, how the loss falls, how far it is from the single process

SMALLEST_DIFFERENCE = 1e-9  # where the logarithmic axis begins: losses that are equal lie on it
BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
"""Where a legend stands that is of the last panel."""


@styled
def comparison_figure(comparison: Comparison) -> Figure:
    """Three panels a case; below them speedups over what differs between the cases, where methods are compared."""
    cases, across = comparison.cases, bool(comparison.factors) and not comparison.of_overlap
    figure = Figure(figsize=(13.5, 0.4 + 3.9 * (len(cases) + across)))
    parts: Any = figure.subfigures(2, 1, height_ratios=(len(cases), 1)) if across else [figure]
    grid = parts[0].subplots(len(cases), 3, squeeze=False, width_ratios=(1.25, 1, 1))
    providers = dict.fromkeys(line.provider for line in comparison.runs)
    colours = {provider: PALETTE[number % len(PALETTE)] for number, provider in enumerate(providers)}
    for row, case in zip(grid, cases, strict=True):
        lines = [line for line in comparison.runs if line.case == case]
        reference = next((line for line in comparison.lines if line.case == case and line not in lines), None)
        _draw_steps(row[0], lines, f"{comparison.title(case)}\nstep time, speedup over {comparison.over}")
        _draw_losses(row[1:], lines, reference, colours)
    if across:
        _draw_speedups(parts[1].subplots(), comparison, colours)
    return figure


def _draw_steps(axes: Any, lines: list[Line], title: str) -> None:
    tips = np.zeros(len(lines))
    for part, colour in TIME_COLOURS.items():
        widths = [compare.step_parts(line)[part] for line in lines]
        axes.barh([line.provider for line in lines], widths, left=tips, color=colour, label=part, height=0.66)
        tips = tips + widths
    for place, (line, tip) in enumerate(zip(lines, tips, strict=True)):
        speedup = f"  {line.missing}" if line.speedup is None else f"  {line.speedup:.2f}x"
        axes.text(tip, place, speedup if compare.is_told_apart(line) else "  not told apart", va="center", fontsize=9)
    _sideways(axes)
    axes.set(xlim=(0, 1.14 * max(tips) or 1), xlabel="ms a step (median)", title=title)  # all may have been left out
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)


def _draw_losses(panels: Any, lines: list[Line], reference: Line | None, colours: Mapping[str, str]) -> None:
    """The losses of every run, and how far they are from those of the single process."""
    falling, apart = panels
    expected = reference.losses if reference else ()
    if reference:
        falling.plot(range(1, len(expected) + 1), expected, color="#d7dde3", lw=6, solid_capstyle="round")
    for number, line in enumerate(lines):  # curves that agree lie on each other: dashes in turn show them all
        style = (4 * number, (4, 4 * max(0, len(lines) - 1)))
        steps, colour = range(1, len(line.losses) + 1), colours[line.provider]
        falling.plot(steps, line.losses, color=colour, lw=1.6, ls=style)
        pairs = zip(line.losses, expected, strict=False)
        differences = [max(compare.relative_difference(a, b), SMALLEST_DIFFERENCE) for a, b in pairs]
        apart.plot(steps[: len(differences)], differences, color=colour, lw=1.4, label=line.provider)
    falling.set_title("loss, nats a token (wide: one process)" if reference else "loss, nats a token")
    apart.axhline(compare.LOSS_TOLERANCE, color=INK, lw=1, ls=(0, (4, 3)))
    apart.set(yscale="log", ylim=(SMALLEST_DIFFERENCE / 2, 10 * compare.LOSS_TOLERANCE))
    apart.set_title("loss, relative difference from one process")
    apart.legend(**BESIDE)
    for axes in panels:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_speedups(axes: Any, comparison: Comparison, colours: Mapping[str, str]) -> None:
    (name, *cases), _ = comparison.by_factor()
    found = {(line.provider, line.case): line for line in comparison.runs}
    for number, (provider, colour) in enumerate(colours.items()):
        lines = [found.get((provider, case)) for case in comparison.cases]
        speedups = [line.speedup if line and line.speedup else np.nan for line in lines]
        places = np.arange(len(cases)) + 0.3 * (number / max(1, len(colours) - 1) - 0.5)  # ranges stand side by side
        axes.plot(places, speedups, "o-", color=colour, lw=1.4, ms=5, label=provider)
        for place, line in zip(places, lines, strict=True):
            if line and line.speedup_p20 is not None:
                axes.vlines(place, line.speedup_p20, line.speedup_p80, color=colour, lw=1)
    axes.set_xticks(range(len(cases)), cases)
    axes.set(xlabel=name, title=f"speedup over {comparison.over}, p20 to p80 of the turns")
    axes.legend(**BESIDE)


# --- one pack's simulation: what every rank does when, method by method

KINDS = {"attention": TIME_COLOURS["attention"], "exchange": TIME_COLOURS["exchange"], "copies": "#d9a441"}
BUSY, TRAVELS = (-0.36, 0.5), (0.18, 0.18)  # low edge and height in a rank's row


def check_figure(name: str) -> Path:
    """The file that `draw_timelines` will write: PNG where the name has no suffix. Raises ValueError for others."""
    path = Path(name)
    file = path if path.suffix or os.path.isdir(path) else path.with_name(f"{path.name}.png")
    check_file(file, "figure")
    legal = sorted(Figure().canvas.get_supported_filetypes())
    if file.suffix[1:].lower() not in legal:
        raise ValueError(f"figure={name!r}: expected a file *.{', *.'.join(legal)}")
    return file


@styled
def draw_timelines(modules: Mapping[str, Module], title: str, path: Path) -> None:
    """Write the picture in the format of the path's suffix, into a directory that is made where there is none.

    modules: a simulated module by method. One panel a method, all with the same scale; the broad bars are what a rank
    is busy with, the narrow ones rows that travel, gaps are waiting. Raises ValueError when it cannot be written.
    """
    ranks = max(len(module.forward.now) for module in modules.values())
    columns = min(2, len(modules))
    lines = -(-len(modules) // columns)
    figure = Figure(figsize=(13, 0.8 + (0.75 + 0.13 * ranks) * lines))
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    # The backward begins when the last rank is through with the forward.
    ends_ms = {name: (one.forward.now.max() + one.backward.now.max()) / 1e3 for name, one in modules.items()}
    for axes, (name, module) in zip(grid, modules.items(), strict=False):
        _draw_module(axes, module, ranks)
        axes.set(xlim=(0, max(ends_ms.values())), title=f"{name}: {ends_ms[name]:.2f} ms")
        axes.grid(visible=False)
    for axes in grid[len(modules) :]:
        axes.remove()
    legend_below(figure, KINDS)
    figure.suptitle(f"{title}; the line: where the backward begins")
    save(figure, path)


def _draw_module(axes: Any, module: Module, ranks: int) -> None:
    turn = float(module.forward.now.max())
    for timeline, offset in ((module.forward, 0.0), (module.backward, turn)):
        for span in timeline.spans:
            low, height = TRAVELS if span.kind == "exchange" else BUSY
            for rank in range(ranks):
                holder = rank * len(span.stop) // ranks  # its members do the same
                width = span.stop[holder] - span.start[holder]
                if width > 0:
                    bar = [((span.start[holder] + offset) / 1e3, width / 1e3)]
                    axes.broken_barh(bar, (rank + low, height), facecolors=KINDS[span.kind], linewidth=0)
    axes.axvline(turn / 1e3, color=INK, lw=0.8)
    axes.set_ylim(ranks - 0.4, -0.6)
    axes.set_ylabel("rank", fontsize=8)
    axes.set_xlabel("ms", fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


# --- benchmarks: bars with their p20 and p80

EXCHANGE = (
    ("MB sent, busiest rank", 1e-6, {"sent_bytes": ""}),
    ("latency us, one row a rank", 1.0, {"latency_us": ""}),
    ("GB/s, exchange alone", 1.0, {"bandwidth_gbps": ""}),
    ("ms exposed{slowed}", 1.0, {f"exposed_{level}_ms": level for level in ("none", "staged", "fused")}),
)
"""Panels: title, factor, and series by metric."""


@styled
def draw_exchanges(rows: Sequence[Row], path: Path) -> None:
    """Write the figure in the format of the path's suffix: bytes, latency, bandwidth and what attention does not hide,
    a bar a transport and exchange."""
    figure = Figure(figsize=(13.5, 1.8 + 0.34 * len({row.provider for row in rows})))
    grid = figure.subplots(1, len(EXCHANGE))
    throttled = {row.provider.split("/")[0]: row.median for row in rows if row.metric == "throttle_gbps"}
    slowed = "".join(f"; {transport} slowed to {gbps:.2g} GB/s" for transport, gbps in throttled.items())
    for axes, (title, factor, metrics) in zip(grid, EXCHANGE, strict=True):
        spread_bars(axes, {name: [row for row in rows if row.metric == key] for key, name in metrics.items()}, factor)
        axes.set_title(title.format(slowed=slowed))
    for axes in grid[1:-1]:
        axes.tick_params(labelleft=False)
    figure.suptitle(f"{rows[0].case}: medians with p20 and p80, the slowest rank")
    figure.savefig(path)


@styled
def draw_rates(rows: Sequence[Row], folder: Path) -> None:
    """Write forward.png and backward.png of the attention benchmark: TFLOP/s of every provider on every case."""
    for which in ("forward", "backward"):
        kept = [row for row in rows if row.metric == f"{which}_tflops"]
        series = {
            name: [row for row in kept if row.provider == name] for name in dict.fromkeys(r.provider for r in kept)
        }
        figure = Figure(figsize=(10, 1 + 0.45 * len({row.case for row in kept})))
        axes = figure.subplots()
        spread_bars(axes, series, 1.0, by="case")
        axes.set_xlabel(f"{which}, useful TFLOP/s (bf16, head_dim 128; higher is better)")
        figure.savefig(folder / f"{which}.png")


def spread_bars(axes: Any, series: Mapping[str, Sequence[Row]], factor: float, by: str = "provider") -> None:
    """Horizontal bars, those of several series side by side. by: what has a bar in each series, from the top."""
    names = list(dict.fromkeys(getattr(row, by) for rows in series.values() for row in rows))
    for i, (label, rows) in enumerate(series.items()):
        if not rows:
            continue
        places = [names.index(getattr(row, by)) + 0.8 * ((i + 0.5) / len(series) - 0.5) for row in rows]
        widths = [factor * row.median for row in rows]
        look: dict[str, Any] = {"color": PALETTE[(i + 1) % len(PALETTE)], "ecolor": "#9aa5b1", "label": label}
        axes.barh(places, widths, 0.8 / len(series), xerr=factor * spread(rows), **look)
    axes.set_yticks(range(len(names)), names)
    _sideways(axes)
    if len(series) > 1 and names:
        axes.legend()


@styled
def draw_calibration(times: Sequence[TimeRow], path: Path) -> None:
    """One scatter of the schedules that fitted nothing: measured across, predicted up, logarithmic."""
    checked = [row for row in times if row.split == "check"]
    figure = Figure(figsize=(6.4, 5.6))
    axes = figure.subplots()
    every = [us / 1e3 for row in checked for us in (row.measured_us, row.predicted_us)]
    range_ms = np.array([0.8 * min(every), 1.25 * max(every)])
    axes.plot(range_ms, range_ms, color=INK, lw=1)
    axes.fill_between(range_ms, 0.75 * range_ms, 1.25 * range_ms, color="#e6eaee", label="25%")
    for direction, colour in zip(DIRECTIONS, PALETTE[1:], strict=False):
        found = errors(times, direction, "check")
        pairs = [(row.measured_us / 1e3, row.predicted_us / 1e3) for row in checked if row.direction == direction]
        label = f"{direction}: error median {found.median:.1%}, p95 {found.p95:.1%}"
        measured, predicted = zip(*pairs, strict=True)
        axes.scatter(measured, predicted, s=12, color=colour, label=label, alpha=0.8, linewidths=0)
    axes.set(xscale="log", yscale="log", xlim=range_ms, ylim=range_ms, xlabel="ms measured", ylabel="ms predicted")
    axes.set_title("attention of random ranks, schedules that fitted nothing")
    axes.legend()
    figure.savefig(path)
