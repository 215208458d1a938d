"""The picture of one pack's simulation: what every rank does when, forward and backward, method by method."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from flashcp.experiments.folders import check_file
from flashcp.experiments.sweep.figure import INK, PARTS
from flashcp.simulator.batch import Options, make_plans
from flashcp.simulator.pack import Price, simulate_module
from flashcp.simulator.planned import Module, Planned, Setting
from flashcp.simulator.variants import Variant

__all__ = ["check_figure", "draw_timelines"]

COLOURS = {"attention": PARTS["attention"], "exchange": PARTS["exchange"], "copies": "#d9a441"}
LANES = {
    "attention": (-0.36, 0.5),
    "copies": (-0.36, 0.5),
    "exchange": (0.18, 0.18),
}  # low edge and height in a rank's row


def check_figure(name: str) -> Path:
    """The file that `draw_timelines` will write: PNG where the name has no suffix. Raises ValueError for others."""
    path = Path(name)
    file = path if path.suffix or os.path.isdir(path) else path.with_name(f"{path.name}.png")
    check_file(file, "figure")
    legal = sorted(Figure().canvas.get_supported_filetypes())
    if file.suffix[1:].lower() not in legal:
        raise ValueError(f"figure={name!r}: expected a file *.{', *.'.join(legal)}")
    return file


def draw_timelines(
    pack: np.ndarray,
    variants: Sequence[Variant],
    world_size: int,
    setting: Setting,
    path: Path,
    options: Options | None = None,
    price: Price = Planned,
) -> None:
    """Write the picture in the format of the path's suffix, into a directory that is made where there is none.

    One panel a method, all with the same scale; the broad bars are what a rank is busy with, the narrow ones rows that
    travel, gaps are waiting. Raises ValueError when it cannot be written.
    """
    plans = make_plans(pack, variants, world_size, options or {})
    modules = [simulate_module(price(plans[one.sharding], setting), one) for one in variants]
    columns = min(2, len(variants))
    lines = -(-len(variants) // columns)
    height = 0.8 + (0.75 + 0.13 * world_size) * lines
    figure = Figure(figsize=(13, height), layout="constrained", facecolor="white")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    longest = max(_end(module) for module in modules)
    for axes, variant, module in zip(grid, variants, modules, strict=False):
        _draw(axes, module, world_size)
        axes.set_xlim(0, longest / 1e3)
        axes.set_title(f"{variant.name}: {_end(module) / 1e3:.2f} ms", loc="left", fontsize=10, color=INK)
    for axes in grid[len(variants) :]:
        axes.remove()
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(
        f"{len(pack)} documents, {int(pack.sum())} tokens, {world_size} ranks, simulated on {setting.machine.name}; "
        "the line: where the backward begins",
        color=INK,
        fontsize=11,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:
        raise ValueError(f"figure={str(path)!r}: cannot be written ({error})") from error


def _end(module: Module) -> float:
    """When the last rank is through with the backward, us; it begins when the last one is through with the forward."""
    return float(module.forward.now.max() + module.backward.now.max())


def _draw(axes: Any, module: Module, world_size: int) -> None:
    turn = float(module.forward.now.max())
    for timeline, offset in ((module.forward, 0.0), (module.backward, turn)):
        for span in timeline.spans:
            low, height = LANES[span.kind]
            for rank in range(world_size):
                width = span.stop[rank] - span.start[rank]
                if width > 0:
                    bar = [((span.start[rank] + offset) / 1e3, width / 1e3)]
                    axes.broken_barh(bar, (rank + low, height), facecolors=COLOURS[span.kind], linewidth=0)
    axes.axvline(turn / 1e3, color=INK, lw=0.8)
    axes.set_ylim(world_size - 0.4, -0.6)
    axes.set_ylabel("rank", fontsize=8)
    axes.set_xlabel("ms", fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.tick_params(colors=INK, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
