"""The look of every picture (`flashcp.mplstyle`), its colours, and the plots that several pictures share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

__all__ = ["INK", "PALETTE", "PARTS", "Panel", "bars", "legend_below", "save", "stacks", "styled"]

P = ParamSpec("P")
R = TypeVar("R")
STYLE = Path(__file__).with_name("flashcp.mplstyle")
LOOK = matplotlib.rc_params_from_file(STYLE, use_default_template=False)
PALETTE: list[str] = LOOK["axes.prop_cycle"].by_key()["color"]
INK: str = LOOK["text.color"]
PARTS = {"attention": PALETTE[1], "exchange": PALETTE[2], "rest": "#c8d0d8"}
"""Parts of a step and their colours."""
WIDTH = 0.8  # of a group of bars


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """A function that draws, under the style sheet."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(LOOK):
            return draw(*args, **kwargs)

    return drawn


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
        base = [0.0] * len(panel.ours)
        for part, colour in colours.items():
            heights = [values[part] for values in panel.ours.values()]
            axes.bar(list(panel.ours), heights, bottom=base, color=colour, width=0.7)
            base = [low + height for low, height in zip(base, heights, strict=True)]
        for place, total in enumerate(base):
            axes.text(place, total, f"{total:.1f}", ha="center", va="bottom", fontsize=8)
        axes.set_title(panel.title)
        axes.set_ylabel(ylabel)
        axes.tick_params(axis="x", labelrotation=60, labelsize=8)
    legend_below(figure, {part.replace("_", " "): colour for part, colour in colours.items()})
    figure.savefig(path)
