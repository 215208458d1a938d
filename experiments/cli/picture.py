"""Pictures of plans: who holds which rows, who computes what, and how even that is; one plan, or methods beside each
other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from flashcp.experiments.plots import INK, PALETTE, PARTS, save, styled
from flashcp.sharding.plan import ShardingPlan

__all__ = ["draw_methods", "draw_plan"]

LEGEND_RANKS = 16  # more ranks than this are told apart by their order alone


@styled
def draw_plan(plan: ShardingPlan, exchange: str, path: Path) -> Path:
    """Write the picture in the format of the path's suffix, PNG where there is none. Returns the file written.

    Raises ValueError when it cannot be written.

    Left: the causal pairs of the pack, coloured by the rank that computes them (for `ulysses`, which splits heads,
    by the rank that holds the query). Right: the rows each rank holds; its work, and the rows it sends and receives.
    """
    figure = Figure(figsize=(13, 6.2))
    grid = figure.add_gridspec(2, 2, width_ratios=(1.0, 1.25), height_ratios=(1.4, 1.0))
    colours = _colours(plan)
    _draw_pairs(figure.add_subplot(grid[:, 0]), plan, colours)
    _draw_rows(figure.add_subplot(grid[0, 1]), plan, colours)
    below = grid[1, 1].subgridspec(1, 2)
    _draw_work(figure.add_subplot(below[0]), plan, colours)
    _draw_traffic(figure.add_subplot(below[1]), plan, exchange)
    figure.suptitle(
        f"{plan.strategy}, {exchange}: {len(plan.document_lengths)} documents, {plan.offsets[-1]} tokens, "
        f"{plan.world_size} ranks; imbalance {plan.imbalance:.3f}, saving {plan.route(exchange).saving:.3f}"
    )
    return _save(figure, path)


@styled
def draw_methods(plans: Mapping[str, tuple[ShardingPlan, str]], path: Path) -> Path:
    """Write one picture of several methods on the same pack, each a plan and its exchange, side by side.

    Above: who computes what. Below: the KV rows that each rank receives, all to one scale. Returns the file written.
    Raises ValueError when it cannot be written.
    """
    columns = min(len(plans), 4)
    lines = -(-len(plans) // columns)
    figure = Figure(figsize=(4.1 * columns, 5.4 * lines))
    grid = figure.add_gridspec(2 * lines, columns, height_ratios=(3.4, 1.0) * lines)
    routes = {name: plan.route(exchange) for name, (plan, exchange) in plans.items()}
    most = max(int(route.received_rows.max()) for route in routes.values())
    for number, (name, route) in enumerate(routes.items()):
        line, column = divmod(number, columns)
        plan, colours = plans[name][0], _colours(plans[name][0])
        above, below = (figure.add_subplot(grid[2 * line + half, column]) for half in (0, 1))
        _draw_pairs(above, plan, colours)
        above.set_title(f"{name}: busiest rank {route.imbalance:.2f} x the mean")
        below.bar(range(plan.world_size), route.received_rows, color=colours)
        below.set_ylim(0, 1.1 * max(1, most))
        below.set_xlabel("rank")
        below.set_title(f"KV rows received: {route.received_rows.sum():,.0f}")
    return _save(figure, path)


def _draw_pairs(axes: Any, plan: ShardingPlan, colours: np.ndarray) -> None:
    """A shard's pairs are a trapezoid: its queries down, from the document's first key to the query itself across."""
    document, start, stop, rank = plan.table
    first = plan.offsets[document]
    begin, end = first + start, first + stop
    corners = np.stack([first, begin, begin, begin, end, end, first, end], axis=1).reshape(-1, 4, 2)
    axes.add_collection(PolyCollection(list(corners), facecolors=colours[rank], linewidths=0))
    size = int(plan.offsets[-1])
    axes.set_xlim(0, size)
    axes.set_ylim(size, 0)
    axes.set_aspect("equal")
    axes.set_xlabel("key (row of the pack)")
    axes.set_ylabel("query (row of the pack)")
    axes.set_title("who computes what")
    if plan.world_size <= LEGEND_RANKS:
        axes.legend(handles=[Patch(color=c, label=f"rank {rank}") for rank, c in enumerate(colours)], loc="upper right")


def _draw_rows(axes: Any, plan: ShardingPlan, colours: np.ndarray) -> None:
    for rank, colour in enumerate(colours):
        mine = plan.local(rank)
        places = plan.offsets[mine.document] + mine.start
        bars = list(zip(places.tolist(), (mine.stop - mine.start).tolist(), strict=True))
        axes.broken_barh(bars, (rank - 0.36, 0.72), facecolors=colour, linewidth=0)
    for edge in plan.offsets[1:-1]:
        axes.axvline(edge, color=INK, lw=0.5, alpha=0.35)
    axes.set_xlim(0, int(plan.offsets[-1]))
    axes.set_ylim(plan.world_size - 0.4, -0.6)
    axes.set_xlabel("row of the pack; lines: where documents meet")
    axes.set_ylabel("rank")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("who holds what")


def _draw_work(axes: Any, plan: ShardingPlan, colours: np.ndarray) -> None:
    axes.bar(range(plan.world_size), plan.work * plan.world_size / plan.work.sum(), color=colours)
    axes.axhline(1, color=INK, lw=1, ls=(0, (4, 3)))
    axes.set_xlabel("rank")
    axes.set_title("work / mean")


def _draw_traffic(axes: Any, plan: ShardingPlan, exchange: str) -> None:
    route = plan.route(exchange)
    ranks = np.arange(plan.world_size)
    axes.bar(ranks - 0.2, route.sent_rows, width=0.4, color=PARTS["exchange"], label="sent")
    axes.bar(ranks + 0.2, route.received_rows, width=0.4, color=PARTS["rest"], label="received")
    axes.set_xlabel("rank")
    axes.set_title("KV rows")
    axes.set_ylim(0, 1.25 * max(1, route.sent_rows.max(), route.received_rows.max()))
    axes.legend(loc="upper right", ncols=2)


def _colours(plan: ShardingPlan) -> np.ndarray:
    """The colour of each rank."""
    return np.array([PALETTE[rank % len(PALETTE)] for rank in range(plan.world_size)])


def _save(figure: Figure, path: Path) -> Path:
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(visible=False)
    if path.is_dir():
        raise ValueError(f"figure={str(path)!r}: cannot be written (it is a directory); expected a file")
    if not path.parent.is_dir():
        raise ValueError(f"figure={str(path)!r}: cannot be written (there is no directory {str(path.parent)!r})")
    return save(figure, path if path.suffix else path.with_name(f"{path.name}.png"))
